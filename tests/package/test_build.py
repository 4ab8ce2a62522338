"""The contents of a build of the package."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from paths import ROOT

BUILD = "from setuptools import build_meta; print(build_meta.build_wheel('out'))"


def _wheel(tree: Path) -> set[str]:
    (tree / "out").mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with zipfile.ZipFile(tree / "out" / done.stdout.splitlines()[-1]) as wheel:
        return set(wheel.namelist())


def test_a_deleted_module_is_gone_from_the_next_build(tmp_path: Path) -> None:
    """Where ``pip install .`` ran before, as it does in a clone that is updated."""
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("dsv4_backends", "backends"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    extra = tmp_path / "dsv4_backends" / "extra.py"
    extra.touch()
    first = _wheel(tmp_path)
    extra.unlink()
    assert first - _wheel(tmp_path) == {"dsv4_backends/extra.py"}
    assert not (tmp_path / "build").exists()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "dsv4_backends").rglob("*.py")}
    modules |= {str(path.relative_to(ROOT / "backends")) for path in (ROOT / "backends").rglob("*.py")}
    assert modules == {name for name in first if name.endswith(".py")} - {"dsv4_backends/extra.py"}
