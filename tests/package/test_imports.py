"""Nothing happens at import: each case in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

HEAVY = ("torch", "triton", "numpy", "pytest", "dsv4_backend_torch", "dsv4_backends.ops")


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    "statement",
    [
        "import dsv4_backends",
        "from dsv4_backends import hookimpl, ProviderSpec, Implementation, Tier, Reason, use_providers, CONTRACTS, OPS",
        "import dsv4_backends.commands.cli, dsv4_backends.selection.survey, dsv4_backends.contract.models",
        "import dsv4_backends.provider",
        "from dsv4_backends.commands import cli; cli.main(['list', '--device', 'sm_90'])",
        "from dsv4_backends.commands import cli; cli.main(['explain', 'mqa_logits', '--json'])",
    ],
)
def test_light(statement: str) -> None:
    code = f"{statement}\nimport sys\nloaded = [m for m in {HEAVY!r} if m in sys.modules]"
    if "cli.main" in statement:  # the hook of the in-tree provider has run; its kernels have not been imported
        code += "\nloaded = [m for m in loaded if m != 'dsv4_backend_torch']"
        code += "\nassert 'dsv4_backend_torch.sparse_mla' not in sys.modules"
    run(code + "\nassert not loaded, loaded")


def test_import_takes_under_50_ms() -> None:
    code = "import time; t = time.perf_counter(); import dsv4_backends; print(time.perf_counter() - t)"
    assert min(float(run(code)) for _ in range(5)) < 0.05


def test_list_takes_under_2_s() -> None:
    def once() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "dsv4_backends", "list"], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start

    assert min(once() for _ in range(3)) < 2.0


def test_public_names_exist() -> None:
    run(
        "import dsv4_backends as d; assert all(hasattr(d, n) for n in d.__all__)\n"
        "assert set(d.__all__) <= set(dir(d))\n"
        "try: d.nothing\nexcept AttributeError as e: assert 'nothing' in str(e)\nelse: raise SystemExit(1)"
    )
