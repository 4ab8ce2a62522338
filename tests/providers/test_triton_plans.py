"""Plans of the Triton provider: properties that hold for any tiles. Launches are recorded, without a GPU.

What is asked of one op only is in its file in ``plans/``.
That each compiles and fits the shared memory of its architecture is tools/compile_matrix.py's, see test_triton.py.
"""

from __future__ import annotations

import importlib
import itertools
from functools import cache

import plans
import pytest
import torch
import traffic as serving
from dsv4_backend_triton import ahead, variants
from dsv4_backend_triton.arch import arch_from_capability
from dsv4_backend_triton.launch import Launch, recording
from packaging.version import Version
from traffic import Arguments, Limits, served

from dsv4_backends import CONTRACTS, OPS
from dsv4_backends.contract.models import FLASH, PRO
from dsv4_backends.selection.capability import Support, support

CAPABILITIES = ("8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0", "12.1")
RANKS = (FLASH.rank(1), FLASH.rank(8), PRO.rank(1))
LIMITS = Limits(max_tokens=3000, max_requests=200, max_context=30000, next_n=2)


@cache
def recorded(op: str, capability: str) -> list[tuple[Arguments, list[Launch]]]:
    """Calls of servers, and what each launches."""
    arch = arch_from_capability(Version(capability))
    calls = [call for rank in RANKS for call in served(op, rank, LIMITS, 40)]
    for rank in RANKS:  # and as warm-up has them, around each size from which on another kernel serves
        calls += serving.calls(op, rank, Limits(max_tokens=300, max_requests=3, max_context=2000))
    others = (*plans.unusual(op), *plans.more_calls(op))
    return [(call, list(ahead.record(op, [call], arch))) for call in (*calls, *others)]


def variant_of(op: str, launch: Launch) -> str:
    """The file of a launch's kernel; another op's where one is made of it."""
    ours = f"{variants.__package__}.{variants.OPS[op].folder}.{plans.variant_of(launch)}"
    return plans.variant_of(launch) if launch.kernel.fn.__module__ == ours else ""


def test_every_file_of_plans_is_of_an_op() -> None:
    found = {file for file in plans.HERE.rglob("*.py") if file.name != "__init__.py"}
    assert found == {plans.file_of(op) for op in variants.OPS}


@pytest.mark.parametrize("op", variants.OPS)
def test_every_kernel_serves_somewhere_and_only_where_it_is_for(op: str) -> None:
    needs = {variant.name: variant.needs for variant in variants.OPS[op].variants}
    launched = set()
    for capability in CAPABILITIES:
        for _, launches in recorded(op, capability):
            for name in {variant_of(op, one) for one in launches} & set(needs):
                assert support(needs[name], Version(capability)) is Support.SUPPORTED, (name, capability)
                launched.add(name)
    assert launched == set(needs)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("op", variants.OPS)
def test_every_result_is_computed_once(op: str, capability: str) -> None:
    for call, launches in recorded(op, capability):
        checks = plans.covered(op, call, launches)
        told = [(one.kernel.__name__, one.grid, one.constants) for one in launches]
        shapes = {name: tuple(value.shape) for name, value in call.items() if isinstance(value, torch.Tensor)}
        assert checks, f"covered() says nothing of {op}"
        assert all(checks), (checks, told, shapes)


@pytest.mark.parametrize("op", variants.OPS)
def test_grids_are_launched(op: str) -> None:
    """CUDA takes 2^31 - 1, 65535 and 65535 blocks."""
    for capability in CAPABILITIES:
        grids = [one.grid for _, launches in recorded(op, capability) for one in launches]
        assert all(grid[0] < 2**31 and max(grid[1:], default=1) < 2**16 for grid in grids), capability


def reads_wide(launch: Launch) -> bool:
    """Whether a kernel in Gluon is given tensors whose rows begin at multiples of 16 bytes."""
    tensors = [value for value in launch.arguments.values() if isinstance(value, torch.Tensor) and value.ndim > 1]
    wide = [t for t in tensors if t.dtype in (torch.bfloat16, torch.uint8, torch.float8_e4m3fn)]
    return all(stride * t.element_size() % 16 == 0 for t in wide for stride in t.stride()[:-1])


@pytest.mark.parametrize("capability", ["8.0", "9.0"])
@pytest.mark.parametrize("columns", [1, 2048, 262144, 2**25])
@pytest.mark.parametrize("topk", [1, 512, 2048])
def test_the_workspace_of_a_selection_is_bounded(topk: int, columns: int, capability: str) -> None:
    """Whatever the context and the number of rows."""
    arch, rank = arch_from_capability(Version(capability)), FLASH.rank(1)
    for m in (1, 200) if columns > 2048 else (1, 9000):
        for op, call in (
            ("indexer_topk", serving.mqa(rank, m, columns)),
            ("paged_indexer_topk", serving.paged(rank, m, 2, min(columns, 2**24))),
        ):
            call["topk"] = topk
            with recording([].append, arch):
                assert ahead.workspace(op, call, torch.device("meta")) <= 256 * 2**20


@pytest.mark.parametrize("op", variants.OPS)
def test_rows_that_cannot_be_read_at_once_are_the_plain_kernels(op: str) -> None:
    gluon = {variant.name for variant in variants.OPS[op].variants if variant.gluon}
    for capability in CAPABILITIES:
        for _, launches in recorded(op, capability):
            assert all(reads_wide(one) for one in launches if variant_of(op, one) in gluon)


@pytest.mark.parametrize("op", variants.OPS)
def test_unusual_calls_are_the_plain_kernels(op: str) -> None:
    """Whatever the architecture; staged decode goes on as prefill does."""
    plain = {variant.name for variant in variants.OPS[op].variants if not variant.gluon}
    for capability in CAPABILITIES:
        arch = arch_from_capability(Version(capability))
        for call in plans.unusual(op):
            first = next(iter(ahead.record(op, [call], arch)))
            assert variant_of(op, first) in plain, (capability, first.kernel.__name__)


@pytest.mark.parametrize("op", OPS)
def test_a_tensor_map_stays_within_its_tensor(op: str) -> None:
    """For every case of the contract: also where rows overlap, or one is repeated."""
    contract, arch, launches = CONTRACTS[op], arch_from_capability(Version("9.0")), []
    home = importlib.import_module(f"{variants.__package__}.{variants.OPS[op].folder}.op")
    for case in contract.at_level("default"):
        made = contract.inputs(case, "cpu")
        with recording(launches.append, arch), pytest.MonkeyPatch.context() as patch:
            patch.setattr(home, "arch_of", lambda _: arch)
            getattr(home, op)(**made)
    maps = [value for one in launches for value in one.arguments.values() if hasattr(value, "block_shape")]
    for found in maps:
        reach = sum((size - 1) * stride for size, stride in zip(found.shape, found.strides, strict=True)) + 1
        base, size = found.base, found.base.element_size()
        assert base.storage_offset() * size + reach * size <= base.untyped_storage().nbytes(), (op, found)


def test_decode_splits_by_the_lengths_only_where_rows_have_all_keys_of_their_contexts() -> None:
    """Not where a row has the keys that a model selects, not in the batch-invariant mode, not without the lengths of
    the second scope: then all rows have as many tiles, and those of the first scope change nothing.

    Nor where few rows have many splits.
    """
    op, arch = "sparse_mla_decode", arch_from_capability(Version("9.0"))

    def by_lengths(call: Arguments, home: str = "") -> set[bool]:
        return {one.arguments.get("even", 0) > 0 for one in ahead.record(op, [call], arch, home)}

    lengths = "topk_length", "extra_topk_length"
    for heads, b, s_q in ((128, 16, 1), (128, 64, 1), (64, 16, 1), (64, 64, 1), (128, 8, 2)):
        wide = serving.decode(heads, b, s_q, 128, (8192, 2))
        assert by_lengths(wide) == {True}
        assert by_lengths(wide | dict.fromkeys(lengths)) == {False}
        assert by_lengths(wide | {"extra_topk_length": None}) == {False}
        assert by_lengths(wide | {"topk_length": None}) == {True}
        assert by_lengths(wide, "batch_invariant") == {False}
    for heads, b in ((64, 2), (64, 8), (128, 4)):
        assert by_lengths(serving.decode(heads, b, 1, 128, (8192, 2))) == {False}
    for heads, b in itertools.product((64, 128), (1, 8, 16, 32, 64, 128)):
        for selected in ((512, 64), (1024, 64)):
            assert by_lengths(serving.decode(heads, b, 1, 128, selected)) == {False}
        # Rows that hold all keys of their contexts, where no row would be split.
        assert by_lengths(serving.decode(heads, b, 1, 128, (1024, 2))) == {heads * b == 64 * 128}
        assert by_lengths(serving.decode(heads, b, 1, 128, (896, 2))) == {False}


def test_fp8_einsum_on_mma_sync_has_the_tile_whose_waves_are_shorter() -> None:
    """From 65 tokens on, if more than half of the multiprocessors have a tile; two small tiles fit beside each other on
    8.0 and 8.7, not on 8.6."""
    op, large, small = "fp8_einsum", 256, 128

    def tokens(capability: str, sms: int, b: int, home: str = "") -> int:
        """Of a tile; 0 if another kernel serves."""
        call = serving.einsum(FLASH.rank(1), b)
        assert (call["x"].shape[1], call["w"].shape[1]) == (8, 1024)
        (one,) = ahead.record(op, [call], arch_from_capability(Version(capability), sms), home)
        return int(one.arguments["TOKENS"]) if plans.variant_of(one) == "mma_sync" else 0

    assert [tokens("8.0", 108, b) for b in (64, 65, 128, 129, 256, 300, 1024, 4096)] == [
        *(0, small, small, large, large, small, small, large)
    ]
    assert [tokens("8.0", 132, b) for b in (128, 129, 300)] == [0, small, large]
    assert [tokens("8.0", 127, b) for b in (128, 129)] == [small, large]
    assert [tokens("8.0", 128, b) for b in (128, 129)] == [0, small]
    assert [tokens("8.6", 84, b) for b in (64, 65, 128, 129, 300, 1024)] == [0, small, small, large, large, large]
    assert [tokens("8.7", 16, b) for b in (256, 300, 512)] == [large, small, large]
    assert tokens("8.0", 108, 4096, "batch_invariant") == 0
