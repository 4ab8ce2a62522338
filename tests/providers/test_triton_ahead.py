"""What the Triton provider compiles, when, and what memory its calls take: without a GPU, with launches recorded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import plans
import pytest
import torch
import traffic as serving
import triton
from compile_matrix import NoGpu
from dsv4_backend_triton import ahead
from dsv4_backend_triton.arch import Arch, arch_from_capability
from packaging.version import Version
from traffic import Arguments, Limits, served

from dsv4_backends import OPS
from dsv4_backends.commands import cli
from dsv4_backends.contract.models import FLASH, PRO
from dsv4_backends.runtime import ahead as public

LIMITS = Limits(max_tokens=600, max_requests=40, max_context=30000, next_n=2)
Misses = Callable[[str, list[Arguments]], Counter[tuple[str, str]]]


@pytest.fixture(params=["8.0", "9.0", "12.0"])
def arch(request: pytest.FixtureRequest) -> Arch:
    return arch_from_capability(Version(request.param))


@pytest.fixture
def misses(arch: Arch, monkeypatch: pytest.MonkeyPatch) -> Misses:
    """Calls of an op to what Triton's own cache of compiled kernels would have had to compile for them."""
    driver = triton.runtime.driver
    monkeypatch.setattr(driver, "_active", NoGpu(arch.cc))
    found: list[tuple[str, str]] = []

    def hook(*, key: str, fn: Any, **_: Any) -> bool:
        found.append((fn.name, key))
        return True  # compiled, as far as the caller is concerned

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", hook)

    def run(op: str, calls: list[Arguments]) -> Counter[tuple[str, str]]:
        found.clear()
        for launch in ahead.record(op, calls, arch):
            launch.compile()
        return Counter(found)

    return run


@pytest.mark.parametrize("op", OPS)
def test_after_warmup_nothing_compiles(op: str, misses: Misses) -> None:
    """By Triton's own keys. That the keys of a real launch are these is tested on a GPU, in triton_suite.py."""
    for rank in (FLASH.rank(4), PRO.rank(1)):
        ready = misses(op, list(serving.calls(op, rank, LIMITS)))
        assert ready
        while_serving = misses(op, served(op, rank, LIMITS, 150))
        assert while_serving
        assert not set(while_serving) - set(ready)


@pytest.mark.parametrize("op", OPS)
def test_narrow_limits_compile_less(op: str, misses: Misses) -> None:
    """Outside the limits kernels are missing, so the test above can fail."""
    rank = FLASH.rank(1)
    narrow = misses(op, list(serving.calls(op, rank, Limits(max_tokens=8, max_requests=2, max_context=2000))))
    wide = misses(op, list(serving.calls(op, rank, LIMITS)))
    assert set(narrow) <= set(wide)
    assert len(wide) <= 24
    if op in ("sparse_mla_decode", "fp8_einsum", "hc_prenorm_gemm"):
        assert set(misses(op, served(op, rank, LIMITS, 150))) - set(narrow)


@pytest.mark.parametrize("op", OPS)
def test_fifty_token_counts_compile_a_handful(op: str, misses: Misses) -> None:
    limits = Limits(max_tokens=5000, max_requests=300, max_context=100000)
    drawn = served(op, FLASH.rank(2), limits, 100)
    always = [name for name in drawn[0] if all(isinstance(call.get(name), torch.Tensor) for call in drawn)]
    kinds: dict[str, list[Arguments]] = {}
    for call in drawn:
        kinds.setdefault(str([call[name].dtype for name in always]), []).append(call)
    most = 6 if len(kinds) == 1 else 3  # other dtypes are other kernels
    for calls in kinds.values():
        by_kernel = Counter(name for name, _ in misses(op, calls))
        assert max(by_kernel.values()) <= most, by_kernel


def test_the_counter_counts(arch: Arch, misses: Misses) -> None:
    """A size that is a constant of a kernel would be seen: another number of groups has its own."""
    one = misses("hc_prenorm_gemm", [serving.prenorm(8, 1024, 24)])
    other = misses("hc_prenorm_gemm", [serving.prenorm(8, 1000, 24)])
    assert one
    assert other
    assert set(one) != set(other)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("model", [FLASH, PRO])
def test_workspace_is_bounded(op: str, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """None for most ops; the file of an op in ``plans/`` says how much it takes."""
    for capability in ("8.0", "9.0", "12.0"):
        arch = arch_from_capability(Version(capability))
        monkeypatch.setattr(ahead, "arch_of", lambda _, arch=arch: arch)
        for tp in (1, 8):
            rank = model.rank(tp)
            small, large = Limits(max_tokens=64, max_requests=9), Limits(max_tokens=9000, max_requests=300)
            for arguments in served(op, rank, small, 20) + served(op, rank, large, 40):
                taken = ahead.workspace(op, arguments, torch.device("cuda"))
                assert taken <= plans.workspace(op, arguments, arch), (capability, tp)


def test_workspace_can_be_asked_for() -> None:
    """Through the public function, whoever serves; the reference does not state it."""
    assert public.workspace_bytes("hc_prenorm_gemm", "cpu", **serving.prenorm(8, 1024, 24)) is None


@pytest.mark.parametrize(
    ("extra", "wrong"),
    [
        (["--model", "nowhere"], "nowhere"),
        (["--model", "flash", "--tp", "3"], "3"),
        (["--model", "flash", "--max-tokens", "0"], "max_tokens: expected at least 1, got 0"),
    ],
)
def test_warmup_says_what_is_wrong(capsys: pytest.CaptureFixture[str], extra: list[str], wrong: str) -> None:
    assert cli.main(["warmup", *extra]) == cli.USAGE
    assert wrong in capsys.readouterr().err


def test_warmup_command(capsys: pytest.CaptureFixture[str]) -> None:
    """On a CPU the reference serves, which compiles nothing."""
    assert cli.main(["warmup", "--model", "flash", "--op", "mqa_logits", "--torch-device", "cpu", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["kernels"] == {"mqa_logits": {"torch": 0}}
    assert "warming up mqa_logits" in err
