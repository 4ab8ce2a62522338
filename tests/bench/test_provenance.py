"""How result files were made: the fields that each begins with."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from paths import ROOT

from dsv4_backends.bench import provenance


def test_the_commit_of_a_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GIT_COMMIT", raising=False)

    def git(*words: str) -> str:
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        done = subprocess.run(["git", *who, *words], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    code = tmp_path / "dsv4_backends" / "__init__.py"
    code.parent.mkdir()
    code.touch()
    assert provenance.commit(tmp_path) == "", "no history"
    git("init", "-q")
    assert provenance.commit(tmp_path) == "", "a history that is not this code's, as around a virtual environment"
    git("add", ".")
    git("commit", "-q", "-m", "one")
    head = git("rev-parse", "HEAD")[:12]
    monkeypatch.setenv("GIT_COMMIT", "another")
    assert provenance.commit(tmp_path) == head
    (tmp_path / "result.json").touch()
    assert provenance.commit(tmp_path) == head, "what a run writes is no change of the code"
    code.write_text("changed = True")
    assert provenance.commit(tmp_path) == f"{head}-dirty"
    code.write_text("")
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "new.py").touch()
    assert provenance.commit(tmp_path) == f"{head}-dirty"


def test_without_history_the_environment_names_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_COMMIT", "0123456789ab")
    assert provenance.commit(tmp_path) == "0123456789ab"
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    assert provenance.commit(tmp_path) == "0123456789ab"


def test_what_a_page_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "commit", lambda: "0123456789ab-dirty")
    made = provenance.provenance("make it")
    assert list(made) == ["command", "date", "commit", "machine"]
    assert made["machine"].packages["torch"]
    assert provenance.said_commit(made["commit"]) == "commit 0123456789ab-dirty"
    assert provenance.said_commit("") == "commit not recorded"


def test_every_writer_of_results_has_it_from_there() -> None:
    """A file that puts a date into a result would leave the commit out."""
    writers = []
    for folder in ("dsv4_backends", "tools"):
        for path in (*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.sh")):
            if re.search(r"strftime|datetime|\bdate \+%Y", path.read_text(encoding="utf-8")):
                writers.append(path.name)
    assert writers == ["provenance.py"]
