"""Any int32 where an op takes an index or a length: nothing faults, and what comes out is what the contract says.

test_values.py runs this file in processes of their own, once for each provider that it names by FUZZED_PROVIDER: a
fault kills the process. On a GPU tests/gpu/test_hostile_values.py does.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv4_backends import CONTRACTS
from dsv4_backends.contract import inputs, layouts
from dsv4_backends.testing import checks, numerics, oracle

PROVIDER = os.environ.get("FUZZED_PROVIDER", "torch")
EXAMPLES = int(os.environ.get("FUZZED_EXAMPLES", "30"))
DEVICE = checks.default_device()
FAR = (-(2**31), 2**31 - 1, 10**9, -(10**9))

pytestmark = pytest.mark.simulates
fuzz = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def values(draw: Any, bound: int, *shape: int) -> torch.Tensor:
    """int32 around [0, bound], and far from it."""
    count = torch.Size(shape).numel()
    any_value = st.one_of(st.integers(-2, bound + 2), st.integers(0, max(bound - 1, 0)), st.sampled_from(FAR))
    drawn = draw(st.lists(any_value, min_size=count, max_size=count))
    return torch.tensor(drawn, dtype=torch.int32).view(shape)


def beside(x: torch.Tensor) -> torch.Tensor:
    """The same values with 10**9 beside each row."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 7), 10**9, dtype=x.dtype)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def agrees(op: str, made: dict[str, Any]) -> None:
    target = checks.subject(PROVIDER, op, DEVICE)
    made = {k: inputs.move(v, DEVICE) if isinstance(v, torch.Tensor) else v for k, v in made.items()}
    if target.refusal(made) is not None:
        return
    target.contract.check(**made)
    results = oracle.finished(op, made, target.run(made))
    for name, result, want in zip(target.contract.returns, results, oracle.expected(op, made), strict=True):
        error = numerics.compare(result, want, target.contract.tolerances[name])
        assert error.ok, (name, error)


@fuzz
@given(st.data(), st.integers(1, 3), st.integers(0, 9), st.integers(0, 40), st.booleans())
def test_sparse_mla_prefill(data: Any, s_q: int, s_kv: int, topk: int, lengths: bool) -> None:
    generator = torch.Generator().manual_seed(s_kv)
    made = {
        "q": inputs.normal(generator, s_q, 3, 512).bfloat16(),
        "kv": inputs.normal(generator, s_kv, 512).bfloat16(),
        "indices": beside(values(data.draw, s_kv, s_q, topk)),
        "sm_scale": 512**-0.5,
        "topk_length": values(data.draw, topk, s_q) if lengths else None,
    }
    agrees("sparse_mla_prefill", made)


def cache(generator: torch.Generator, pages: int, page_size: int) -> torch.Tensor:
    stride = page_size * layouts.KV_BYTES + (-page_size * layouts.KV_BYTES % layouts.PAGE_ALIGNMENT)
    raw = torch.full((pages, stride), inputs.POISON, dtype=torch.uint8)
    made = raw.as_strided((pages, page_size, layouts.KV_BYTES), (stride, layouts.KV_BYTES, 1))
    slots = torch.arange(pages * page_size)
    if pages:
        layouts.write_kv(made, slots, inputs.normal(generator, len(slots), 512).bfloat16())
    return made


@fuzz
@given(
    st.data(),
    st.integers(1, 2),
    st.integers(1, 2),
    st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from([1, 3, 4]), st.integers(0, 40), st.booleans()),
        min_size=1,
        max_size=2,
    ),
)
def test_sparse_mla_decode(data: Any, b: int, s_q: int, scopes: list[tuple[int, int, int, bool]]) -> None:
    generator = torch.Generator().manual_seed(b)
    made: dict[str, Any] = {"q": inputs.normal(generator, b, s_q, 3, 512).bfloat16(), "sm_scale": 512**-0.5}
    for prefix, (pages, page_size, topk, lengths) in zip(("", "extra_"), scopes, strict=False):
        made[prefix + "k_cache"] = cache(generator, pages, page_size)
        made[prefix + "indices"] = beside(values(data.draw, pages * page_size, b, s_q, topk))
        made[prefix + "topk_length"] = values(data.draw, topk, b) if lengths else None
    agrees("sparse_mla_decode", made)


def mqa(data: Any, m: int, n: int, compressed: int | None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(n)
    return {
        "q": inputs.normal(generator, m, 2, 32).to(torch.float8_e4m3fn),
        "k": inputs.normal(generator, n, 32).to(torch.float8_e4m3fn),
        "k_scale": torch.ones(n),
        "weights": inputs.normal(generator, m, 2),
        "row_starts": values(data.draw, n, m),
        "row_ends": values(data.draw, n, m),
        "max_seqlen_k": compressed,
    }


CONTIGUOUS = (st.data(), st.integers(1, 4), st.integers(0, 70), st.none() | st.integers(0, 80))


@fuzz
@given(*CONTIGUOUS)
def test_mqa_logits(data: Any, m: int, n: int, compressed: int | None) -> None:
    agrees("mqa_logits", mqa(data, m, n, compressed))


@fuzz
@given(*CONTIGUOUS, st.integers(1, 100))
def test_indexer_topk(data: Any, m: int, n: int, compressed: int | None, topk: int) -> None:
    agrees("indexer_topk", mqa(data, m, n, compressed) | {"topk": topk})


def paged(
    data: Any, b: int, next_n: int, page_size: int, pages: int, blocks: int, columns: int, flat: bool
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(columns)
    stride = page_size * 36
    raw = torch.full((pages, stride + 16 - stride % 16), inputs.POISON, dtype=torch.uint8)
    keys = raw.as_strided((pages, page_size, 36), (raw.shape[1], 36, 1))
    if pages:
        layouts.write_indexer_keys(
            keys, torch.arange(pages * page_size), inputs.normal(generator, pages * page_size, 32)
        )
    return {
        "q": inputs.normal(generator, b, next_n, 2, 32).to(torch.float8_e4m3fn),
        "k_cache": keys,
        "weights": inputs.normal(generator, b * next_n, 2),
        "context_lens": values(data.draw, page_size * blocks, *((b,) if flat else (b, next_n))),
        "block_table": beside(values(data.draw, pages, b, blocks)),
        "max_context_len": columns,
    }


PAGED = st.tuples(
    st.integers(1, 2),
    st.integers(1, 2),
    st.sampled_from([4, 64]),
    st.integers(0, 3),
    st.integers(0, 3),
    st.integers(0, 300),
    st.booleans(),
)


@fuzz
@given(st.data(), PAGED)
def test_paged_mqa_logits(data: Any, sizes: Any) -> None:
    agrees("paged_mqa_logits", paged(data, *sizes))


@fuzz
@given(st.data(), PAGED, st.integers(1, 100))
def test_paged_indexer_topk(data: Any, sizes: Any, topk: int) -> None:
    agrees("paged_indexer_topk", paged(data, *sizes) | {"topk": topk})


OTHERS = [op for op, contract in CONTRACTS.items() if contract.values and f"test_{op}" not in globals()]
"""Ops without a test of their own above."""


@pytest.mark.parametrize("op", OTHERS)
@fuzz
@given(st.data())
def test_any_values(op: str, data: Any) -> None:
    """The smoke cases, with any value in what indexes, and numbers where they have NaN that no index leads to."""
    contract = CONTRACTS[op]
    made = contract.inputs(data.draw(st.sampled_from(contract.at_level("smoke"))), "cpu")
    for name, value in made.items():
        wide = isinstance(value, torch.Tensor) and value.is_floating_point() and value.element_size() > 1
        if wide and name not in contract.buffers:
            value.nan_to_num_(0.25)
    for name in {each.argument for each in contract.values}:
        if made.get(name) is not None and data.draw(st.booleans()):
            given_values = made[name]
            drawn = values(data.draw, max(map(int, given_values.shape), default=0), *given_values.shape)
            if name == "slots":  # two entries in one slot mean nothing
                drawn[[int(value) in drawn[:i].tolist() for i, value in enumerate(drawn)]] = -1
            made[name] = (
                inputs.spread(drawn.to(given_values.dtype)) if drawn.dim() > 1 else drawn.to(given_values.dtype)
            )
    agrees(op, made)
