"""A whole DeepSeek V4 of transformers on the ops, against transformers' own eager code.

In float32 the whole model is compared: the lists of keys, the compressors, the hand-over and the caches are then all
that differs. In bf16 every layer is compared by itself, op by op and on the same inputs: one flip of a top-k or of an
expert moves the logits of a whole random model by more than any tolerance could allow.
"""

from __future__ import annotations

import copy
import functools
import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from tiny_deepseek_v4 import tiny, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING
from transformers.masking_utils import create_sliding_window_causal_mask, eager_mask
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

from dsv4_backends import CONTRACTS, DSV4Error, ops, stats
from dsv4_backends.contract import layouts
from dsv4_backends.engines import transformers as engine
from dsv4_backends.engines.transformers import (
    attention,
    chunks,
    compressors,
    fused,
    handover,
    hyper_connections,
    indexer,
    projection,
    replaced,
    sources,
)
from dsv4_backends.engines.transformers import (
    model as models,
)
from dsv4_backends.runtime import bind
from dsv4_backends.selection import provider
from dsv4_backends.testing.numerics import compare

LENGTHS = (1, 3, 4, 5, 127, 128, 129, 255, 257, 511, 512, 513, 700)
ATTENTION = CONTRACTS["sparse_mla_prefill"].tolerances["out"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are so small that threads cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    bind.reset()
    with torch.no_grad():
        yield
    handover.handover.take()


@pytest.fixture(scope="module")
def eager() -> Any:
    return tiny()


@pytest.fixture(scope="module")
def ours(eager: Any) -> Any:
    model = copy.deepcopy(eager)
    engine.enable(model)
    return model


def same(result: Tensor, reference: Tensor) -> None:
    """The issue's bound: 1e-4 of the largest logit, and the same greedy tokens."""
    assert float((result - reference).abs().max() / reference.abs().max()) < 1e-4
    assert torch.equal(result.argmax(-1), reference.argmax(-1))


# ------------------------------------------------------------------------------------ float32: the whole model


@pytest.mark.parametrize("length", LENGTHS)
def test_prefill(eager: Any, ours: Any, length: int) -> None:
    ids = tokens(1, length)
    same(ours(ids).logits, eager(ids).logits)


def test_prefill_within_index_topk() -> None:
    """With the released index_topk of 512 the indexer selects everything up to 2048 tokens."""
    reference = tiny(index_topk=512)
    ids = tokens(2, 333)
    expected = reference(ids).logits
    engine.enable(reference)
    same(reference(ids).logits, expected)


@pytest.mark.parametrize("rows", [1, 37])
def test_prefill_in_chunks(eager: Any, ours: Any, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every loop over rows takes several turns, with a batch whose sequences go one by one and are padded."""

    def by_rows(count: int, bytes_per_row: int) -> Iterator[slice]:
        for start in range(0, count, rows):
            yield slice(start, min(start + rows, count))

    monkeypatch.setattr(chunks, "row_chunks", by_rows)
    monkeypatch.setattr(chunks, "FLAT_ROWS", 0)
    ids = tokens(2, 150)
    mask = torch.ones_like(ids)
    mask[1, :41] = 0
    result, reference = (model(ids, attention_mask=mask).logits for model in (ours, eager))
    same(result[mask.bool()], reference[mask.bool()])


@pytest.mark.parametrize(("length", "padded"), [(1, False), (126, True), (255, False), (510, True)])
def test_cached(eager: Any, ours: Any, length: int, padded: bool) -> None:
    """A prefill, single tokens, several at once as a draft's verification brings them, and single ones again."""
    steps = [length, 1, 1, 3, 1, 2, 9, 1, 140, 1]
    ids = tokens(2, sum(steps))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, : length // 2] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    caches = [DynamicCache(config=model.config) for model in (ours, eager)]
    at = 0
    for count in steps:
        here = slice(at, at + count)
        result, reference = (
            model(
                ids[:, here],
                attention_mask=mask[:, : here.stop],
                position_ids=positions[:, here],
                past_key_values=cache,
            ).logits
            for model, cache in zip((ours, eager), caches, strict=True)
        )
        seen = mask[:, here].bool()
        same(result[seen], reference[seen])
        at += count


@pytest.mark.parametrize("length", [60, 250, 505])
def test_generate(eager: Any, ours: Any, length: int) -> None:
    ids = tokens(2, length, seed=length)
    mask = torch.ones_like(ids)
    mask[0, :33] = 0
    kwargs: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **kwargs), eager.generate(ids, **kwargs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_disable_gives_back_the_same_bits(dtype: torch.dtype) -> None:
    model = tiny(dtype)
    ids = tokens(1, 140)
    before, state = model(ids).logits, copy.deepcopy(model.state_dict())
    engine.enable(model)
    assert not torch.equal(model(ids).logits, before)  # it was in
    engine.disable(model)
    assert torch.equal(model(ids).logits, before)
    assert model.config._attn_implementation == "eager"
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class _Made(TorchDispatchMode):
    """The shapes of all tensors that a call makes, and the ops that would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.shapes.add(tuple(tensor.shape))
        masks = [i for i in args[1] if i is not None and i.dtype is torch.bool] if "index" in func.__name__ else []
        if masks or func.__name__.startswith(("_local_scalar_dense", "nonzero", "masked_select", "unique")):
            self.waits.append(func.__name__)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_size_queries_by_keys(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    length = 772
    for chunked in (chunks, importlib.import_module("dsv4_backend_torch.memory")):
        monkeypatch.setattr(chunked, "CHUNK_BYTES", 2**19)
    model = tiny(dtype, num_attention_heads=1, o_groups=1, index_n_heads=4)
    hidden = torch.randn(1, length, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    keys = {length, length // 4, length + length // 4}

    def large(layer: int) -> list[tuple[int, ...]]:
        with _Made() as made:
            attend(model.model, layer, hidden, None, None)
        return [shape for shape in made.shapes if length in shape and sum(n in keys for n in shape) > 1]

    if dtype is torch.float32:  # eager attention makes them
        assert large(0)
        assert large(1)
    engine.enable(model)
    for layer in range(3):
        assert not large(layer)


# ------------------------------------------------------------------------------ bf16: each layer, on the same inputs


def attend(model: Any, layer: int, hidden: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
    """One attention block, called as the model calls it."""
    seen = 0 if cache is None else cache.layers[layer].get_seq_length()
    positions = torch.arange(seen, seen + hidden.shape[1]).expand(len(hidden), -1)
    if mask is not None:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, seen : seen + hidden.shape[1]]
    view = None if cache is None else _OneLayer(cache, layer)
    arguments = {"attention_mask": mask, "past_key_values": view, "position_ids": positions}
    made = create_sliding_window_causal_mask(model.config, hidden, **arguments)
    rotary = {kind: model.rotary_emb(hidden, position_ids=positions, layer_type=kind) for kind in ("main", "compress")}
    result: Tensor = model.layers[layer].self_attn(
        hidden, position_embeddings=rotary, position_ids=positions, attention_mask=made, past_key_values=cache
    )[0]
    return result


class _OneLayer:
    """A cache whose first layer is the one at hand, for the mask: the others have seen nothing."""

    def __init__(self, cache: Any, layer: int) -> None:
        self.layer = cache.layers[layer]
        self.is_sliding = [True]

    def get_query_offset(self, layer_idx: int) -> int:
        return int(self.layer.get_seq_length())

    def get_mask_sizes(self, length: int, layer_idx: int) -> tuple[int, int]:
        sizes: tuple[int, int] = self.layer.get_mask_sizes(length)
        return sizes


@pytest.fixture
def attention_outputs(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Tensor]]:
    """What the attention functions return: ours, and the definition in fp64 under transformers' dense mask."""
    kept: dict[str, list[Tensor]] = {"ours": [], "dense": []}

    def ours(*args: Any, **kwargs: Any) -> Any:
        out, weights = attention.attention(*args, **kwargs)
        kept["ours"].append(out.clone())
        return out, weights

    def dense(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **_: Any) -> Any:
        logits = query.double() @ key.double().transpose(2, 3) * scaling
        logits = logits.masked_fill(mask < -1e30, -torch.inf)
        sinks = module.sinks.double().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        share = torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]
        kept["dense"].append((share @ value.double()).transpose(1, 2))
        return kept["dense"][-1].to(query.dtype), None

    mapping = AttentionInterface._global_mapping
    for name, function, mask in ((engine.NAME, ours, handover.window_of), ("dense", dense, eager_mask)):
        monkeypatch.setitem(mapping, name, function)
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, name, mask)
    return kept


def pair(**changes: Any) -> tuple[Any, Any]:
    """A bf16 model enabled, and one whose attention is the definition."""
    first, second = tiny(torch.bfloat16, **changes), tiny(torch.bfloat16, **changes)
    second.set_attn_implementation("dense")
    return first, second


STEPS = (261, 1, 1, 3, 8, 140, 1, 9, 2)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_attention_of_a_layer(layer: int, padded: bool, attention_outputs: dict[str, list[Tensor]]) -> None:
    """Prefill, decode and several tokens over transformers' own bf16 cache, within the op's tolerance."""
    first, second = pair()
    first_outputs = attention_outputs["ours"]
    _enable_recorded(first, fp8=False)  # the indexer unquantised, so that both select the same keys
    hidden = torch.randn(2, sum(STEPS), 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    mask = torch.ones(2, sum(STEPS), dtype=torch.long)
    if padded:
        mask[1, :100] = 0
    caches = [DynamicCache(config=model.config) for model in (first, second)]
    at = 0
    for count in STEPS:
        for model, cache in zip((first, second), caches, strict=True):
            attend(model.model, layer, hidden[:, at : at + count], mask[:, : at + count], cache)
        at += count
        seen = mask[:, at - count : at].bool()
        error = compare(first_outputs[-1][seen], attention_outputs["dense"][-1][seen], ATTENTION)
        assert error.ok, (count, error)
    assert stats()["sparse_mla_prefill"] == {"torch": len(STEPS)}


def _enable_recorded(model: Any, **kwargs: Any) -> tuple[engine.Part, ...]:
    """`enable`, leaving the recording attention function registered."""
    recording = AttentionInterface._global_mapping[engine.NAME]
    parts = engine.enable(model, **kwargs)
    AttentionInterface._global_mapping[engine.NAME] = recording
    return parts


def rounding(cache: Any, layer: int) -> Any:
    """transformers' own cache with keys as the pages hold them."""

    def rounded(kv: Tensor) -> Tensor:
        return layouts.unpack_kv(*layouts.pack_kv(kv.reshape(-1, 512))).view_as(kv)

    own = cache.layers[layer]
    update = own.update
    own.update = lambda k, v, *args, **kwargs: update(rounded(k), rounded(k), *args, **kwargs)
    if hasattr(own, "update_compressor_states"):
        store = own.update_compressor_states
        own.update_compressor_states = lambda name, new: store(name, rounded(new) if name == "compressor" else new)
    return cache


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_attention_over_pages(layer: int, padded: bool, attention_outputs: dict[str, list[Tensor]]) -> None:
    first, second = pair(index_topk=512)  # everything is selected, whatever the indexer's FP8 scores
    _enable_recorded(first)
    hidden = torch.randn(2, sum(STEPS), 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    mask = torch.ones(2, sum(STEPS), dtype=torch.long)
    if padded:
        mask[1, :100] = 0
    caches = [engine.packed_cache(first), rounding(DynamicCache(config=second.config), layer)]
    at = 0
    for count in STEPS:
        for model, cache in zip((first, second), caches, strict=True):
            attend(model.model, layer, hidden[:, at : at + count], mask[:, : at + count], cache)
        at += count
        seen = mask[:, at - count : at].bool()
        error = compare(attention_outputs["ours"][-1][seen], attention_outputs["dense"][-1][seen], ATTENTION)
        assert error.ok, (count, error)
    long = sum(count > 8 for count in STEPS)
    assert stats()["sparse_mla_prefill"] == {"torch": long}
    assert stats()["sparse_mla_decode"] == {"torch": len(STEPS) - long}


def _record(monkeypatch: pytest.MonkeyPatch, op: str) -> list[tuple[tuple[Any, ...], dict[str, Any], Tensor]]:
    kept = []
    function = getattr(ops, op)

    def call(*args: Any, **kwargs: Any) -> Any:
        kept.append((args, kwargs, function(*args, **kwargs)))
        return kept[-1][2]

    monkeypatch.setattr(ops, op, call)
    return kept


@pytest.mark.parametrize("packed", [False, True])
def test_indexer_of_a_layer(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the FP8 ops score, against transformers' scorer in float32 on the operands that they were given."""
    model = tiny(torch.bfloat16)
    engine.enable(model)
    prefill, paged = _record(monkeypatch, "mqa_logits"), _record(monkeypatch, "paged_mqa_logits")
    taken: list[handover.Selected] = []
    select = indexer.select
    monkeypatch.setattr(compressors, "select", lambda *a: taken.append(select(*a)) or taken[-1])
    steps = (300, 1, 3)
    hidden = torch.randn(2, sum(steps), 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    cache = engine.packed_cache(model) if packed else DynamicCache(config=model.config)
    scorer = copy.deepcopy(model.model.layers[1].self_attn.compressor.indexer.scorer).float()
    weights: list[Tensor] = []
    scorer.weights_proj.forward = lambda _: weights.pop()
    at = 0
    for count in steps:
        attend(model.model, 1, hidden[:, at : at + count], None, cache)
        at += count
        total = at // 4
        if packed and count <= 8:
            (q, pages, w, counts, table, width), _, result = paged.pop()
            assert width == total
            slots = (table.long().unsqueeze(-1) * 64 + torch.arange(64)).flatten(1)[:, :total]
            k, k_scale = layouts.read_indexer_keys(pages, slots.flatten())
            result = result.view(2, count, total)
        else:
            (q, k, k_scale, w, starts, ends), _, result = prefill.pop()
            q, counts = q.view(2, count, *q.shape[1:]), (ends - starts).view(2, count)
            assert starts.view(2, count).tolist() == [[0] * count, [total] * count]
            result = result.view(2, count, total)
        # The scorer takes weights by its projection; ours have its factors and the queries' scales in them.
        weights.append(w.view(2, count, -1) / (scorer.softmax_scale * scorer.weights_scaling**2))
        weights[-1] = weights[-1] * scorer.weights_scaling
        keys = (k.float() * k_scale.unsqueeze(-1)).view(2, total, -1)
        reference = scorer(q.float(), keys, hidden[:, at - count : at]).double()
        places = torch.arange(at - count, at)
        assert counts.tolist() == [((places + 1) // 4).tolist()] * 2
        reference.masked_fill_(torch.arange(total) >= counts.unsqueeze(-1), -torch.inf)
        error = compare(result, reference, CONTRACTS["mqa_logits"].tolerances["out"])
        assert error.ok, (count, error)
        chosen = taken.pop()
        for b in range(2):
            for row in range(count):
                n = int(chosen.count[b, row])
                assert n == min(16, int(counts[b, row]))
                best = result[b, row].topk(n).values
                picked = chosen.entries[b, row, :n].long()
                assert len(set(picked.tolist())) == n
                assert torch.equal(result[b, row, picked].sort(descending=True).values, best)
    assert not prefill
    assert not paged


def test_the_operands_of_the_indexer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is quantised is what transformers scores: its scores in float32 differ by e4m3's rounding only."""
    model = tiny(torch.bfloat16)
    hidden = torch.randn(1, 300, 64, generator=torch.Generator().manual_seed(4)).bfloat16()
    scored: list[Tensor] = []
    scorer = model.model.layers[1].self_attn.compressor.indexer.scorer
    handle = scorer.register_forward_hook(lambda module, args, out: scored.append(out))
    attend(model.model, 1, hidden, None, None)
    handle.remove()
    engine.enable(model)
    recorded = _record(monkeypatch, "mqa_logits")
    attend(model.model, 1, hidden, None, None)
    result = recorded[0][2]
    seen = torch.isfinite(result)
    reference = scored[0].view_as(result)
    assert float((result - reference)[seen].norm() / reference[seen].norm()) < 0.05


@pytest.mark.parametrize("iterations", [1, 2, 20])
@pytest.mark.parametrize("spread", [0.1, 3.0, 100.0])
def test_doubly_stochastic(iterations: int, spread: float) -> None:
    """Against transformers' loop in fp64, one-sided matrices included: the smallest sums of columns are eps."""
    logits = torch.randn(5000, 4, 4, generator=torch.Generator().manual_seed(9)) * spread
    logits[0, :, 0] += 1e4
    comb, eps = logits.double().softmax(-1) + 1e-6, 1e-6
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    torch.testing.assert_close(
        hyper_connections._doubly_stochastic(logits, eps, iterations).double(), comb, rtol=0, atol=1e-5
    )


def test_hyper_connections() -> None:
    model = tiny(torch.bfloat16)
    engine.enable(model)
    streams = torch.randn(2, 37, 4, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    for module in (model.model.layers[1].ffn_hc, model.model.hc_head):
        wide = copy.deepcopy(module).float()
        del wide.forward
        reference = wide(streams.float())
        result = module(streams)
        pairs = zip(result, reference, strict=True) if isinstance(result, tuple) else [(result, reference)]
        for got, want in pairs:
            torch.testing.assert_close(got.float(), want, rtol=2**-8, atol=1e-4)
    assert stats()["hc_prenorm_gemm"] == {"torch": 2}


@pytest.mark.parametrize("shape", [(2, 3), (1, 300)])
def test_output_projection(shape: tuple[int, int]) -> None:
    model = tiny(torch.bfloat16, o_lora_rank=200)
    module = model.model.layers[0].self_attn.o_a_proj
    x = torch.randn(*shape, 2, 1024, generator=torch.Generator().manual_seed(6)).bfloat16()
    reference = copy.deepcopy(module).double()(x.double())
    engine.enable(model)
    result = module(x).double()
    assert result.shape == reference.shape
    assert float((result - reference).norm() / reference.norm()) < 0.04  # two operands of e4m3: 2^-4 / sqrt 3 each
    # A weight that was in FP8 with a power of two for each 128 x 128 is what it was.
    values, scales = projection.quantise_weight(module)
    blocks = scales.repeat_interleave(128, 1)[:, :200].repeat_interleave(128, 2)
    module.weight.data = (values.float() * blocks).view(400, 1024).bfloat16()
    again = projection.quantise_weight(module)
    assert torch.equal(
        again[0].float() * again[1].repeat_interleave(128, 1)[:, :200].repeat_interleave(128, 2),
        values.float() * blocks,
    )


# ------------------------------------------------------------------------------------------------- the packed cache


def test_page_bytes() -> None:
    """Every byte of the pages where section 4 of the layouts puts it, the ring and the sequences included."""
    model = tiny(torch.bfloat16)
    engine.enable(model)
    cache, plain = engine.packed_cache(model), DynamicCache(config=model.config)
    hidden = torch.randn(2, 390, 64, generator=torch.Generator().manual_seed(7)).bfloat16()
    for start, stop in ((0, 370), (370, 371), (371, 374), (374, 390)):
        for each in (cache, plain):
            for layer in range(3):
                attend(model.model, layer, hidden[:, start:stop], None, each)
    total = 390
    for layer, kind in enumerate(model.config.layer_types[:3]):
        own, dense = cache.layers[layer], plain.layers[layer]
        ring = own.window.capacity
        assert ring == 192
        recent = range(total - 127, total)
        check_kv(own.window.cache, 2, 64, [position % ring for position in recent], dense.keys[:, 0])
        if kind == "sliding_attention":
            continue
        page_size, rate = (64, 4) if kind == "compressed_sparse_attention" else (2, 128)
        pages = own.compressed["compressor"]
        assert pages.length == own.entry_count["compressor"] == total // rate
        check_kv(pages.cache, 2, page_size, range(pages.length), dense.compressed_kv["compressor"])
        if kind == "compressed_sparse_attention":
            keys = dense.compressed_kv["indexer"]
            for b in range(2):
                values, scales = layouts.quantize_e4m3(keys[b].float(), 128)
                for position in range(total // rate):
                    raw, offset = page_of(own.compressed["indexer"].cache, 2, 64, position, b)
                    assert torch.equal(raw[offset * 128 :][:128], values[position].view(torch.uint8))
                    assert torch.equal(raw[64 * 128 + offset * 4 :][:4], scales[position].view(torch.uint8))
    assert cache.nbytes == sum(
        pages.cache.untyped_storage().nbytes()
        for own in cache.layers[:3]
        for pages in (own.window, *own.compressed.values())
    )


def page_of(cache: Tensor, batch: int, page_size: int, position: int, b: int) -> tuple[Tensor, int]:
    """The bytes of the page that holds a position of sequence b, and its place in it."""
    stride = cache.stride(0)
    assert stride % 576 == 0
    start = (position // page_size * batch + b) * stride
    raw = torch.empty(0, dtype=torch.uint8).set_(cache.untyped_storage())
    return raw[start : start + stride], position % page_size


def check_kv(cache: Tensor, batch: int, page_size: int, positions: Sequence[int], expected: Tensor) -> None:
    for b in range(batch):
        values, scale = layouts.quantize_e4m3(expected[b, :, :448].float(), 64)
        codes = torch.nn.functional.pad(scale.log2().int() + 127, (0, 1)).to(torch.uint8)
        rope = expected[b, :, 448:].contiguous().view(torch.uint8)
        for i, position in enumerate(positions):
            raw, offset = page_of(cache, batch, page_size, position, b)
            data = raw[offset * 576 :][:576]
            assert torch.equal(data[:448], values[i].view(torch.uint8))
            assert torch.equal(data[448:], rope[i])
            assert torch.equal(raw[page_size * 576 + offset * 8 :][:8], codes[i])


def test_pages_grow_and_reset() -> None:
    model = tiny(torch.bfloat16)
    engine.enable(model)
    cache = engine.packed_cache(model)
    layer = cache.layers[2]
    generator = torch.Generator().manual_seed(8)
    kept = [torch.randn(3, n, 512, generator=generator).bfloat16() for n in (700, 1, 900, 5000)]
    for entries in kept:
        pages = layer.append("compressor", entries, 2)
    everything = torch.cat(kept, 1)
    rounded = layouts.unpack_kv(*layouts.pack_kv(everything.flatten(0, 1))).view_as(everything)
    assert torch.equal(pages.read_kv(torch.arange(pages.length)), rounded)
    ids = tokens(1, 140)
    first = model(ids, past_key_values=cache_of(model)).logits
    used = cache_of(model)
    model(tokens(1, 150, seed=9), past_key_values=used)
    used.reset()
    assert torch.equal(model(ids, past_key_values=used).logits, first)
    with pytest.raises(DSV4Error, match="neither be reordered"):
        used.reorder_cache(torch.tensor([0]))


def cache_of(model: Any) -> Any:
    return engine.packed_cache(model)


class _Count(TorchDispatchMode):
    """How much torch dispatches, views included."""

    dispatched = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.dispatched += 1
        return func(*args, **kwargs or {})


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """The small kernels that a GPU would be given, with their arguments and constants; they do nothing."""
    kernels = importlib.import_module("dsv4_backends.engines.transformers.kernels")
    kept: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setattr(kernels, "_launch", lambda kernel, grid, where, *args, **kw: kept.append((kernel, args, kw)))
    monkeypatch.setattr(fused, "kernels_on", lambda device: kernels)
    return kept


@pytest.mark.parametrize("packed", [False, True])
def test_decoding_dispatches_much_less_than_eager_does(
    packed: bool, launches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four steps of one token, so that windows of ratio 4 end, as a GPU would see them.

    Counted is what torch dispatches, of which a view or an allocation is the cheapest and no launch at all; each small
    kernel once, though what it computes is left out here; and each op five times, as a check and a launch or two of
    Triton take about as long. What a provider does inside an op is not counted.
    """
    calls = 0
    for op in CONTRACTS:
        function = _outside(getattr(ops, op))

        def call(*args: Any, function: Callable[..., Any] = function, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(ops, op, call)
    model = tiny(torch.bfloat16)
    counts = []
    for enabled in (False, True):
        if enabled:
            engine.enable(model)
        cache = cache_of(model) if packed and enabled else DynamicCache(config=model.config)
        model(tokens(1, 140), past_key_values=cache)
        launches.clear()
        calls = 0
        with _Count() as count:
            for _ in range(4):
                model(tokens(1, 1), past_key_values=cache)
        counts.append(count.dispatched + len(launches) + 5 * calls)
    assert launches
    assert calls == 4 * (4 + 2 + 9 + 4)
    assert counts[1] < 0.6 * counts[0], counts


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_the_small_kernels_compile(
    capability: int, launches: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that a prefill and decoding launch, with either cache."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    model = tiny(torch.bfloat16)
    engine.enable(model)
    for cache in (cache_of(model), DynamicCache(config=model.config)):
        for count in (140, 1, 1, 1, 1):
            model(tokens(1, count), past_key_values=cache)
    types = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.uint8: "*u8", int: "i32", float: "fp32"}
    variants = {}
    for kernel, args, constants in launches:
        names = dict(zip(kernel.arg_names, args, strict=False))
        signature = {name: types[getattr(value, "dtype", type(value))] for name, value in names.items()}
        signature |= dict.fromkeys(constants, "constexpr")
        variants[str((kernel, signature, constants))] = ASTSource(kernel, signature, constants)
    assert {source.fn.__name__ for source in variants.values()} == {
        name for name in vars(fused.kernels_on(torch.device("cpu"))) if name.endswith("_kernel")
    }
    for source in variants.values():
        compiled = triton.compile(source, GPUTarget("cuda", capability, 32), {"enable_fp_fusion": True})
        assert compiled.asm["cubin"]


@pytest.mark.usefixtures("triton_interpreter")
def test_the_small_kernels_in_the_interpreter() -> None:
    """Triton reads the interpreter's switch when it is imported, so in a process of its own."""
    # NumPy's own words about the interpreter's arithmetic: what is then masked, and how it reads scalars.
    quiet = ["-W", "ignore:Conversion of an array", "-W", "ignore::RuntimeWarning"]
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *quiet, "tests/engines/transformers_kernels_suite.py"]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("packed", [False, True])
def test_decoding_waits_for_nothing(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step of the integration reads a value back, which on a GPU would stop the host."""
    model = tiny(torch.bfloat16)
    engine.enable(model)
    cache = cache_of(model) if packed else DynamicCache(config=model.config)
    model(tokens(2, 140), past_key_values=cache)
    for op in CONTRACTS:  # what happens inside the reference is its own matter
        monkeypatch.setattr(ops, op, _outside(getattr(ops, op)))
    with _Made() as made:
        model.model(tokens(2, 1), past_key_values=cache)
        model.model(tokens(2, 3), past_key_values=cache)
    assert not made.waits
    assert made.shapes


def _outside(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


def test_the_packed_layers_replace_nothing_in_transformers() -> None:
    model = tiny(torch.bfloat16)
    engine.enable(model)
    engine.packed_cache(model)
    assert DYNAMIC_LAYER_TYPE_MAPPING["compressed_sparse_attention"] is modeling.DeepseekV4CSACache
    assert DYNAMIC_LAYER_TYPE_MAPPING["heavily_compressed_attention"] is modeling.DeepseekV4HCACache


# ------------------------------------------------------------------------------------------ what is told and refused


def refusal(function: Callable[[], Any], code: str, match: str) -> None:
    with pytest.raises(engine.EngineError, match=match) as error:
        function()
    assert error.value.reason.code == code
    assert code in provider.REASONS


def test_parts_say_what_serves() -> None:
    model = tiny(torch.bfloat16)
    parts = {part.name: part for part in engine.enable(model)}
    assert [part.modules for part in parts.values()] == [4, 2, 9, 4]
    attention_and_mixing = {"sparse_mla_prefill", "sparse_mla_decode", "mqa_logits", "paged_mqa_logits"}
    assert {op for part in parts.values() for op in part.ops} == attention_and_mixing | {
        "fp8_einsum",
        "hc_prenorm_gemm",
    }
    model(tokens(2, 80))
    assert stats().keys() == {"sparse_mla_prefill", "mqa_logits", "hc_prenorm_gemm", "fp8_einsum"}
    engine.disable(model)
    for fp8, dtype, told in ((False, torch.bfloat16, "fp8=False"), (None, torch.float32, "float32")):
        other = tiny(dtype)
        parts = {part.name: part for part in engine.enable(other, fp8=fp8)}
        for name in ("indexer", "output projection"):
            assert parts[name].ops == ()
            assert told in str(parts[name])
            assert parts[name].reason.code in provider.REASONS
        assert (parts["attention"].reason is None) == (dtype is torch.bfloat16)
        bind.reset()
        other(tokens(2, 80))
        assert set(stats()) == {op for part in parts.values() for op in part.ops} - {"sparse_mla_decode"}


def test_a_changed_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    monkeypatch.setattr(modeling, "DeepseekV4Indexer", modeling.DeepseekV4RMSNorm)
    monkeypatch.delattr(modeling, "DeepseekV4IndexerScorer")
    sources.unknown.cache_clear()
    try:
        for function in (lambda: engine.enable(model), engine.register):
            refusal(function, "engine-source", "its DeepseekV4Indexer, DeepseekV4IndexerScorer differ from those of")
    finally:
        sources.unknown.cache_clear()
    assert "forward" not in vars(model.model.hc_head)


def test_other_models_are_refused() -> None:
    refusal(lambda: engine.enable(torch.nn.Linear(2, 2)), "engine-model", "got 'Linear'")
    refusal(lambda: engine.enable(tiny(head_dim=256)), "engine-model", "head_dim: the ops are defined for 512, got 256")
    refusal(lambda: engine.enable(tiny(torch.float16)), "engine-model", "expected bfloat16 or float32, got")
    refusal(lambda: engine.enable(tiny(), fp8=True), "engine-dtype", "this one is float32")


def test_state_is_checked() -> None:
    model = tiny(torch.bfloat16)
    refusal(lambda: engine.disable(model), "engine-state", "not enabled")
    refusal(lambda: engine.packed_cache(model), "engine-state", "not enabled")
    engine.register()
    model.set_attn_implementation(engine.NAME)  # without enable
    refusal(lambda: model(tokens(1, 9)), "engine-state", "compressors are transformers' own")
    model.set_attn_implementation("eager")
    module = model.model.hc_head
    module.forward = module.forward
    refusal(lambda: engine.enable(model), "engine-state", "forward of a DeepseekV4HyperHead")
    assert not any(isinstance(vars(m).get("forward"), replaced.Replaced) for m in model.modules())
    del module.forward
    engine.enable(model, fp8=False)
    refusal(lambda: engine.enable(model), "engine-state", "enabled already")
    refusal(lambda: engine.packed_cache(model), "engine-state", "runs without FP8")
    engine.disable(model)
    engine.enable(model)
    cache = engine.packed_cache(model)
    engine.disable(model)
    with pytest.raises(DSV4Error, match="enabled model only"):
        model(tokens(1, 9), past_key_values=cache)


def test_calls_that_are_not_served(ours: Any) -> None:
    ids = tokens(1, 9)
    with torch.enable_grad():
        refusal(lambda: ours(ids), "engine-mode", "no backward")
    own = torch.zeros(1, 1, 9, 9)
    refusal(lambda: ours(ids, attention_mask=own), "engine-mode", "a mask of the caller's own")
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    refusal(lambda: ours(ids, position_ids=packed, use_cache=False), "engine-mode", "packed sequences")
    same(ours(ids).logits, ours(ids).logits)  # and nothing is left behind


def test_a_copy_of_an_enabled_model_is_enabled(ours: Any, eager: Any) -> None:
    other = copy.deepcopy(ours)
    engine.disable(other)
    ids = tokens(1, 40)
    assert torch.equal(other(ids).logits, eager(ids).logits)
    assert not torch.equal(ours(ids).logits, eager(ids).logits)


def test_importing_the_module_imports_no_transformers() -> None:
    code = "import dsv4_backends.engines.transformers, sys; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ----------------------------------------------------------------------------------------------- what people read


def test_example(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "transformers_generate.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "sparse_mla_decode" in printed
    assert "the same bits again: True" in printed


def test_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "transformers.md").read_text(encoding="utf-8")
    source = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert source
    namespace: dict[str, Any] = {}
    for block in source:
        exec(compile(block, "docs/transformers.md", "exec"), namespace)
    printed = capsys.readouterr().out
    for promised in re.findall(r"^ *print\(.*  # (.+)$", "\n".join(source), re.MULTILINE):
        whole_line = ".*".join(re.escape(part.strip()) for part in promised.split("..."))
        assert re.search(f"^{whole_line}$", printed, re.MULTILINE), promised
    for name in re.findall(r"`engine\.(\w+)", text):
        assert hasattr(engine, name)


def test_the_benchmark_runs(capsys: pytest.CaptureFixture[str]) -> None:
    import transformers_bench as bench

    bench.child("packed", ["decode b=1", "prefill 0"], small=True)
    started, ran, failed = map(json.loads, capsys.readouterr().out.splitlines())
    assert len(started["parts"]) == 4
    assert (ran["outcome"], ran["finite"], ran["context"]) == ("ran", True, 512)
    assert {op: list(served) for op, served in ran["served"].items()}["sparse_mla_decode"] == ["torch"]
    assert failed["outcome"] == "error"  # and is told, where the others go on


# ------------------------------------------------------------------------------------------- PyTorch's settings


@contextmanager
def _set(put: Callable[[Any], None], value: Any, usual: Any) -> Iterator[None]:
    put(value)
    try:
        yield
    finally:
        put(usual)


MODEL_SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "default dtype fp64": lambda: _set(torch.set_default_dtype, torch.float64, torch.float32),
    "default dtype bf16": lambda: _set(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "precision medium": lambda: _set(torch.set_float32_matmul_precision, "medium", "highest"),
    "deterministic": lambda: _set(torch.use_deterministic_algorithms, True, False),
    "inference mode": torch.inference_mode,
}


@pytest.mark.parametrize("setting", MODEL_SETTINGS)
def test_settings_change_no_float32_model(eager: Any, ours: Any, setting: str) -> None:
    ids = tokens(1, 150)
    with MODEL_SETTINGS[setting]():
        same(ours(ids).logits, eager(ids).logits)


@pytest.mark.parametrize("setting", [*MODEL_SETTINGS, "autocast bf16"])
@pytest.mark.parametrize("packed", [False, True])
def test_settings_change_no_module_of_a_bfloat16_model(setting: str, packed: bool) -> None:
    """Every replaced module and the attention, on the inputs that they have without the setting."""
    model = tiny(torch.bfloat16)
    engine.enable(model)
    calls: list[tuple[Any, Any, tuple[Any, ...], dict[str, Any]]] = []
    for _, plan in models._replacements(model):
        function = plan.function
        if function in (hyper_connections.hyper_connection, hyper_connections.hyper_head, projection.grouped_linear):

            def kept(*args: Any, function: Any = function, **kwargs: Any) -> Any:
                found = function(*args, **kwargs)
                calls.append((function, found, args, kwargs))
                return found

            plan.function = kept
    ids = tokens(2, 150)
    cache = engine.packed_cache(model) if packed else DynamicCache(config=model.config)
    logits = model(ids, past_key_values=cache).logits
    step = model(ids[:, :1], past_key_values=cache).logits
    assert len(calls) > 10
    change = MODEL_SETTINGS.get(setting, lambda: torch.autocast("cpu", torch.bfloat16))
    with change():
        for function, found, args, kwargs in list(calls):
            plan = replaced.Replaced(function, args[0], args[1])
            again = plan(*args[2:], **kwargs)
            for a, b in zip(_all(found), _all(again), strict=True):
                if setting == "precision medium":  # fp64 instead of fp32 may round to the other neighbour
                    assert torch.allclose(a.float(), b.float(), rtol=2**-7, atol=1e-6), function.__name__
                else:
                    assert torch.equal(a, b), function.__name__
        cache = engine.packed_cache(model) if packed else DynamicCache(config=model.config)
        again = model(ids, past_key_values=cache).logits
        assert again.dtype is torch.bfloat16
        assert model(ids[:, :1], past_key_values=cache).logits.shape == step.shape
    if setting in ("deterministic", "inference mode"):  # others change what transformers' own layers do
        assert torch.equal(again, logits)


def _all(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def test_other_autocasts_are_refused(ours: Any) -> None:
    ids = tokens(1, 9)
    half = tiny(torch.bfloat16)
    engine.enable(half)
    for model, target in ((ours, torch.bfloat16), (ours, torch.float16), (half, torch.float16)):
        with torch.autocast("cpu", target):
            refusal(functools.partial(model, ids), "engine-mode", "torch.autocast to")
    with torch.autocast("cpu", torch.bfloat16):
        assert half(ids).logits.isfinite().all()


def test_a_frozen_model_is_served_in_grad_mode() -> None:
    model = tiny()
    ids = tokens(1, 9)
    engine.enable(model)
    with torch.enable_grad():
        refusal(lambda: model(ids), "engine-mode", "no backward")
        model.requires_grad_(False)
        assert not model(ids).logits.requires_grad
