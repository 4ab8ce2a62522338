"""The adapters over DeepGEMM and FlashMLA keep the contract, over fakes of every release line of the libraries."""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dsv4_backend_deep_gemm import probe as deep_gemm_probe
from dsv4_backend_flash_mla import probe as flash_mla_probe
from extremes import check_bounds, check_lengths
from fakes import deep_gemm as fake_deep_gemm
from fakes import flash_mla as fake_flash_mla
from native import PACKAGES, PLAIN, forget, ops_of, subject
from native import use as use  # a fixture
from paths import ROOT

from dsv4_backends import CONTRACTS, Reason, compat, step
from dsv4_backends.contract import Case, layouts
from dsv4_backends.testing import checks, numerics, oracle

CPU = torch.device("cpu")
LINES = [("deep_gemm", line) for line in fake_deep_gemm.LINES] + [("flash_mla", line) for line in fake_flash_mla.LINES]
MORE_CASES = {
    "sparse_mla_prefill": ("flash tp8",),
    "sparse_mla_decode": ("flash tp8 mtp", "window page"),
    "mqa_logits": ("v4", "v4 batch compressed"),
    "paged_mqa_logits": ("v4 two tokens", "v4 four tokens", "v4 page 32"),
    "fp8_einsum": ("flash tp8", "flash packed"),
    "hc_prenorm_gemm": ("flash m=1", "flash m=1 splits=16"),
}
REFUSED = {"v4 page 32": ("tokenspeed", "sgl"), "flash packed": tuple(fake_deep_gemm.LINES)}
"""What V4's sizes are refused by, on Hopper; everything else must be served."""
CHECKS = ("refusal", "fake", "stride", "inputs", "written", "fresh")
"""What they leave out is what they contain (the numbers), or about a real kernel (the same bits twice)."""


def cases_of(op: str) -> list[Case]:
    named = [case for case in CONTRACTS[op].cases if case.name in MORE_CASES[op]]
    assert len(named) == len(MORE_CASES[op])
    return [*CONTRACTS[op].at_level("smoke"), *named]


ALL = [
    pytest.param(library, line, op, case, id=f"{line}-{op}-{case.name}".replace(" ", "_"))
    for library, line in LINES
    for op in ops_of(library)
    for case in cases_of(op)
]


@pytest.mark.parametrize(("library", "line", "op", "case"), ALL)
def test_contract(use: Callable[..., None], library: str, line: str, op: str, case: Case) -> None:
    """Every check on the cases of level smoke; the numbers alone on V4's own sizes."""
    use(library, line)
    target = subject(library, op)
    smoke = case.level == "smoke"
    if target.refusal(target.contract.inputs(case, CPU)) is not None:
        assert smoke or line in REFUSED[case.name]
        checks.check_refusal(target, case)
        return
    for name in CHECKS if smoke else ("numerics",):
        checks.CHECKS[name](target, case)


@pytest.mark.parametrize(("library", "line"), LINES)
def test_enough_is_served(use: Callable[..., None], library: str, line: str) -> None:
    """Most smoke cases of each op with work in them are served: else refusals would leave the tests empty."""
    use(library, line)
    for op in ops_of(library):
        target = subject(library, op)
        cases = target.contract.at_level("smoke")
        served = [case.name for case in cases if target.refusal(target.contract.inputs(case, CPU)) is None]
        assert len(served) * 2 >= len(cases), (op, served)


@pytest.mark.parametrize("line", fake_deep_gemm.LINES)
@pytest.mark.parametrize("compressed", [None, 7])
def test_bounds_that_the_kernels_cannot_take(use: Callable[..., None], line: str, compressed: int | None) -> None:
    use("deep_gemm", line)
    check_bounds(subject("deep_gemm", "mqa_logits"), compressed)


@pytest.mark.parametrize("line", fake_deep_gemm.LINES)
@pytest.mark.parametrize("next_n", [1, 2, 3, 4, 5])
def test_lengths_of_any_order(use: Callable[..., None], line: str, next_n: int) -> None:
    use("deep_gemm", line)
    check_lengths(subject("deep_gemm", "paged_mqa_logits"), next_n)


def test_schedule_is_kept_in_a_step_and_never_stale(use: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    use("deep_gemm", "sgl")
    calls = []
    module = sys.modules["deep_gemm"]
    made_by = module.get_paged_mqa_logits_metadata  # type: ignore[attr-defined]

    def get_paged_mqa_logits_metadata(context_lens, block_kv, num_sms, indices=None):  # type: ignore[no-untyped-def]
        calls.append(len(context_lens))
        return made_by(context_lens, block_kv, num_sms, indices)

    monkeypatch.setattr(module, "get_paged_mqa_logits_metadata", get_paged_mqa_logits_metadata)
    forget()
    target = subject("deep_gemm", "paged_mqa_logits")
    made = target.contract.inputs(next(c for c in target.contract.cases if c.name == "two tokens"), CPU)

    def right() -> bool:
        (want,) = oracle.of("paged_mqa_logits")(**made)
        return numerics.compare(target.run(made)[0], want, target.contract.tolerances["out"]).ok

    assert right()
    assert right()
    assert len(calls) == 2  # nobody said that the lengths stay
    with step():
        assert right()
        assert right()
        assert len(calls) == 3
        made["context_lens"] -= 1  # noticed although it breaks the promise
        assert right()
        assert len(calls) == 4
        made["context_lens"] = made["context_lens"].clone()
        assert right()
        with step():  # a block of its own
            assert right()
        assert len(calls) == 6
    assert right()
    assert len(calls) == 7


def test_flash_mla_schedule_in_a_step(use: Callable[..., None]) -> None:
    """The fake asserts that shapes and lengths are those that the schedule was made for."""
    use("flash_mla", "source")
    target = subject("flash_mla", "sparse_mla_decode")
    case = next(c for c in target.contract.cases if c.name == "lengths")
    made = target.contract.inputs(case, CPU)
    made_by, calls = sys.modules["flash_mla"].get_mla_metadata, []  # type: ignore[attr-defined]

    def get_mla_metadata() -> Any:
        calls.append(1)
        return made_by()

    sys.modules["flash_mla"].get_mla_metadata = get_mla_metadata  # type: ignore[attr-defined]
    forget()
    with step():
        target.run(made)
        target.run(made)
        assert len(calls) == 1
        target.run({**made, "extra_topk_length": made["extra_topk_length"].clone()})
        target.run({**made, "topk_length": made["topk_length"].clone()})
        made["topk_length"] //= 2
        target.run(made)
        assert len(calls) == 4
    target.run(made)
    assert len(calls) == 5


COPIED = {
    "sparse_mla_decode": ("q", "indices", "extra_indices"),
    "sparse_mla_prefill": ("q", "kv", "indices"),
    "mqa_logits": ("q", "k", "k_scale", "weights"),
    "paged_mqa_logits": ("q", "weights"),
    "fp8_einsum": ("x", "w"),
    "hc_prenorm_gemm": ("x", "fn"),
}
"""By op: what is copied where its address is not a multiple of 16."""


def reaching(use: Callable[..., None], op: str) -> tuple[checks.Subject, dict[str, Any], list[Any]]:
    """The adapter, the case's arguments, and what the library will have been given."""
    called, params = PLAIN[op]
    library, line = ("flash_mla", "source") if op.startswith("sparse") else ("deep_gemm", "tokenspeed")
    use(library, line)
    module = sys.modules[library]
    real, got = getattr(module, called), []

    @functools.wraps(real)
    def spy(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            got.extend(value if isinstance(value, tuple) else (value,))
        return real(*args, **kwargs)

    setattr(module, called, spy)
    forget()
    target = subject(library, op)
    return target, target.contract.make(CPU, torch.Generator().manual_seed(0), **params), got


@pytest.mark.parametrize("op", [op for op in PLAIN if "gemm" not in op and op != "fp8_einsum"])
def test_what_the_library_takes_reaches_it(use: Callable[..., None], op: str) -> None:
    """The tensors themselves: to make another, if only a view, takes longer than the rest of an adapter."""
    target, made, got = reaching(use, op)
    target.run(made)
    # What a library would follow astray reaches it as a bounded copy.
    reached, own = set(map(id, got)), {"row_starts", "row_ends", "context_lens", "topk_length", "extra_topk_length"}
    own |= {"indices", "extra_indices"} if op == "sparse_mla_decode" else set()
    wanted = {name for name, value in made.items() if isinstance(value, torch.Tensor)} - own
    assert {name for name in wanted if id(made[name]) not in reached} == set()


@pytest.mark.parametrize(("op", "names"), COPIED.items())
def test_contiguous_at_an_odd_address(use: Callable[..., None], op: str, names: tuple[str, ...]) -> None:
    """What the library reads 16 bytes at a time begins at a multiple of 16."""
    target, made, got = reaching(use, op)
    for name in names:
        whole = made[name].new_empty(made[name].numel() + 1)
        made[name] = whole[1:].view(made[name].shape).copy_(made[name])
        assert made[name].is_contiguous()
        assert made[name].data_ptr() % 16
    results = target.run(made)
    assert {t.data_ptr() % 16 for t in got if isinstance(t, torch.Tensor) and t.dim() > 1} == {0}
    wanted = oracle.expected(op, made)
    for name, result, want in zip(target.contract.returns, results, wanted, strict=True):
        assert numerics.compare(result, want, target.contract.tolerances[name]).ok


def test_blackwell_scales(use: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules of SM100, with fakes only: not run on hardware. Scales become exponents there."""
    use("deep_gemm", "vllm", arch=10)
    projection = importlib.import_module("dsv4_backend_deep_gemm.projection")
    monkeypatch.setattr(projection, "_blackwell", lambda x: True)
    target = subject("deep_gemm", "fp8_einsum")
    served = set()
    for case in target.contract.at_level("smoke"):
        made = target.contract.inputs(case, CPU)
        if (reason := target.refusal(made)) is not None:
            assert isinstance(reason, Reason)
            continue
        served.add(case.name)
        (want,) = oracle.of("fp8_einsum")(**made)
        assert numerics.compare(target.run(made)[0], want, target.contract.tolerances["out"]).ok, case.name
    assert served == {"e8m0", "packed"}
    made = target.contract.make(
        CPU, torch.Generator().manual_seed(0), b=5, h=2, r=640, d=256, scales="packed", per_row=True
    )
    assert target.refusal(made) is None
    (want,) = oracle.of("fp8_einsum")(**made)
    assert numerics.compare(target.run(made)[0], want, target.contract.tolerances["out"]).ok


def test_blackwell_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = importlib.import_module("dsv4_backend_flash_mla.decode")
    target = subject("flash_mla", "sparse_mla_decode")
    made = target.contract.inputs(next(c for c in target.contract.cases if c.name == "small"), CPU)
    assert target.refusal(made) is None
    cache = torch.zeros((3, 4 * 584 + 16), dtype=torch.uint8).as_strided((3, 4, 584), (4 * 584 + 16, 584, 1))
    assert target.refusal({**made, "k_cache": cache}) is None
    monkeypatch.setattr(decode, "_major", lambda cache: 10)
    assert target.refusal(made) is None
    assert "multiple of 576" in str(target.refusal({**made, "k_cache": cache}))


@pytest.mark.parametrize("line", fake_deep_gemm.LINES)
def test_extreme_scale_codes(use: Callable[..., None], line: str) -> None:
    """E8M0 code 0 is 2^-127 and 255 is NaN, in both dtypes that carry codes."""
    use("deep_gemm", line)
    target = subject("deep_gemm", "fp8_einsum")
    made = target.contract.inputs(next(c for c in target.contract.cases if c.name == "small"), CPU)
    codes = torch.zeros((3, 2, 2), dtype=torch.uint8)
    codes[2, 1, 1] = 255
    for pack in (lambda c: c.view(torch.float8_e8m0fnu), layouts.e8m0_pack):
        scaled = {**made, "x_scale": pack(codes), "w_scale": pack(torch.full((2, 1, 2), 227, dtype=torch.uint8))}
        (want,) = oracle.of("fp8_einsum")(**scaled)
        assert want.isnan().any()
        assert want[0].abs().max() > 0
        assert numerics.compare(target.run(scaled)[0], want, target.contract.tolerances["out"]).ok


@pytest.mark.usefixtures("triton_interpreter")
def test_kernels_in_the_interpreter() -> None:
    """The kernels agree with the PyTorch code that replaces them on a CPU."""
    code = """
import torch
from dsv4_backend_deep_gemm import _finish
assert _finish._INTERPRETED
g = torch.Generator().manual_seed(0)

def both(run):
    results = []
    for interpreted in (True, False):
        _finish._INTERPRETED = interpreted
        results.append(run())
    return results

_finish._MOVED_BLOCK = 64
for rows, groups, width in ((3, 3, 10), (4, 2, 5000), (6, 3, 300), (4, 4, 512), (1, 1, 1)):
    ends = torch.randint(0, width + 1, (groups,), generator=g).int()
    starts = (ends * torch.rand(groups, generator=g)).int()
    for padding in (7, 8):
        wide = torch.randn(rows, width + padding, generator=g)[:, :width]
        for begin in (None, starts):
            for shifted in (False, True) if rows == groups and begin is not None else (False,):
                for out in (False, True):
                    for few in (0, 100):
                        _finish._ROWS_TO_MOVE = few
                        buffer = torch.full((rows, width + padding), 7.0) if out else None
                        target = buffer[:, :width] if out else None
                        options = {'shifted': shifted, 'out': target}
                        made = both(lambda: _finish.finish(wide.clone(), begin, ends, width, **options))
                        assert torch.equal(*made), (rows, width, begin is None, shifted, out)
                        assert not out or made[0] is target and (buffer[:, width:] == 7).all()
for requests, tokens, blocks, width in ((2, 1, 3, 300), (3, 2, 5, 131), (2, 2, 0, 9), (1, 4, 150, 9000)):
    some = torch.tensor([0, 3, 8, 9, -1, -(2**31), 2**31 - 1], dtype=torch.int32)
    table = torch.full((requests, blocks + 2), 10**9, dtype=torch.int32)
    table[:, :blocks] = some[torch.randint(0, len(some), (requests, blocks), generator=g)]
    some = torch.tensor([0, -1, 5, 64 * blocks, 64 * blocks + 1, 2**31 - 1, -(2**31)], dtype=torch.int32)
    lens = some[torch.randint(0, len(some), (requests, tokens), generator=g)]
    for flat in (False, True):
        ends = lens[:, 0].contiguous() if flat else lens
        for padding in (3, 4):
            wide = torch.randn(requests * tokens, width + padding, generator=g)[:, :width]
            for out in (False, True):
                target = torch.full_like(wide, 7.0) if out else None
                options = {'out': target, 'table': table[:, :blocks], 'cache': (9, 64)}
                a, b = both(lambda: _finish.finish(wide.clone(), None, ends, width, **options).clone())
                assert torch.equal(a, b), (requests, tokens, blocks, width, flat, out)
for ends_from, ends_to in ((-5, 40), (60, 90)):
    starts, ends = torch.randint(-20, 90, (33,), generator=g).int(), torch.randint(ends_from, ends_to, (33,)).int()
    starts[:2] = ends[1:3] = torch.tensor([-(2**31), 2**31 - 1])
    for keys, width in ((70, 70), (70, 9)):
        (a, b), (c, d) = both(lambda: _finish.bounds(starts, ends, keys, width))
        assert torch.equal(a, c) and torch.equal(b, d)
        assert ((a >= 0) & (a <= b) & (b <= keys) & (b - a <= width)).all()

from dsv4_backend_flash_mla import _bounds
some = torch.tensor([0, 5, 99, 100, 101, -1, -2, -(2**31), 2**31 - 1], dtype=torch.int32)

def scope(b, s_q, topk, width, length):
    wide = some[torch.randint(0, len(some), (b, s_q, topk + 5), generator=g)]
    lengths = some[torch.randint(0, len(some), (b,), generator=g)] if length else None
    return _bounds.Scope(wide[:, :, :topk], lengths, 100, width)

def bounded(interpreted, first, second):
    _bounds._INTERPRETED = interpreted
    return _bounds.bounded(first, second)

for b, s_q, topk, extra in ((1, 1, 64, None), (3, 2, 31, 1500), (2, 3, 1100, 0), (2, 1, 0, 7)):
    for lengths in ((False, False), (True, False), (False, True), (True, True)):
        first = scope(b, s_q, topk, -(-topk // 64) * 64 or 64, lengths[0])
        second = None if extra is None else scope(b, s_q, extra, -(-extra // 64) * 64 or 64, lengths[1])
        for x, y in zip(bounded(True, first, second), bounded(False, first, second), strict=True):
            assert torch.equal(x[0], y[0])
            assert (x[1] is None and y[1] is None) or torch.equal(x[1], y[1])
            assert ((x[0] >= -1) & (x[0] < 100)).all()
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_kernels_compile() -> None:
    """For Hopper, without a GPU, and without spilling: the interpreter takes what the compiler does not."""
    code = """
import itertools, sys
import torch, triton
sys.path.insert(0, "tools")
from compile_matrix import NoGpu, registers_and_stack
from dsv4_backend_deep_gemm import _finish
from dsv4_backend_flash_mla import _bounds

triton.runtime.driver.set_active(NoGpu(90))
i32, f32 = torch.int32, torch.float32
numbers = [3, 1, 128, 128, 4096, 128, 128, 1, 1024, 1024, 99999, 1024, 1024]
anywhere = torch.zeros(9, dtype=i32)[1:]  # on no boundary of 16 bytes
made = [
    _bounds._bounds_kernel.warmup(*given, 1024, grid=(1,), enable_fp_fusion=True)
    for given in ([*[i32] * 8, *numbers], [*[i32] * 8, *[1] * 13], [*[anywhere] * 8, *[0] * 13])
]
assert len(set(map(id, made))) == 1  # launch() keeps one for all calls
made = made[:1]
for starts, copies, page, unit in itertools.product((False, True), (False, True), (0, 32, 64), (1, 4)):
    if not (starts and page):
        flags = (starts, starts, copies, page, unit, 4096, True)
        numbers = (4096, 4096, 4096, 1, 1, 64, 4096, 999)
        tensors = (f32, f32, i32, i32, i32)
        made.append(_finish._finish_kernel.warmup(*tensors, *numbers, *flags, grid=(1,), launch_pdl=True))
assert all(registers_and_stack(kernel)[1] == 0 for kernel in made)
print("compiled", len(made))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["compiled", "17"]


def test_behind_its_own_name(use: Callable[..., None]) -> None:
    """With our functions behind the libraries' names, the adapters still get the libraries."""
    use("deep_gemm", "tokenspeed")
    use("flash_mla", "source")
    real = {name: sys.modules[name] for name in PACKAGES}
    with compat.install():
        assert sys.modules["deep_gemm"] is not real["deep_gemm"]
        assert deep_gemm_probe.deep_gemm().einsum is real["deep_gemm"].fp8_einsum
        assert flash_mla_probe.flash_mla().decode is real["flash_mla"].flash_mla_with_kvcache
