"""A whole DeepSeek V4 of transformers through the layer, against transformers' own eager code.

In float32 the whole model is compared: the lists of keys, the compressors, the hand-over and the caches are then all
that differs. In bf16 every layer is compared by itself, op by op and on the same inputs: one flip of a top-k or of an
expert moves the logits of a whole random model by more than any tolerance could allow.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING
from transformers.masking_utils import create_sliding_window_causal_mask, eager_mask, sliding_window_causal_mask_function
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling
from transformers_model import tiny, tokens

from dsv4_backends import CONTRACTS, ops, provider, stats
from dsv4_backends.contract import layouts
from dsv4_backends.engines import _transformers_exact as exact
from dsv4_backends.engines import transformers as engine
from dsv4_backends.testing.numerics import compare

LENGTHS = (1, 3, 4, 5, 127, 128, 129, 255, 257, 511, 512, 513, 700)
ATTENTION = CONTRACTS["sparse_mla_prefill"].tolerances["out"]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    ops.reset()
    with torch.no_grad():
        yield
    engine._handover.take()


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

    def chunks(count: int, bytes_per_row: int) -> Iterator[slice]:
        for start in range(0, count, rows):
            yield slice(start, min(start + rows, count))

    monkeypatch.setattr(engine, "row_chunks", chunks)
    monkeypatch.setattr(exact, "row_chunks", chunks)
    monkeypatch.setattr(engine, "FLAT_ROWS", 0)
    ids = tokens(2, 150)
    mask = torch.ones_like(ids)
    mask[1, :41] = 0
    result, reference = (model(ids, attention_mask=mask).logits for model in (ours, eager))
    same(result[mask.bool()], reference[mask.bool()])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("length", [1, 126, 255, 510])
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


@pytest.mark.parametrize("length", [60, 260, 520])
def test_generate(eager: Any, ours: Any, length: int) -> None:
    ids = tokens(2, length, seed=length)
    mask = torch.ones_like(ids)
    mask[0, :33] = 0
    kwargs: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **kwargs), eager.generate(ids, **kwargs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_disable_gives_back_the_same_bits(dtype: torch.dtype) -> None:
    model = tiny(dtype)
    ids = tokens(2, 300)
    before, state = model(ids).logits, copy.deepcopy(model.state_dict())
    engine.enable(model)
    assert not torch.equal(model(ids).logits, before)  # it was in
    engine.disable(model)
    assert torch.equal(model(ids).logits, before)
    assert model.config._attn_implementation == "eager"
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class _Largest(TorchDispatchMode):
    """The largest number of elements in a tensor that a call makes."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor._base is None and 0 not in tensor.stride():
                self.size = max(self.size, tensor.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_size_queries_by_keys(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    length = 4096
    monkeypatch.setattr(exact, "CHUNK_BYTES", 2**20)
    monkeypatch.setattr("dsv4_backend_torch.memory.CHUNK_BYTES", 2**20)
    model = tiny(dtype, num_attention_heads=2, o_groups=1, index_n_heads=8)
    hidden = torch.randn(1, length, 64, generator=torch.Generator().manual_seed(0)).to(dtype)

    def largest() -> int:
        sizes = []
        for layer in range(model.config.num_hidden_layers):
            with _Largest() as largest:
                attend(model.model, layer, hidden, None, None)
            sizes.append(largest.size)
        return max(sizes)

    linear = length * 2 * 512  # the queries themselves, which eager attention has too
    engine.enable(model)
    assert largest() <= linear
    assert linear < length * length // 2
    engine.disable(model)
    assert largest() >= length * length


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
        out, weights = engine._attention(*args, **kwargs)
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
    for name, function, mask in ((engine.NAME, ours, engine._window), ("dense", dense, eager_mask)):
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
    taken: list[engine._Selected] = []
    select = engine._select
    monkeypatch.setattr(engine, "_select", lambda *a: taken.append(select(*a)) or taken[-1])
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
            (q, k, k_scale, w, starts, ends), kwargs, result = prefill.pop()
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


def test_hyper_connections() -> None:
    model = tiny(torch.bfloat16)
    engine.enable(model)
    streams = torch.randn(2, 37, 4, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    for module in (model.model.layers[1].ffn_hc, model.model.hc_head):
        wide = copy.deepcopy(module).double()
        del wide.forward
        monkey = torch.nn.functional.linear  # transformers casts to float32 on the way
        assert monkey is not None
        reference = wide.float()(streams.float())
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
    values, scales = engine._quantise_weight(module)
    blocks = scales.repeat_interleave(128, 1)[:, :200].repeat_interleave(128, 2)
    module.weight.data = (values.float() * blocks).view(400, 1024).bfloat16()
    again = engine._quantise_weight(module)
    assert torch.equal(again[0].float() * again[1].repeat_interleave(128, 1)[:, :200].repeat_interleave(128, 2),
                       values.float() * blocks)
