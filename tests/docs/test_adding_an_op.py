"""A seventh op, added as docs/adding-an-op.md says: in a copy of the tree, by its files, its edits and its commands."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from paths import ROOT

PAGE = (ROOT / "docs" / "adding-an-op.md").read_text(encoding="utf-8")
COMMANDS = re.search(r"<!-- commands -->\n```sh\n(.*?)```", PAGE, re.DOTALL)[1].splitlines()  # type: ignore[index]
Run = Callable[[str], str]


def marked(kind: str) -> list[tuple[str, str]]:
    """The blocks of a kind, with the file that each is for."""
    return re.findall(rf"^<!-- {kind}: (\S+) -->\n```\w+\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a command of the page in the copy."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("backends", "docs", "dsv4_backends", "tests", "tools"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("CHANGELOG.md", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tree)
    for file, text in marked("file"):
        path = tree / file
        assert not path.exists()
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    for file, diff in marked("edit"):
        lines = diff.splitlines(keepends=True)
        assert sum(line.startswith("+") for line in lines) == 1
        before, after = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" ", " +"))
        whole = (tree / file).read_text()
        assert whole.count(before) == 1, file
        (tree / file).write_text(whole.replace(before, after))
    names = {"dsv4-backends": ("-m", "dsv4_backends"), "pytest": ("-m", "pytest", "-q", "-n", "0"), "python": ()}

    def run(command: str) -> str:
        first, *words = shlex.split(command)
        done = subprocess.run(
            [sys.executable, *names[first], *words],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'backends'}", "COLUMNS": "200"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    assert run(COMMANDS[0]).count("written") >= 3
    return run


def shown(run: Run, start: str) -> str:
    """What the command of the page that starts so prints."""
    (command,) = [line for line in COMMANDS if line.startswith(start)]
    return run(command)


def test_every_command_of_the_page_is_tested() -> None:
    tests = Path(__file__).read_text(encoding="utf-8")
    for command in COMMANDS[1:]:
        assert f'"{" ".join(command.split()[: 3 if command.startswith("python") else 2])}"' in tests, command


def test_the_docs_have_it(run: Run) -> None:
    assert run("python tools/docs.py --check") == ""


def test_its_check_is_printed(run: Run) -> None:
    assert "def rms_norm(x, weight, eps, *, out=None)" in shown(run, "python -m dsv4_backends.contract")


def test_ops_has_it_written_and_not_yet_written(run: Run) -> None:
    """As it is once the docs are generated, and before."""
    look = "import dsv4_backends.ops as o, inspect; print(inspect.getsourcefile(o.rms_norm), o.rms_norm.__doc__[:4])"
    assert re.search(r"dsv4_backends/ops\.py Root$", run(f'python -c "{look}"').strip())
    (tree,) = re.findall(r"(\S+)/dsv4_backends/ops\.py", run(f'python -c "{look}"'))
    ops = Path(tree) / "dsv4_backends" / "ops.py"
    written = ops.read_text()
    try:
        shutil.copy(ROOT / "dsv4_backends" / "ops.py", ops)
        code = (
            "import torch; from dsv4_backends import ops; x = torch.ones(2, 4).bfloat16(); "
            "print(ops.rms_norm(x, torch.ones(4), 0).sum().item(), ops.rms_norm.__doc__[:4])"
        )
        assert run(f'python -c "{code}"') == "8.0 Root\n"
    finally:
        ops.write_text(written)


def test_the_commands_that_choose(run: Run) -> None:
    assert re.search(r"^rms_norm +torch +reference", shown(run, "dsv4-backends list"), re.MULTILINE)
    assert "1. torch: selected" in shown(run, "dsv4-backends explain")
    assert re.search(
        r"^rms_norm +norm, prefill +m 8192, k 4096 +torch", shown(run, "dsv4-backends check"), re.MULTILINE
    )


def test_the_commands_that_run_it(run: Run) -> None:
    assert re.search(r"^rms_norm +torch +5/5 +out ", shown(run, "dsv4-backends verify"), re.MULTILINE)
    assert "tiny m=4 k=512" in shown(run, "dsv4-backends bench")
    assert re.search(r"^rms_norm +torch +0$", shown(run, "dsv4-backends warmup"), re.MULTILINE)


def test_the_conformance_suite_has_it(run: Run) -> None:
    assert re.search(r"\d+ passed", shown(run, "pytest tests/providers/test_conformance_torch.py"))


def test_no_op_is_named_by_hand(run: Run) -> None:
    """What has the six ops has the seventh."""
    code = (
        "import json, dsv4_backends as d; from dsv4_backends.selection.preferences import CLASSES; "
        "from dsv4_backends.bench import shapes; from dsv4_backends import ops; "
        "print(json.dumps([list(x) for x in (d.OPS, d.CONTRACTS, CLASSES, ops.__all__, "
        "dict.fromkeys(r.op for r in shapes.tiny(d.OPS)))]))"
    )
    found = json.loads(run(f'python -c "{code}"'))
    assert found[0][-1] == "rms_norm"
    assert all(names == found[0] for names in found)
