"""What is tested of the Triton provider where kernels run: on the GPU, or in Triton's interpreter on the CPU.

test_triton.py runs this file in a process of its own, since Triton reads the interpreter's switch when it is imported.
On a GPU tests/gpu/test_suites.py and tools/conformance.py run it.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from dsv4_backend_triton import BATCH_INVARIANT
from dsv4_backend_triton.arch import arch_of, interpreting
from dsv4_backend_triton.hyper_connection.hc_prenorm_gemm.op import hc_prenorm_gemm
from dsv4_backend_triton.launch import launch
from dsv4_backend_triton.lib import bits
from extremes import check_extreme_scale_codes
from traffic import served

from dsv4_backends import OPS, ops
from dsv4_backends.contract.models import FLASH
from dsv4_backends.runtime import ahead
from dsv4_backends.runtime.serving import Limits
from dsv4_backends.selection import policy
from dsv4_backends.testing import ProviderConformance, checks, numerics
from dsv4_backends.testing.checks import default_device
from dsv4_backends.testing.oracle.codes import e4m3, e8m0

pytestmark = pytest.mark.simulates


class TestTriton(ProviderConformance):
    provider = "triton"


class TestBatchInvariantMode(ProviderConformance):
    """What the mode puts in place of the usual functions: right, and the same bits for a row alone."""

    provider = "triton"
    batch_invariant = True

    @classmethod
    def _ops(cls) -> list[str]:
        return [op for op in super()._ops() if op not in BATCH_INVARIANT]

    @classmethod
    def _all_tests(cls) -> list[tuple[str, str, str]]:
        return [test for test in super()._all_tests() if test[0] in ("numerics", "batch_invariant", "graph")]


_SIZES = (1, 7, 9) if interpreting() else (1, 7, 64, 83, 84, 256, 1000, 8192)


def _batch(target: checks.Subject, rows: int) -> dict[str, Any]:
    """A call of so many rows, which are those of one case again and again: of a small case in the interpreter, else of
    one of V4's sizes."""
    level = "smoke" if interpreting() else "default"
    for case in target.contract.cases:
        if case.level == level and case.params.get(target.contract.partials) is None:
            made = target.contract.inputs(case, target.device)
            count = len(made[target.contract.batch])
            if count > 1 and target.refusal(made) is None:
                return checks.select_rows(target.contract, made, torch.arange(rows, device=target.device) % count)
    raise AssertionError(f"{target.contract.name} has no case of level {level} with rows")


@pytest.mark.parametrize("op", OPS)
def test_bits_of_a_row_in_every_batch(op: str) -> None:
    """Rows of the largest batch, in batches of every size: first ones, and ones from its middle."""
    target = checks.subject("triton", op, default_device(), batch_invariant=True)
    assert target.implementation.batch_invariant
    most = _SIZES[-1]
    made = _batch(target, most)
    whole = target.run(made)
    for size in _SIZES:
        for start in {0, (most - size) // 2}:
            some = target.run(checks.select_rows(target.contract, made, slice(start, start + size)))
            for name, all_rows, rows in zip(target.contract.returns, whole, some, strict=True):
                per = len(all_rows) // most
                same = numerics.same_bits(all_rows[start * per : (start + size) * per], rows)
                assert same, f"{name}: {size} rows from {start} on"


@triton.jit
def _decode_every_code(e4m3_ptr, e8m0_ptr):
    code = tl.arange(0, 256)
    tl.store(e4m3_ptr + code, bits.e4m3_to_fp32(code.to(tl.uint8)))
    tl.store(e8m0_ptr + code, bits.e8m0_to_fp32(code))


def test_every_e4m3_and_e8m0_code() -> None:
    """By integer arithmetic, as SM80 and SM86 need it: subnormals, both NaN, 2^-127."""
    device = default_device()
    values, scales = torch.empty(256, device=device), torch.empty(256, device=device)
    launch(_decode_every_code, (1,), values, scales)
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    for got, want in ((values, e4m3(codes)), (scales, e8m0(codes))):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=0, equal_nan=True)


def test_extreme_scale_codes() -> None:
    check_extreme_scale_codes("triton", default_device())


@triton.jit
def _round_bf16(source, target):
    at = tl.arange(0, 512)
    tl.store(target + at, bits.round_to(tl.load(source + at), tl.bfloat16, tl.float32))


def test_rounding_to_bf16() -> None:
    x = torch.randn(512, generator=torch.Generator().manual_seed(0))
    x[:6] = torch.tensor([float("inf"), -float("inf"), float("nan"), 1 + 2**-8, 0.0, -0.0])
    x = x.to(default_device())
    rounded = torch.empty(512, dtype=torch.bfloat16, device=x.device)
    launch(_round_bf16, (1,), x, rounded)
    torch.testing.assert_close(rounded, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_prenorm_splits_without_k_are_zero() -> None:
    """More of them than a grid may have; at most a split for each block of k is launched."""
    device = default_device()
    x, fn = torch.randn(2, 256, device=device).bfloat16(), torch.randn(24, 256, device=device)
    for splits in (3, 70_000):
        out, squares = (torch.full(shape, torch.nan, device=device) for shape in ((splits, 2, 24), (splits, 2)))
        hc_prenorm_gemm(x, fn, num_splits=splits, out=out, sqr_sum=squares)
        torch.testing.assert_close(out.sum(0), x.float() @ fn.T, rtol=1e-2, atol=1e-1)
        torch.testing.assert_close(squares.sum(0), x.float().square().sum(1))


@pytest.mark.skipif(not interpreting(), reason="about the interpreter")
def test_the_architecture_is_the_simulated_one() -> None:
    named = os.environ.get("DSV4_BACKENDS_DEVICE", "sm_80")
    assert f"sm_{arch_of(torch.device('cpu')).cc}" == named


@triton.jit
def _bf16_dot(a, b, c):
    i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    tl.store(c + i * 16 + j, tl.dot(tl.load(a + i * 16 + j), tl.load(b + i * 16 + j)))


@pytest.mark.skipif(not interpreting(), reason="about the interpreter")
def test_the_interpreter_is_not_trusted_with_bf16() -> None:
    """Its bf16 products are wrong, so launchers give kernels fp32 operands there. Should this fail, they need not."""
    a, b = (torch.randn(16, 16, generator=torch.Generator().manual_seed(s)).bfloat16() for s in (1, 2))
    c = torch.empty(16, 16)
    _bf16_dot[(1,)](a, b, c)
    exact = a.double() @ b.double()
    assert (c.double() - exact).norm() / exact.norm() > 0.1
    assert arch_of(a.device).interpret


@pytest.mark.skipif(interpreting(), reason="nothing compiles in the interpreter")
def test_nothing_compiles_after_warmup(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real calls with real tensors, of sizes within the limits, over what ``warmup`` made ready."""
    limits = Limits(max_tokens=300, max_requests=20, max_context=4000, next_n=2)
    compiled: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda *, fn, **_: compiled.append(fn.name))
    with policy.use_providers("triton"):
        ready = ahead.warmup("flash", tp=2, limits=limits, device=default_device())
        assert all(made["triton"] > 0 for made in ready.values()), ready
        assert compiled
        compiled.clear()
        for op in OPS:
            function = getattr(ops, op)
            for arguments in served(op, FLASH.rank(2), limits, 20, seed=1):
                function(**{name: _on_gpu(value) for name, value in arguments.items()})
    torch.cuda.synchronize(default_device())
    assert compiled == []


def _on_gpu(value: object) -> object:
    """Zeros in place of a tensor of the meta device: no key is attended to, no index is out of range."""
    if not isinstance(value, torch.Tensor):
        return value
    extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return torch.zeros(extent, dtype=value.dtype, device=default_device()).as_strided(value.shape, value.stride())
