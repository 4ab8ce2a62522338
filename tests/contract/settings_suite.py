"""Settings of PyTorch that change numbers elsewhere change none here: the smoke cases of every op under each of them.

test_settings.py runs this on the CPU, in a process for the reference and one for Triton's interpreter. On a GPU
tests/gpu/test_suites.py does.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

# cuBLAS wants it for deterministic algorithms, before CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dsv4_backends import CONTRACTS, OPS, ops, use_providers
from dsv4_backends.bench.inputs import draw
from dsv4_backends.bench.shapes import tiny
from dsv4_backends.contract import Case, layouts
from dsv4_backends.contract.settings import matmul
from dsv4_backends.testing import numerics, oracle
from dsv4_backends.testing.checks import default_device

pytestmark = pytest.mark.simulates

DEVICE = default_device()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PROVIDERS = ["triton"] if INTERPRETED else ["torch", "triton"] if DEVICE.type == "cuda" else ["torch"]

OTHER_THREADS = 1 if torch.get_num_threads() > 1 else 2
"""A number of threads that is not the one without a setting, which OMP_NUM_THREADS may have made 1."""

Setting = Callable[[], AbstractContextManager[Any]]


@contextmanager
def changed(get: Callable[[], Any], put: Callable[[Any], None], value: Any) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def attribute(owner: Any, name: str, value: Any) -> Setting:
    return lambda: changed(lambda: getattr(owner, name), lambda new: setattr(owner, name, new), value)


def precision(value: str) -> Setting:
    return lambda: changed(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, value)


def dtype(value: torch.dtype) -> Setting:
    return lambda: changed(torch.get_default_dtype, torch.set_default_dtype, value)


@contextmanager
def deterministic() -> Iterator[None]:
    with changed(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True):
        yield


@contextmanager
def default_device_set(name: str) -> Iterator[None]:
    before = torch.get_default_device()
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None if before.type == "cpu" else before)


@contextmanager
def flush_denormal() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextmanager
def everything() -> Iterator[None]:
    with ExitStack() as entered:
        for name in ("autocast bf16", "precision medium", "default dtype fp64", "default device meta", "deterministic"):
            entered.enter_context(SETTINGS[name]())
        yield


_backends: Any = torch.backends
SETTINGS: dict[str, Setting] = {
    "autocast bf16": lambda: torch.autocast(DEVICE.type, dtype=torch.bfloat16),
    "autocast fp16": lambda: torch.autocast(DEVICE.type, dtype=torch.float16),
    "precision high": precision("high"),
    "precision medium": precision("medium"),
    "allow_tf32": attribute(_backends.cuda.matmul, "allow_tf32", True),
    "mkldnn bf16": attribute(_backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "fp32_precision tf32": attribute(_backends, "fp32_precision", "tf32"),
    "reduced reductions": attribute(_backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", True),
    "default dtype fp64": dtype(torch.float64),
    "default dtype bf16": dtype(torch.bfloat16),
    "default dtype fp16": dtype(torch.float16),
    "default device meta": lambda: default_device_set("meta"),
    "deterministic": deterministic,
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
    "other threads": lambda: changed(torch.get_num_threads, torch.set_num_threads, OTHER_THREADS),
    "flush denormals": flush_denormal,
    "a dispatch mode": lambda: FlopCounterMode(display=False),
    "several": everything,
}
if INTERPRETED:
    del SETTINGS["flush denormals"]  # a mode of the CPU, which no kernel runs on but in the interpreter
if DEVICE.type == "cuda":
    SETTINGS["default device cuda"] = lambda: default_device_set("cuda")
    SETTINGS["default device cpu"] = lambda: default_device_set("cpu")


def cases(op: str) -> tuple[Case, ...]:
    found = CONTRACTS[op].at_level("smoke")
    return found[:1] if INTERPRETED else found  # the interpreter is slow


@functools.cache
def plain(op: str, name: str) -> tuple[dict[str, Any], tuple[torch.Tensor, ...]]:
    """A case's arguments and what is expected, without any setting."""
    case = next(case for case in CONTRACTS[op].cases if case.name == name)
    made = CONTRACTS[op].inputs(case, DEVICE)
    return made, oracle.expected(op, made)


def to_call(op: str, name: str) -> dict[str, Any]:
    """A case's arguments, with a copy of what an op in place changes."""
    made, contract = plain(op, name)[0], CONTRACTS[op]
    return made | {buffer: made[buffer].clone() for buffer in contract.buffers if contract.in_place}


def same(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor):
        return bool(a == b)
    return (a.shape, a.stride(), a.device) == (b.shape, b.stride(), b.device) and numerics.same_bits(
        a.contiguous(), b.contiguous()
    )


@functools.cache
def served(op: str, name: str, provider: str) -> tuple[torch.Tensor, ...]:
    """A case's results without any setting."""
    with use_providers(provider):
        found = getattr(ops, op)(**to_call(op, name))
    return found if isinstance(found, tuple) else (found,)


@pytest.fixture(scope="module", autouse=True)
def before_any_setting() -> None:
    for op in OPS:
        for case in cases(op):
            for provider in PROVIDERS:
                served(op, case.name, provider)


def test_the_number_of_threads_is_another_one() -> None:
    usual = torch.get_num_threads()
    with SETTINGS["other threads"]():
        assert torch.get_num_threads() == OTHER_THREADS != usual
    assert torch.get_num_threads() == usual


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("op", OPS)
def test_inputs_and_oracle(op: str, setting: str) -> None:
    for case in cases(op):
        made, expected = plain(op, case.name)
        with SETTINGS[setting]():
            again = CONTRACTS[op].inputs(case, DEVICE)
            expected_again = oracle.expected(op, again)
        assert made.keys() == again.keys()
        for name, value in made.items():
            assert same(value, again[name]), (case.name, name)
        for a, b in zip(expected, expected_again, strict=True):
            assert a.dtype is b.dtype
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12, equal_nan=True), case.name


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("op", OPS)
def test_providers(op: str, provider: str, setting: str) -> None:
    contract = CONTRACTS[op]
    for case in cases(op):
        made, (_, expected) = to_call(op, case.name), plain(op, case.name)
        usual = served(op, case.name, provider)
        with use_providers(provider), SETTINGS[setting]():
            results = getattr(ops, op)(**made)
        results = results if isinstance(results, tuple) else (results,)
        for result, before in zip(results, usual, strict=True):
            assert (result.dtype, result.shape, result.device) == (before.dtype, before.shape, before.device)
            assert not result.requires_grad
        for name, result, want in zip(contract.returns, oracle.finished(op, made, results), expected, strict=True):
            error = numerics.compare(result, want, contract.tolerances[name])
            assert error.ok, (case.name, name, error)
        if provider != "torch":  # no setting of PyTorch's reaches a kernel
            assert all(same(a, b) for a, b in zip(results, usual, strict=True)), case.name


@pytest.mark.parametrize("setting", SETTINGS)
def test_layouts(setting: str) -> None:
    generator = torch.Generator().manual_seed(1)
    kv = torch.randn(9, 512, generator=generator).bfloat16().to(DEVICE)
    keys = torch.randn(9, 128, generator=generator).to(DEVICE)
    slots = torch.tensor([0, 5, 3, 11, -1, 8, 1, 2, 4], device=DEVICE)
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)

    def run() -> list[torch.Tensor]:
        cache = torch.zeros(3, 4, 584, dtype=torch.uint8, device=DEVICE)
        indexed = torch.zeros(3, 4, 132, dtype=torch.uint8, device=DEVICE)
        layouts.write_kv(cache, slots, kv)
        layouts.write_indexer_keys(indexed, slots, keys)
        made = [cache, indexed, layouts.read_kv(cache, slots[:4]), *layouts.read_indexer_keys(indexed, slots[:4])]
        made += [*layouts.pack_kv(kv), layouts.unpack_kv(*layouts.pack_kv(kv))]
        made += [*layouts.quantize_e4m3(kv, 64), *layouts.quantize_e4m3(keys, 100)]
        scales = layouts.e8m0_decode(codes)
        return [*made, scales, layouts.e8m0_encode(scales[:255]), layouts.e8m0_unpack(layouts.e8m0_pack(codes))]

    usual = run()
    with SETTINGS[setting]():
        again = run()
    assert all(same(a, b) for a, b in zip(usual, again, strict=True))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("op", OPS)
def test_inputs_of_the_benchmark(op: str, setting: str) -> None:
    row, *_ = tiny((op,))

    def run() -> dict[str, Any]:
        return draw(row, DEVICE)

    usual = run()
    with SETTINGS[setting]():
        again = run()
    CONTRACTS[op].check(**usual)
    assert all(same(value, again[name]) for name, value in usual.items())


@pytest.mark.parametrize("setting", ["precision high", "precision medium", "allow_tf32", "none"])
def test_products_are_no_less_than_fp32(setting: str) -> None:
    """To the bit what fp64 gives, where PyTorch may round: whether this machine would round decides nothing."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(200, 200, generator=generator).to(DEVICE) for _ in range(2))
    with SETTINGS.get(setting, nullcontext)():
        found = matmul(a, b)
    exact = (a.double() @ b.double()).float()
    if setting == "none" or (setting == "allow_tf32" and DEVICE.type == "cpu"):
        assert torch.equal(found, a @ b)
    else:
        assert torch.equal(found, exact)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="oneDNN is the CPU's")
def test_products_with_onednn_set_to_round(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(200, 200), torch.randn(200, 200)
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    assert torch.equal(matmul(a, b), (a.double() @ b.double()).float())


@pytest.mark.parametrize("provider", PROVIDERS)
def test_buffers_made_in_inference_mode(provider: str) -> None:
    made, expected = plain("hc_prenorm_gemm", "small")
    with torch.inference_mode():
        out, squares = (torch.empty(size, device=DEVICE) for size in ((3, 24), (3,)))
    with use_providers(provider):
        ops.hc_prenorm_gemm(**made, out=out, sqr_sum=squares)
    assert numerics.compare(out, expected[0], CONTRACTS["hc_prenorm_gemm"].tolerances["out"]).ok
