"""What the Triton provider compiles, when, and what memory its calls take: without a GPU, with launches recorded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import traffic as serving
import triton
from compile_matrix import NoGpu
from dsv4_backend_triton import ahead, variants
from dsv4_backend_triton.arch import Arch, arch_from_capability
from dsv4_backend_triton.sparse_mla.decode.plan import MOST_SPLITS, Shape
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
    """And a server that leaves them meets kernels that are not ready, which the test above would see."""
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
    calls = served(op, FLASH.rank(2), limits, 50)
    by_kernel = Counter(name for name, _ in misses(op, calls))
    assert max(by_kernel.values()) <= 6, by_kernel


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
    """None for prefill and logits; decode: an index's KiB and a little, or the split partials."""
    for capability in ("8.0", "9.0", "12.0"):
        arch = arch_from_capability(Version(capability))
        monkeypatch.setattr(ahead, "arch_of", lambda _, arch=arch: arch)
        for tp in (1, 8):
            rank = model.rank(tp)
            small, large = Limits(max_tokens=64, max_requests=9), Limits(max_tokens=9000, max_requests=300)
            for arguments in served(op, rank, small, 20) + served(op, rank, large, 40):
                taken = ahead.workspace(op, arguments, torch.device("cuda"))
                assert taken <= _most(op, arguments), (capability, tp)


def _most(op: str, arguments: Arguments) -> int:
    if op == "sparse_mla_decode":
        q, extra = arguments["q"], arguments.get("extra_indices")
        rows, heads = q.shape[0] * q.shape[1], q.shape[2]
        indices = arguments["indices"].shape[2] + (0 if extra is None else extra.shape[2])
        partials = 32 * rows * heads * 513 * 4
        return max(rows * (indices * 1028 + 4 + 4 * heads), partials)
    if op == "hc_prenorm_gemm":  # partials of two blocks of 64 rows for each of 132 multiprocessors
        return 132 * 2 * 64 * (24 + 1) * 4
    return 0


def test_workspace_can_be_asked_for() -> None:
    """Through the public function, whoever serves; the reference does not tell."""
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


def test_many_rows_of_the_prenorm_gemm_have_their_own_kernel_on_hopper() -> None:
    """Where its tensor maps and its tile of 32 mixes fit; everything else is the plain kernel's."""

    def kernel(capability: str, m: int, n: int = 24, k: int = 1024, stride: int = 0) -> str:
        x = torch.empty_strided((m, k), (stride or k, 1), dtype=torch.bfloat16, device="meta")
        call = {"x": x, "fn": torch.empty(n, k, device="meta"), "num_splits": 4}
        first = next(iter(ahead.record("hc_prenorm_gemm", [call], arch_from_capability(Version(capability)))))
        return str(first.kernel.__name__)

    assert kernel("9.0", 129) == kernel("9.0", 8192, k=64) == kernel("9.0", 200, n=32) == "_hc_wgmma_kernel"
    plain = [kernel("9.0", 128), kernel("9.0", 200, n=33), kernel("9.0", 200, k=96), kernel("9.0", 200, stride=1028)]
    assert {*plain, kernel("8.0", 8192), kernel("10.0", 8192), kernel("12.0", 8192)} == {"_hc_kernel"}


def test_few_tokens_of_the_einsum_have_their_own_kernel_on_hopper() -> None:
    """From 17 to 64 tokens, with fp32 scales; how far it reads ahead depends on the blocks a multiprocessor has."""

    def launched(capability: str, tokens: int, model: Any = FLASH, **kind: bool) -> Any:
        call = serving.einsum(model.rank(1), tokens, **kind)
        return next(iter(ahead.record("fp8_einsum", [call], arch_from_capability(Version(capability)))))

    for minor in (True, False):
        made = {tokens: launched("9.0", tokens, token_minor=minor) for tokens in (16, 17, 32, 33, 64, 65)}
        names = [launch.kernel.__name__ for launch in made.values()]
        assert names == ["_einsum_kernel", *["_einsum_wgmma_few_kernel"] * 4, "_einsum_wgmma_kernel"]
        assert [made[n].constants["BLOCK_B"] for n in (17, 32, 33, 64)] == [32, 32, 64, 64]
        assert {made[n].constants["STAGES"] for n in (16, 17, 64)} == {6}
        assert {launched("9.0", n, PRO, token_minor=minor).constants["STAGES"] for n in (16, 17, 64)} == {4}
    assert launched("9.0", 32, packed=True).kernel.__name__ == "_einsum_kernel"
    assert {launched(sm, 32).kernel.__name__ for sm in ("8.0", "10.0", "12.0")} == {"_einsum_kernel"}


@pytest.mark.parametrize("capability", ["8.0", "8.6", "9.0", "10.0", "12.0"])
def test_splits_can_be_combined_at_once(capability: str) -> None:
    """However wide the scopes are, and whatever few rows would have liked."""
    arch = arch_from_capability(Version(capability))
    chosen = [
        next(variants.choices("sparse_mla_decode", Shape(arch, rows, heads, 128, selected, vectors, rough, False)))
        for rows in (1, 2, 7, 64)
        for heads in (1, 16, 64, 128)
        for selected in (0, 512, 1024, 2048, 8192)
        for vectors, rough in ((True, False), (False, False), (False, True))
    ]
    splits = [plan.splits for name, plan in chosen if name != "staged"]
    assert 32 < max(splits) <= MOST_SPLITS


def test_attention_has_its_own_kernels_for_mma_sync() -> None:
    """On SM8x and SM12x: the tile that fits, and where rows cannot be read 16 bytes at a time, the plain kernels."""

    def launched(capability: str, op: str, call: dict[str, Any]) -> list[tuple[Any, ...]]:
        found = ahead.record(op, [call], arch_from_capability(Version(capability)))
        return [(one.kernel.__name__, one.constants.get("HEADS"), one.constants.get("KEYS")) for one in found]

    def tile(capability: str, op: str, call: dict[str, Any]) -> tuple[Any, ...]:
        return launched(capability, op, call)[0]

    many, few = (serving.decode(64, b, 1, 128, (512, 64)) for b in (128, 8))
    for capability, wide in (("8.0", 64), ("8.6", 32), ("8.9", 32), ("12.0", 32)):
        assert tile(capability, "sparse_mla_decode", many) == ("_decode_mma_sync_kernel", wide, wide)
        assert tile(capability, "sparse_mla_decode", few) == ("_decode_mma_sync_kernel", 32, 32)
        for heads, high in ((128, wide), (64, wide), (32, 32), (17, 32)):
            call = serving.prefill(heads, 512, 4096, 640)
            assert tile(capability, "sparse_mla_prefill", call) == ("_prefill_mma_sync_kernel", high, high)
        call = serving.prefill(16, 512, 4096, 640)
        assert tile(capability, "sparse_mla_prefill", call) == ("_prefill_mma_sync_kernel", 16, 64)
    rank = serving.decode(16, 128, 1, 128, (512, 64))  # of eight ranks: Hopper too
    for capability in ("8.0", "8.6", "8.9", "9.0", "12.0"):
        assert tile(capability, "sparse_mla_decode", rank) == ("_decode_mma_sync_kernel", 16, 32)
    single = serving.decode(64, 1, 1, 128, (512, 64))  # up to three of the smallest tiles a program: Hopper too
    for capability in ("8.0", "8.6", "8.9", "9.0", "12.0"):
        assert tile(capability, "sparse_mla_decode", single) == ("_decode_mma_sync_kernel", 16, 32)
    assert tile("9.0", "sparse_mla_decode", serving.decode(64, 8, 1, 128, (512, 64)))[0] == "_decode_wgmma_kernel"
    for capability in ("10.0", "10.3"):
        assert tile(capability, "sparse_mla_prefill", serving.prefill(64, 512, 4096, 640))[0] == "_prefill_kernel"
        assert "mma_sync" not in tile(capability, "sparse_mla_decode", many)[0]
    apart = torch.empty(4096, 1, 516, dtype=torch.bfloat16, device="meta")[..., :512]
    call = serving.prefill(64, 512, 4096, 640) | {"kv": apart}
    assert tile("8.0", "sparse_mla_prefill", call)[0] == "_prefill_kernel"
    odd = torch.empty(1024, 64 * 584 + 8, dtype=torch.uint8, device="meta")[:, : 64 * 584].view(1024, 64, 1, 584)
    names = [name for name, *_ in launched("8.0", "sparse_mla_decode", many | {"k_cache": odd})]
    assert names == ["_stage_kernel", "_prefill_mma_sync_kernel"]
