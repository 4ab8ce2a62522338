"""The Triton provider, without a GPU: its kernels in the interpreter, and their cubins for every architecture."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import compile_matrix
import interpreter
import kept
import pytest
import torch
import triton
from compile_matrix import spilled_more
from dsv4_backend_triton import ahead
from dsv4_backend_triton.arch import arch_from_capability
from kept import Cell
from packaging.requirements import Requirement
from packaging.version import Version
from paths import ROOT

from dsv4_backends import CONTRACTS, OPS, records
from dsv4_backends.commands import cli


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module", autouse=True)
def triton_is_installed() -> None:
    assert importlib.util.find_spec("triton"), "the test extra installs triton"


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("device", [pytest.param("sm_80", marks=pytest.mark.longest), "sm_120"])
def test_suite_in_the_interpreter(device: str) -> None:
    """The whole conformance suite, level smoke, on CPU tensors; all of it for one architecture's configurations."""
    only = [] if device == "sm_80" else ["-k", "numerics or written"]
    # NumPy's own words about the interpreter's arithmetic: what is then masked, and how it reads scalars.
    quiet = ["-W", "ignore:Conversion of an array", "-W", "ignore::RuntimeWarning"]
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *quiet, *only, "tests/providers/triton_suite.py"]
    done = run(*command, TRITON_INTERPRET="1", DSV4_BACKENDS_DEVICE=device, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    summary = done.stdout.splitlines()[-1]
    assert "passed" in summary
    assert "failed" not in summary


def test_an_interpreter_that_cannot_run_is_reported_with_both_versions() -> None:
    assert interpreter.trouble("3.6.0", "2.3.5") == ""
    assert interpreter.trouble("3.7.0", "2.4.6") == ""
    why = interpreter.trouble("3.6.0", "2.4.0")
    assert "Triton 3.6.0" in why
    assert "NumPy 2.4.0" in why
    (numpy,) = [
        Requirement(text)
        for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["test"]
        if text.startswith("numpy")
    ]
    assert not numpy.specifier.contains("2.4.0"), "what the extra installs runs with every Triton that it allows"


def test_every_test_in_the_interpreter_asks_whether_it_can_run() -> None:
    asked = 0
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text()
        if re.search(r"""TRITON_INTERPRET(": |=)"1\"""", text) and path.name != Path(__file__).name:
            assert '"triton_interpreter"' in text, path.name
            asked += 1
    assert asked


def test_compiles_for_every_architecture(tmp_path: Path) -> None:
    """Every eighth variant, other ones for each architecture and release of Triton; the docs have all of them."""
    start = version("triton").split(".")[1]
    part = ("--every", "8", "--start", start)
    done = run("tools/compile_matrix.py", *part, "--kept", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert ", 0 bad" in done.stdout


def test_the_kept_matrices(tmp_path: Path) -> None:
    """The oldest Triton, the one that engines bring and the newest; a spill that is not kept is found."""
    matrices = kept.matrices()
    assert [made.release for made in matrices] == [(3, 6), (3, 8), (3, 9)]
    for made in matrices:
        assert not [cell.error for cells in made.kernels.values() for cell in cells.values() if cell.error]
        records.write(made, tmp_path / "compile-matrix-again.json")
        assert kept.matrices(tmp_path) == [made]
        assert kept.matrix_of(f"{made.triton}.post1+vendor") == made
        assert spilled_more(made, made) == []
        made.kernels["new_kernel warps=4"] = {"8.0": Cell(stack=8)}
        (worse,) = spilled_more(made, kept.matrix_of(made.triton))
        assert worse == "sm_80 new_kernel warps=4: 8 bytes of stack, kept are 0"
    assert kept.matrix_of("3.7.1") is None


@pytest.mark.parametrize("device", ["sm_80", "sm_100", "sm_121"])
def test_explain_says_which_configurations_are_derived(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    for op in OPS:
        assert cli.main(["explain", op, "--device", device]) == 0
        assert "measured on compute capability 9.0; elsewhere derived" in capsys.readouterr().out


WITHOUT_GLUON = """
import sys
sys.modules["triton.experimental.gluon"] = None
from packaging.version import Version
from dsv4_backend_triton import ahead
from dsv4_backend_triton.arch import arch_from_capability
from dsv4_backends import OPS
from dsv4_backends.runtime import serving
from dsv4_backends.contract.models import FLASH
limits = serving.Limits(max_tokens=600, max_requests=130, max_context=30000)
for op in OPS:
    for capability in ("8.0", "8.6", "9.0", "12.0"):
        calls = serving.calls(op, FLASH.rank(1), limits)
        for launch in ahead.record(op, calls, arch_from_capability(Version(capability))):
            print(op, launch.kernel.__name__)
"""


def test_without_gluon_the_plain_kernels_serve_and_say_so() -> None:
    """Gluon is experimental: a Triton that has renamed something must cost speed, not service."""
    done = run("-c", WITHOUT_GLUON)
    assert done.returncode == 0, done.stderr[-2000:]
    served = {tuple(line.split()) for line in done.stdout.splitlines()}
    assert {op for op, _ in served} == set(OPS)
    assert {name for op, name in served if op == "sparse_mla_prefill"} == {"_prefill_kernel"}
    assert not [name for _, name in served if "mma" in name]
    assert done.stderr.count("slower plain kernels serve in place of") == 1


def test_nothing_searches_or_compiles_while_serving() -> None:
    """No autotuning in shipped code, and no size that grows with the load as a constant of a kernel."""
    growing = {"m", "n", "b", "s_q", "s_kv", "topk", "pages", "splits"}
    for path in sorted((ROOT / "backends").glob("**/*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("autotune", "heuristics"), f"{path.name}:{node.lineno}"
            if (
                isinstance(node, ast.arg)
                and node.annotation is not None
                and "constexpr" in ast.unparse(node.annotation)
            ):
                assert node.arg not in growing, f"{path.name}:{node.lineno}: {node.arg}"


def test_the_hook_imports_no_triton() -> None:
    code = (
        "import sys, dsv4_backend_triton; specs = list(dsv4_backend_triton.dsv4_providers());"
        "assert specs[0].name == 'triton' and 'triton' not in sys.modules and 'torch' not in sys.modules"
    )
    assert run("-c", code).returncode == 0


def casts_of_caches(op: str, odd: bool, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where the kernels of the smoke cases whose pages are an odd or even number of bytes apart read a cache's bytes as
    another type, in Triton's own representation."""
    found, launches = [], []
    for case in CONTRACTS[op].at_level("smoke"):
        made = CONTRACTS[op].inputs(case, torch.device("cpu"))
        caches = [x for name, x in made.items() if name.endswith("k_cache") and isinstance(x, torch.Tensor)]
        if caches[0].stride(0) % 2 == odd:
            shapes = {
                name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
                if isinstance(x, torch.Tensor)
                else x
                for name, x in made.items()
            }
            launches += ahead.record(op, [shapes], arch_from_capability(Version("8.0")))
    assert launches, f"no case of {op}"
    monkeypatch.setattr(triton.runtime.driver, "_active", compile_matrix.NoGpu(80))
    for launch in {(one.kernel.__name__, str(one.constants)): one for one in launches}.values():
        asm = launch.compile().asm
        text = asm["ttir" if "ttir" in asm else "ttgir"]  # Gluon has only the second
        found += re.findall(r"tt.bitcast .*!tt.ptr<i8>>? -> .*!tt.ptr<(?!i8)\w+>", text)
    return found


PAGED = [op for op, contract in CONTRACTS.items() if "k_cache" in contract.args]
"""The caches of the logits have pages that are a multiple of 4 bytes apart, by contract."""


@pytest.mark.parametrize("op", [op for op in PAGED if not op.startswith("paged_")])
def test_caches_at_odd_addresses_are_read_and_written_by_bytes(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wider access there faults on a GPU, and not in the interpreter."""
    assert not casts_of_caches(op, True, monkeypatch)


def test_other_caches_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the test above can fail."""
    assert casts_of_caches("sparse_mla_decode", False, monkeypatch)
