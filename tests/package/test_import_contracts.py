"""The contracts of ``lint-imports`` find what they are for: each import here breaks one, in a copy of the packages."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from paths import ROOT

LINT = "from importlinter.cli import lint_imports_command as lint; lint()"
ORDER = "packages in order: each imports only those below it"
PACKAGE = "the core imports its modules, and of the package itself the version only"
CONTRACT = "the contract imports torch and errors.py only"
ORACLE = "the oracle shares no code with what it judges"
FILES = "no import cycle between files"
FOLDERS = "no import cycle between folders"
PROVIDER = "a provider imports dsv4_backends.provider and the contract, and no other module of the core"
PROVIDERS = "providers do not import each other"
NAMES = "the core imports no provider, no library, and no engine outside its folder"
ENGINES = "engines do not import each other"
CONFIGURED = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]

BREAKS = [
    (ORDER, "dsv4_backends/contract/inputs.py", "from ..selection import policy"),
    (ORDER, "dsv4_backends/runtime/steps.py", "def later(): from ..commands import cli"),
    (ORDER, "dsv4_backends/selection/policy.py", "import dsv4_backends.ops"),
    (ORDER, "dsv4_backends/other.py", "from .commands import cli"),
    (PACKAGE, "dsv4_backends/selection/policy.py", "def later(): from dsv4_backends import verify"),
    (PACKAGE, "dsv4_backends/contract/layouts.py", "import dsv4_backends"),
    (CONTRACT, "dsv4_backends/contract/inputs.py", "from ..records import read"),
    (CONTRACT, "dsv4_backends/contract/sparse_mla/cases.py", "import triton"),
    (ORACLE, "dsv4_backends/testing/oracle/codes.py", "from ...contract import layouts"),
    (FILES, "dsv4_backends/contract/spec.py", "def later(): from . import CONTRACTS"),
    (FOLDERS, "dsv4_backends/selection/machine.py", "from . import resolve"),
    (FOLDERS, "backends/dsv4_backend_triton/lib/bits.py", "from .. import variants"),
    (PROVIDER, "backends/dsv4_backend_torch/rope.py", "from dsv4_backends.runtime import bind"),
    (PROVIDER, "backends/dsv4_backend_triton/lib/bits.py", "from dsv4_backends.errors import ContractError"),
    (PROVIDER, "backends/dsv4_backend_deep_gemm/probe.py", "from dsv4_backends import use_providers"),
    (PROVIDER, "backends/dsv4_backend_flash_mla/__init__.py", "from dsv4_backends import records"),
    (PROVIDERS, "backends/dsv4_backend_torch/rope.py", "import dsv4_backend_triton"),
    (NAMES, "dsv4_backends/runtime/bind.py", "import dsv4_backend_torch"),
    (NAMES, "dsv4_backends/selection/machine.py", "import transformers"),
    (NAMES, "dsv4_backends/engines/vllm/rules.py", "import sglang"),
    (ENGINES, "dsv4_backends/engines/vllm/rules.py", "from ..sglang import rules"),
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tree")
    for name in ("backends", "dsv4_backends", "tools"):
        shutil.copytree(ROOT / name, made / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", made)
    return made


def broken(tree: Path) -> list[str]:
    """The contracts that do not hold in a tree."""
    path = os.pathsep.join((str(tree), str(tree / "backends")))
    run = subprocess.run(
        [sys.executable, "-c", LINT, "--no-cache"],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    verdicts = dict(re.findall(r"^(.+) (KEPT|BROKEN)\b", run.stdout, re.MULTILINE))
    assert sorted(verdicts) == sorted(contract["name"] for contract in CONFIGURED["contracts"]), run.stdout + run.stderr
    found = [name for name, verdict in verdicts.items() if verdict == "BROKEN"]
    assert run.returncode == bool(found)
    return found


def test_this_tree_keeps_all(tree: Path) -> None:
    assert broken(tree) == []


@pytest.mark.parametrize(("contract", "file", "line"), BREAKS)
def test_an_import_that_is_not_allowed(tree: Path, contract: str, file: str, line: str) -> None:
    path = tree / file
    before = path.read_text(encoding="utf-8") if path.exists() else None
    path.write_text(f"{before or ''}\n{line}\n", encoding="utf-8")
    try:
        assert contract in broken(tree)
    finally:
        path.unlink() if before is None else path.write_text(before, encoding="utf-8")


def test_every_contract_is_tried_and_every_package_is_in_them() -> None:
    assert {contract for contract, *_ in BREAKS} == {contract["name"] for contract in CONFIGURED["contracts"]}
    packages = {path.name for path in (ROOT / "backends").iterdir() if (path / "__init__.py").exists()}
    assert {*CONFIGURED["root_packages"]} == {"dsv4_backends", *packages}
    sources = [set(c["source_modules"]) for c in CONFIGURED["contracts"] if c["name"] == PROVIDER]
    assert sources == [packages]
