"""What is tested of the Triton provider where kernels run: on the GPU, or in Triton's interpreter on the CPU.

test_triton.py runs this file in a process of its own, since Triton reads the interpreter's switch when it is imported.
On a GPU tests/gpu/test_suites.py and tools/conformance.py run it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

import attention_path
import compressing
import pytest
import torch
import triton
import triton.language as tl
from dsv4_backend_triton import BATCH_INVARIANT, variants
from dsv4_backend_triton.arch import arch_of, interpreting
from dsv4_backend_triton.compressor import portable as compressor
from dsv4_backend_triton.hyper_connection.hc_prenorm_gemm.op import hc_prenorm_gemm
from dsv4_backend_triton.indexer.heads import Config
from dsv4_backend_triton.indexer.paged_mqa_logits import op as paged
from dsv4_backend_triton.indexer.paged_mqa_logits import schedule
from dsv4_backend_triton.indexer.paged_mqa_logits.op import Shape
from dsv4_backend_triton.launch import launch_kernel
from dsv4_backend_triton.lib import bits
from extremes import check_extreme_scale_codes
from forcing import forced
from traffic import served

from dsv4_backends import OPS, ops
from dsv4_backends.contract import CONTRACTS, layouts
from dsv4_backends.contract.models import FLASH
from dsv4_backends.runtime import ahead
from dsv4_backends.runtime.serving import Limits
from dsv4_backends.selection import policy
from dsv4_backends.testing import ProviderConformance, checks, numerics, oracle
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
    # What an op in place is to change, as it was before any call.
    before = {name: made[name].clone() for name in target.contract.buffers if target.contract.in_place}
    whole = target.run(made)
    for size in _SIZES:
        for start in {0, (most - size) // 2}:
            fresh = made | {name: value.clone() for name, value in before.items()}
            cut = checks.select_rows(target.contract, fresh, slice(start, start + size))
            some = target.run(cut)
            for name, all_rows, rows in zip(target.contract.returns, whole, some, strict=True):
                if name in before and cut[name] is fresh[name]:  # bytes as they were, or as the whole batch has them
                    same = bool(((rows == before[name]) | (rows == all_rows)).all())
                else:
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
    launch_kernel(_decode_every_code, (1,), values, scales)
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    for got, want in ((values, e4m3(codes)), (scales, e8m0(codes))):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=0, equal_nan=True)


@triton.jit
def _encode(source, target, scale, code, native: tl.constexpr, bounded: tl.constexpr, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    x = tl.load(source + at).to(tl.float32)
    tl.store(target + at, bits.fp32_to_e4m3(x, native, bounded))
    power, exponent = bits.scale_pow2(tl.abs(x))
    tl.store(scale + at, power)
    tl.store(code + at, exponent.to(tl.uint8))


def _encoded(
    x: torch.Tensor, *, native: bool, bounded: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    target, code = (torch.empty(len(x), dtype=torch.uint8, device=x.device) for _ in range(2))
    scale = torch.empty(len(x), dtype=torch.float32, device=x.device)
    launch_kernel(_encode, (len(x) // 1024,), x, target, scale, code, native, bounded, 1024)
    return target, scale, code


def _ways_to_encode() -> list[bool]:
    return [False] if interpreting() or not arch_of(default_device()).native_fp8 else [False, True]


def _bf16_inputs() -> torch.Tensor:
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def _fp32_inputs() -> torch.Tensor:
    """Random bits; every point halfway between two codes with its neighbours; what is beyond the largest code."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**31), 2**31, (1 << 18,), generator=generator).int()
    near = (torch.randint(100 << 23, 140 << 23, (1 << 18,), generator=generator)).int()
    codes = e4m3(torch.arange(127, dtype=torch.uint8)).float()
    halves = torch.cat([(codes[1:] + codes[:-1]) / 2, codes, torch.tensor([464.0, 480.0, torch.inf, 3.4e38])])
    halves = halves.view(torch.int32)
    edges = torch.cat([halves - 1, halves, (halves + 1).clamp(max=0x7F800000)])
    edges = torch.cat([edges, edges | -(2**31)])
    every = torch.cat([random, near, edges])
    return torch.nn.functional.pad(every, (0, -len(every) % 1024)).view(torch.float32)


@pytest.mark.parametrize("made", [_bf16_inputs, _fp32_inputs])
def test_encoding_e4m3(made: Callable[[], torch.Tensor]) -> None:
    """The bytes of torch's cast, for all bf16 and for many fp32: nearest, ties to even, 448 at most, NaN."""
    x = made().to(default_device())
    # Clamped first: some versions of the cast overflow to NaN.
    want = x.float().clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    for native, bounded in itertools.product(_ways_to_encode(), (False, True)):
        got = _encoded(x, native=native, bounded=bounded)[0]
        same = (got == want) | (x.isnan() & (got & 0x7F == 0x7F))
        if bounded:
            same |= x.isnan() | (x.float().abs() >= 464)
        assert same.all(), (native, x[~same][:9].tolist(), got[~same][:9].tolist(), want[~same][:9].tolist())


def test_scale_rule_for_every_positive_bf16() -> None:
    x = _bf16_inputs()[1:0x7F80]
    x = torch.nn.functional.pad(x, (0, -len(x) % 1024), value=1.0).to(default_device())
    _, scale, code = _encoded(x, native=False)
    want = layouts.ceil_pow2(x.float().clamp(min=layouts.AMAX_FLOOR) * (1.0 / layouts.E4M3_MAX))
    assert torch.equal(scale, want)
    assert torch.equal(code, layouts.e8m0_encode(want))
    assert torch.equal(scale.unsqueeze(-1), layouts.quantize_e4m3(x.unsqueeze(-1), 1)[1])


@pytest.mark.parametrize("check", compressing.CHECKS)
def test_compressors(check: Callable[[str, torch.device], None]) -> None:
    check("triton", default_device())


@pytest.mark.parametrize("splits", [2, 8])
def test_compressors_in_two_launches(splits: int) -> None:
    """The channels of long windows divided over blocks: the entries of one launch, with and without overlap."""
    op, device = compressing.MAIN, default_device()
    contract = CONTRACTS[op]
    for overlap in (False, True):
        made = contract.make(device, torch.Generator().manual_seed(splits), t=60, r=3, ratio=20, overlap=overlap)
        with forced(op, "portable", compressor.Config(4, splits, 1)):
            results = checks.subject("triton", op, device).run(made)
        (want,), (found,) = oracle.expected(op, made), oracle.finished(op, made, results)
        assert numerics.compare(found, want, contract.tolerances["k_cache"]).ok
        assert not torch.equal(found.nan_to_num(), torch.zeros_like(found))


@pytest.mark.parametrize("check", attention_path.CHECKS)
def test_attention_path(check: Callable[[str, torch.device], None]) -> None:
    check("triton", default_device())


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
    launch_kernel(_round_bf16, (1,), x, rounded)
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


@triton.jit
def _count_tiles(
    lens_ptr, seen_ptr, places_ptr, B, next_n, limit, all_tiles, len_stride_b, len_stride_n,  # noqa: N803
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, SCAN: tl.constexpr, VISIT: tl.constexpr, FILL: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Adds 1 for every tile that a program does of an item."""
    lengths = (lens_ptr, B, next_n, limit, len_stride_b, len_stride_n)
    lane, row = tl.arange(0, SCAN), tl.arange(0, ROWS)
    ends, total = schedule.count_places(lane, lengths, ROWS, BLOCK_N, SCAN, VISIT)
    item, place, count = schedule.share(lane, ends, total, all_tiles, lengths, ROWS, BLOCK_N, SCAN, VISIT, FILL)
    tl.store(places_ptr + tl.program_id(0), count)
    while count > 0:
        _, _, length = schedule.item_of(row, item, lengths, ROWS)
        tiles = schedule.tiles_of(tl.max(length, axis=0), BLOCK_N)
        if FILL:
            tiles = all_tiles - tiles
        first, last, count = schedule.part(place, count, tiles, VISIT)
        for tile in range(first, last):
            tl.atomic_add(seen_ptr + item * all_tiles + tile, 1)
        place = 0
        item += 1


_SHARED = [(1, 3, 1, 1, 32, 1), (7, 40, 1, 1, 32, 2), (40, 4, 3, 2, 32, 1), (3, 70, 3, 2, 32, 3), (4, 40, 2, 2, 512, 1)]


@pytest.mark.parametrize(("programs", "b", "next_n", "rows", "scan", "visit"), _SHARED)
@pytest.mark.parametrize("kind", ["random", "skewed", "zero", "full", "any"])
def test_every_tile_of_the_paged_logits_is_done_once(
    programs: int, b: int, next_n: int, rows: int, scan: int, visit: int, kind: str
) -> None:
    """With keys and without, for random lengths: each by one program, and as many places for each program."""
    max_len, limit, block_n = 300, 288, 16
    all_tiles = -(-max_len // block_n)
    generator = torch.Generator().manual_seed(programs)
    lens = torch.randint(0, limit + 1, (b, next_n), generator=generator)
    if kind == "skewed":
        lens[torch.rand(b, next_n, generator=generator) < 0.9] //= 50
    elif kind in ("zero", "full"):
        lens.fill_(0 if kind == "zero" else max_len)
    elif kind == "any":
        some = torch.tensor([-1, -(2**31), 2**31 - 1, max_len, 0])
        lens = some[torch.randint(0, len(some), (b, next_n), generator=generator)]
    tiles = []
    for first in range(0, next_n, rows):
        longest = lens[:, first : first + rows].amax(1).clamp(0, limit)
        tiles += [-(-int(length) // block_n) for length in longest]
    device = default_device()
    given = lens.int().to(device)
    for fill in (False, True):
        wanted = torch.tensor([all_tiles - n for n in tiles] if fill else tiles)
        seen = torch.zeros(len(tiles), all_tiles, dtype=torch.int32, device=device)
        places = torch.full((programs,), -1, dtype=torch.int32, device=device)
        launch_kernel(
            _count_tiles, (programs,), given, seen, places, b, next_n, limit, all_tiles, *given.stride(),
            ROWS=rows, BLOCK_N=block_n, SCAN=scan, VISIT=visit, FILL=fill,
        )  # fmt: skip
        assert torch.equal(seen.cpu(), (torch.arange(all_tiles) < wanted.unsqueeze(1)).int())
        assert places.max() - places.min() <= 1
        assert places.sum() == (int(wanted.sum()) + visit * len(tiles) if wanted.any() else 0)


_RAGGED = {
    "one request": {"b": 1, "context": 700},
    "no length": {"b": 4, "context": 300, "lens": "zero"},
    "all full": {"b": 5, "context": 256, "lens": "full"},
    "short in wide rows": {"b": 5, "context": 90, "columns": 4000},
    "many requests": {"b": 60, "context": 70, "page_size": 8},
    "two tokens": {"b": 7, "context": 400, "next_n": 2},
    "three tokens": {"b": 7, "context": 400, "next_n": 3},
    "four tokens": {"b": 7, "context": 400, "next_n": 4},
    "hostile lengths and tables": {"b": 9, "context": 400, "next_n": 3, "lens": "any", "columns": 900},
}


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("name", _RAGGED)
def test_few_programs_share_ragged_lengths(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that go from one request to the next, within rows too, give what the definition says, everywhere."""
    sizes = {"h": 4, "d": 32, "page_size": 64} | _RAGGED[name]
    contract, device = CONTRACTS["paged_mqa_logits"], default_device()
    made = contract.make(device, torch.Generator().manual_seed(3), **sizes)
    out = torch.full((sizes["b"] * sizes.get("next_n", 1), made["max_context_len"]), torch.nan, device=device)
    few = arch_of(device)._replace(sms=5)
    monkeypatch.setattr(paged, "arch_of", lambda _: few)
    with forced("paged_mqa_logits", "portable", Config(rows, 64, 4, 2, False, 1, rows)):
        paged.paged_mqa_logits(**made, out=out)
    (want,) = oracle.expected("paged_mqa_logits", made)
    error = numerics.compare(out, want, contract.tolerances["out"])
    assert error.ok, error


@pytest.mark.parametrize("next_n", [1, 2, 3, 4, 6])
@pytest.mark.skipif(interpreting(), reason="kernels that the interpreter does not have, and many more keys")
def test_every_variant_of_the_paged_logits(next_n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 heads, long-tailed lengths and some of 0, wide rows: by few programs and by as many as there are."""
    contract, device = CONTRACTS["paged_mqa_logits"], default_device()
    b, columns = 300, 2500
    made = contract.make(device, torch.Generator().manual_seed(3), b=b, context=2000, next_n=next_n, columns=columns)
    skew = torch.rand(b, 1, generator=torch.Generator().manual_seed(4)) ** 4
    made["context_lens"] = (made["context_lens"] * skew.to(device)).int()
    (want,) = oracle.expected("paged_mqa_logits", made)
    here = arch_of(device)
    for arch in (here, here._replace(sms=3)):
        monkeypatch.setattr(paged, "arch_of", lambda _, arch=arch: arch)
        for name, config in variants.choices("paged_mqa_logits", Shape(arch, next_n, 64, 128)):
            out = torch.full((b * next_n, columns), torch.nan, device=device)
            with forced("paged_mqa_logits", name, config):
                paged.paged_mqa_logits(**made, out=out)
            error = numerics.compare(out, want, contract.tolerances["out"])
            assert error.ok, (name, arch.sms, error)


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
