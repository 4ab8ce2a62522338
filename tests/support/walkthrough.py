"""Pages of docs that a test carries out in a copy of the tree: their files, their edits and their commands."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from paths import ROOT

BLOCK = re.compile(r"^<!-- (\w+)(?:: (.+?))? -->\n```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAMS = {"dsv4-backends": ("-m", "dsv4_backends"), "pytest": ("-m", "pytest", "-q", "-n", "0"), "python": ()}


class Block(NamedTuple):
    """A block of a page, with the comment before it: ``<!-- kind: name -->``."""

    kind: str
    name: str
    language: str
    text: str


class Page:
    """A page of ``docs/`` and its blocks."""

    def __init__(self, name: str) -> None:
        self.text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        self.blocks = [Block(*match.groups("")) for match in BLOCK.finditer(self.text)]

    def of(self, kind: str) -> list[Block]:
        """The blocks of a kind."""
        return [block for block in self.blocks if block.kind == kind]

    @property
    def commands(self) -> list[str]:
        """Every command, with the variables that were exported before it in front: ``A=1 python ...``."""
        found = []
        for block in self.of("commands"):
            exported = ""
            for line in block.text.splitlines():
                if line.startswith("export "):
                    exported += line.removeprefix("export ") + " "
                else:
                    found.append(exported + line)
        return found


class Tree:
    """A copy of the tree."""

    def __init__(self, path: Path) -> None:
        self.path = path
        for name in ("backends", "docs", "dsv4_backends", "tests", "tools"):
            shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("CHANGELOG.md", "README.md", "pyproject.toml"):
            shutil.copy(ROOT / name, path)

    def follow(self, page: Page) -> None:
        """Write the page's files and make its edits."""
        for block in page.of("file"):
            file = self.path / block.name
            assert not file.exists(), file
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text)
        for block in page.of("edit"):
            lines = block.text.splitlines(keepends=True)
            before, after = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
            whole = (self.path / block.name).read_text()
            assert whole.count(before) == 1, block.name
            (self.path / block.name).write_text(whole.replace(before, after))

    def run(self, command: str) -> str:
        """What a command of a page prints; it must succeed."""
        words = shlex.split(command)
        variables = {}
        while "=" in words[0]:
            name, _, value = words.pop(0).partition("=")
            variables[name] = value
        done = subprocess.run(
            [sys.executable, *PROGRAMS[words[0]], *words[1:]],
            cwd=self.path,
            env={
                **os.environ,
                "PYTHONPATH": f"{self.path}{os.pathsep}{self.path / 'backends'}",
                "TRITON_CACHE_DIR": str(self.path / "triton"),
                "COLUMNS": "200",
                **variables,
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout
