"""Hugging Face transformers' DeepSeek V4 on the ops: ``enable(model)``, ``disable(model)``, ``packed_cache(model)``.

transformers attends eagerly: a dense mask over every key, and every key copied for every head. Here the attention gets
lists of keys instead. A query sees its window and, in a compressing layer, the compressed keys that the indexer or
causality leaves it; its row of the list names them, compressed ones first, all valid ones together. Nothing of the
size [queries, keys] is made: long calls go in chunks of rows.

Attention comes in by transformers' own ``AttentionInterface`` and ``AttentionMaskInterface``, under the name
``dsv4_backends``. The parts that have no registry (the compressors with the indexer, the hyper-connections, the grouped
output projection) are replaced by an instance's ``forward``, which ``disable`` takes away again.

A decode step is bound by the host, which launches thousands of kernels of a few numbers each. So what all layers of a
call need alike is made once, and chains of small steps are kernels of their own (``_transformers_kernels.py``).

bf16 tensors go through ``dsv4_backends.ops``. A float32 model runs the same lists through plain torch (see
``_transformers_exact.py``): the ops take bf16, and transformers' eager model in float32 is the oracle for the lists.

What is replaced is known by its source text. A transformers in which it reads differently is refused.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..contract import layouts
from ..contract.settings import without_autocast
from ..contract.sparse_mla.meaning import HEAD_DIM, MAX_HEADS
from ..errors import DSV4Error
from ..selection.provider import Reason
from . import _transformers_choice as choice
from . import _transformers_exact as exact
from ._transformers_choice import FEW_TOKENS
from ._transformers_exact import row_chunks

NAME = "dsv4_backends"
"""The ``attn_implementation``."""

FLAT_ROWS = 4096
"""Up to this many rows, the sequences of a batch share one call; beyond, each has its own and no query is copied."""

_SOURCES = {
    "models.deepseek_v4.modeling_deepseek_v4": {
        "apply_rotary_pos_emb": "d938fef910b008b2",
        "eager_attention_forward": "3cb759e14962bed1",
        "DeepseekV4Attention": "7488877da3dee472",
        "DeepseekV4CSACache": "96bb30b6ea13bf71",
        "DeepseekV4CSACompressor": "d2ca031682522c3a",
        "DeepseekV4DecoderLayer": "b88513b6cbf223d8",
        "DeepseekV4GroupedLinear": "7ac7c14125c7fe86",
        "DeepseekV4HCACache": "cc8e4ac64a08e3fa",
        "DeepseekV4HCACompressor": "6ae7fd0c744b3a24",
        "DeepseekV4HyperConnection": "1ba448fb49c686ec",
        "DeepseekV4HyperHead": "517a2c661313e80c",
        "DeepseekV4Indexer": "f9ce58af472da7b8",
        "DeepseekV4IndexerScorer": "e80cbb0e2d1871c3",
        "DeepseekV4Model": "7261474fabd1aedd",
    },
    "masking_utils": {
        "create_sliding_window_causal_mask": "1df4553adac5b299",
        "_preprocess_mask_arguments": "df23eb733c6e49fa",
    },
    "cache_utils": {"DynamicSlidingWindowLayer": "ea27db942c137843"},
}
"""What the integration replaces or relies on, with a digest of its source as transformers 5.17.0 has it."""
_TESTED = "5.17.0"


def _quantise(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """``layouts.quantize_e4m3``."""
    kernels = choice.kernels_for(x, block) if x.shape[-1] % block == 0 else None
    return layouts.quantize_e4m3(x, block) if kernels is None else kernels.quantise(x.contiguous(), block)


def _cut(x: Tensor, *slices: slice) -> Tensor:
    """``x[slices]``, which costs nothing where it is all of x."""
    whole = all(part == slice(0, size) for part, size in zip(slices, x.shape, strict=False))
    return x if whole else x[slices]


class EngineError(DSV4Error, RuntimeError):
    """The integration does not serve this; ``reason`` says why."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(f"{reason} [{reason.code}]")
        self.reason = reason


@dataclass(frozen=True)
class Part:
    """What became of one part of a model.

    Attributes:
        name: The part.
        ops: The ops that serve it now; none where ``reason`` is given.
        modules: How many modules of the model belong to it.
        reason: Why no op serves it.
    """

    name: str
    ops: tuple[str, ...]
    modules: int
    reason: Reason | None = None

    def __str__(self) -> str:
        served = ", ".join(self.ops) if self.reason is None else f"no op: {self.reason} [{self.reason.code}]"
        return f"{self.name} ({self.modules} modules): {served}"


# ------------------------------------------------------------------------------------------------ what is known


def _digest(module: str, name: str) -> str:
    try:
        source = inspect.getsource(getattr(importlib.import_module(f"transformers.{module}"), name))
    except (ImportError, AttributeError, OSError, TypeError):
        return "missing"
    return hashlib.sha256(source.encode()).hexdigest()[:16]


@functools.cache
def _unknown() -> Reason | None:
    """Why this transformers is not one that the integration knows."""
    try:
        import transformers
        from transformers.models import deepseek_v4  # noqa: F401
    except ImportError as error:
        return Reason("engine-source", f"transformers with DeepSeek V4 cannot be imported: {error}", _hint())
    changed = [
        name for module, names in _SOURCES.items() for name, known in names.items() if _digest(module, name) != known
    ]
    if changed:
        told = f"transformers {transformers.__version__} is not known: its {', '.join(changed)} differ"
        return Reason("engine-source", f"{told} from those of {_TESTED}", _hint())
    return None


def _hint() -> str:
    return f"pip install transformers=={_TESTED}"


def _check_model(model: Any) -> None:
    if (reason := _unknown()) is not None:
        raise EngineError(reason)
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4PreTrainedModel

    if not isinstance(model, DeepseekV4PreTrainedModel):
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise EngineError(Reason("engine-model", f"expected a DeepSeek V4 model of transformers, got {kind!r}"))
    config = model.config
    if config.head_dim != HEAD_DIM:
        raise EngineError(
            Reason("engine-model", f"head_dim: the ops are defined for {HEAD_DIM}, got {config.head_dim}")
        )
    if not 1 <= config.num_attention_heads <= MAX_HEADS:
        message = f"num_attention_heads: expected 1 to {MAX_HEADS}, got {config.num_attention_heads}"
        raise EngineError(Reason("engine-model", message))
    if (dtype := _dtype(model)) not in (torch.bfloat16, torch.float32):
        raise EngineError(Reason("engine-model", f"dtype: expected bfloat16 or float32, got {dtype}"))


def _dtype(model: Any) -> torch.dtype:
    dtype: torch.dtype = model.get_input_embeddings().weight.dtype
    return dtype


# ------------------------------------------------------------------------------------------- enable and disable


@dataclass(frozen=True)
class _Mode:
    fp8: bool
    previous: str  # the attention implementation before


class _Replaced:
    """An instance's ``forward``, found again by its type."""

    def __init__(self, function: Callable[..., Any], module: nn.Module, mode: _Mode, *state: Any) -> None:
        self.function, self.module, self.mode, self.state = function, module, mode, state

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            _refuse_gradients(*args, *kwargs.values(), *self.module.parameters(recurse=False))
        with without_autocast():
            return self.function(self.module, self.mode, *self.state, *args, **kwargs)


def _refuse_gradients(*values: Any) -> None:
    if any(isinstance(value, Tensor) and value.requires_grad for value in values):
        raise EngineError(Reason("engine-mode", "the ops have no backward", "use torch.no_grad()"))


def _refuse_autocast(device: torch.device, dtype: torch.dtype) -> None:
    """Autocast casts in transformers' own layers: harmless to the model's own dtype, to another a mix of both."""
    if not torch.is_autocast_enabled(device.type):
        return
    if (target := torch.get_autocast_dtype(device.type)) is dtype is torch.bfloat16:
        return
    told = f"torch.autocast to {target} is on and the model is {dtype}: served are a bfloat16 model under autocast to"
    raise EngineError(Reason("engine-mode", f"{told} bfloat16, and any model without autocast", "leave torch.autocast"))


def register() -> None:
    """Make ``attn_implementation="dsv4_backends"`` known to transformers, for models that are loaded with it.

    Raises:
        EngineError: a transformers that the integration does not know.
    """
    if (reason := _unknown()) is not None:
        raise EngineError(reason)
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _window)


def enable(model: Any, *, fp8: bool | None = None) -> tuple[Part, ...]:
    """Let the ops serve a DeepSeek V4 model of transformers, in place.

    Args:
        model: A ``DeepseekV4ForCausalLM`` or ``DeepseekV4Model`` in bfloat16, or in float32 (then no op serves it),
            with its weights, on its device.
        fp8: Whether FP8 ops serve the indexer and the output projection, whose weights are then quantised in blocks
            of 128 x 128 (exact for weights that came from such a checkpoint). Default: for bfloat16 models.

    Returns:
        What serves each part of the model, or why no op does.

    Raises:
        EngineError: a transformers or model that the integration does not know, a model that is enabled already, a
            module whose ``forward`` somebody else has replaced, or ``fp8`` for a float32 model.
    """
    _check_model(model)
    bf16 = _dtype(model) is torch.bfloat16
    if fp8 and not bf16:
        raise EngineError(Reason("engine-dtype", "the FP8 ops serve bfloat16 models, this one is float32"))
    fp8 = bf16 if fp8 is None else fp8
    if _enabled(model) is not None:
        raise EngineError(Reason("engine-state", "the model is enabled already", "disable(model) first"))
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

    register()
    mode = _Mode(fp8, model.config._attn_implementation)
    plans: list[_Replaced] = []
    functions: dict[type, Callable[..., Any]] = {
        modeling.DeepseekV4HCACompressor: _compress_heavily,
        modeling.DeepseekV4CSACompressor: _compress_and_select,
        modeling.DeepseekV4HyperConnection: _hyper_connection,
        modeling.DeepseekV4HyperHead: _hyper_head,
    }
    for module in model.modules():
        if (function := functions.get(type(module))) is not None:
            plans.append(_Replaced(function, module, mode))
        elif type(module) is modeling.DeepseekV4GroupedLinear and fp8 and module.weight.dtype is torch.bfloat16:
            plans.append(_Replaced(_grouped_linear, module, mode, *_quantise_weight(module)))
    for plan in plans:
        if "forward" in vars(plan.module):
            kind = type(plan.module).__name__
            raise EngineError(Reason("engine-state", f"the forward of a {kind} has been replaced by somebody else"))
    for plan in plans:
        plan.module.forward = plan
    model.set_attn_implementation(NAME)
    return _parts(model, mode, modeling)


def _parts(model: nn.Module, mode: _Mode, modeling: Any) -> tuple[Part, ...]:
    def count(*kinds: type) -> int:
        return sum(type(module) in kinds for module in model.modules())

    float32 = None
    if _dtype(model) is not torch.bfloat16:
        float32 = Reason("engine-dtype", "the ops take bfloat16, the model is float32: plain torch serves")
    unquantised = float32 or (None if mode.fp8 else Reason("engine-dtype", "fp8=False: plain torch serves"))
    own = "transformers' own code serves"
    projections = [m for m in model.modules() if "GroupedLinear" in type(m).__name__]
    replaced = [m for m in projections if isinstance(vars(m).get("forward"), _Replaced)]
    projection = None
    if float32 is not None or not mode.fp8:
        projection = Reason("engine-dtype", f"{'fp8=False' if float32 is None else 'the model is float32'}: {own}")
    elif len(replaced) < len(projections):
        kind = type(next(m for m in projections if m not in replaced)).__name__
        projection = Reason("engine-dtype", f"{kind} holds no bfloat16 weight: {own}")

    def part(name: str, served: tuple[str, ...], modules: int, reason: Reason | None) -> Part:
        return Part(name, served if reason is None else (), modules, reason)

    connections = count(modeling.DeepseekV4HyperConnection, modeling.DeepseekV4HyperHead)
    return (
        part("attention", ("sparse_mla_prefill", "sparse_mla_decode"), count(modeling.DeepseekV4Attention), float32),
        part("indexer", ("mqa_logits", "paged_mqa_logits"), count(modeling.DeepseekV4Indexer), unquantised),
        part("hyper-connections", ("hc_prenorm_gemm",), connections, float32),
        part("output projection", ("fp8_einsum",), len(projections), projection),
    )


def _replacements(model: nn.Module) -> Iterator[tuple[nn.Module, _Replaced]]:
    for module in model.modules():
        if isinstance(plan := vars(module).get("forward"), _Replaced):
            yield module, plan


def _enabled(model: nn.Module) -> _Mode | None:
    return next((plan.mode for _, plan in _replacements(model)), None)


def disable(model: Any) -> None:
    """Take the integration out of a model: it computes what it computed before, to the bit.

    Raises:
        EngineError: the model is not enabled.
    """
    if (mode := _enabled(model)) is None:
        raise EngineError(Reason("engine-state", "the model is not enabled"))
    for module, _ in list(_replacements(model)):
        del module.forward
    model.set_attn_implementation(mode.previous)


def packed_cache(model: Any) -> Any:
    """An empty cache of FP8 pages for an enabled model, to be passed as ``past_key_values``.

    Keys are stored as the contract's pages (584 bytes, indexer keys 132), and calls with up to 8 tokens read them by
    ``sparse_mla_decode`` and ``paged_mqa_logits``. It can be filled and reset, neither reordered nor cropped.

    Raises:
        EngineError: the model is not enabled, or not with ``fp8``.
    """
    mode = _enabled(model)
    if mode is None or not mode.fp8:
        told = "is not enabled" if mode is None else "runs without FP8"
        raise EngineError(Reason("engine-state", f"a packed cache needs an enabled model with fp8, this one {told}"))
    from ._transformers_cache import PackedCache

    return PackedCache(model.config, _hand_over_pages)


# ----------------------------------------------------------------------- from the compressor to the attention


@dataclass(frozen=True)
class _Window:
    """What stands in for the mask: where the queries are among the window keys, and which keys are padding.

    Attributes:
        batch, q_length, kv_length: Sequences, queries, and window keys that this call sees.
        q_offset, kv_offset: Place in the sequence of the first query and of the first window key.
        padding: bool ``[batch, places]``, False for padding, or None.
        memo: Lists that several layers share.
    """

    batch: int
    q_length: int
    kv_length: int
    q_offset: int
    kv_offset: int
    padding: Tensor | None
    device: torch.device
    memo: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]


@dataclass(frozen=True)
class _Selected:
    """The compressed keys that each query sees: the first ``count`` of its ``entries``.

    Attributes:
        count: int32 ``[batch or 1, S]``.
        width: Most that a query can see.
        entries: int32 ``[batch, S, width]``; None where entry j is j.
        key: Names count and width among those of one call, for what layers share.
    """

    count: Tensor
    width: int
    entries: Tensor | None
    key: Any


class _HandOver(threading.local):
    """transformers hands neither the selection nor the cache to the attention function. Each is left here by the
    module that runs just before it, and taken at once. The window of the call under way is found here by modules that
    get no mask; only the call itself keeps it."""

    selected: _Selected | None = None
    pages: Any = None
    window: weakref.ref[_Window] | None = None

    def take(self) -> tuple[_Selected | None, Any]:
        taken = self.selected, self.pages
        self.selected = self.pages = None
        return taken


_handover = _HandOver()


def _hand_over_pages(layer: Any) -> None:
    _handover.pages = layer


def _once(key: Any, positions: Tensor, make: Callable[[], Any]) -> Any:
    """``make()``, what follows from ``key`` and the call's positions: one for all layers that are given these."""
    window = None if _handover.window is None else _handover.window()
    if window is None:
        return make()
    # By identity: a layer on another device has positions of its own. Kept, so that no other tensor takes their id.
    return window.once((key, id(positions)), lambda: (make(), positions))[0]


def _window(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    device: Any = "cpu",
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> _Window:
    """transformers' mask function: no mask, but what it would have said."""
    _handover.take()  # what a call that raised may have left
    _refuse_autocast(torch.device(device), dtype)
    if not allow_is_causal_skip:
        raise EngineError(
            Reason("engine-mode", "packed sequences and custom mask functions are not served", "use attn 'eager'")
        )
    if not isinstance(q_offset, int):
        raise EngineError(Reason("engine-mode", "static caches are not served", "use a dynamic or a packed cache"))
    if attention_mask is not None and (short := kv_offset + kv_length - attention_mask.shape[-1]) > 0:
        attention_mask = nn.functional.pad(attention_mask, (0, short), value=False)
    window = _Window(batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask, torch.device(device))
    _handover.window = weakref.ref(window)
    return window


def _sequences(batch: int, length: int) -> list[slice]:
    """The sequences that share a call: all of them, or each its own."""
    if batch == 1 or length == 1 or batch * length <= FLAT_ROWS:
        return [slice(0, batch)]
    return [slice(b, b + 1) for b in range(batch)]


# ------------------------------------------------------------------------------------------------- the attention


def _window_places(window: _Window, size: int, rows: slice) -> tuple[Tensor, Tensor]:
    """The first window key of each query, counted from the call's first, and how many there are: int32 ``[n]``."""
    first = window.q_offset - window.kv_offset
    own = torch.arange(first + rows.start, first + rows.stop, device=window.device, dtype=torch.int32)
    begin = (own - (size - 1)).clamp_(min=0)
    return begin, own - begin + 1


def _hide_padding(window: _Window, index: Tensor, sequences: slice) -> Tensor:
    """-1 for window keys ``[b or 1, n, k]`` that are padding; other values stay."""
    if window.padding is None:
        return index
    visible = window.padding[sequences, window.kv_offset : window.kv_offset + window.kv_length]
    index = index.expand(len(visible), -1, -1)
    place = index.clamp(0, window.kv_length - 1).flatten(1).long()
    hidden = ~visible.gather(1, place).view(index.shape) & (index >= 0) & (index < window.kv_length)
    return index.masked_fill(hidden, -1)


def _frame(
    window: _Window, selected: _Selected | None, size: int, sequences: slice, rows: slice
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``_lists`` but for the compressed keys, which stand where the mask ``[b or 1, n, k]`` says."""
    begin, seen = _window_places(window, size, rows)
    width = min(size, window.kv_length)
    if selected is None:
        columns = torch.arange(width, device=window.device, dtype=torch.int32)
        index = torch.where(columns < seen.unsqueeze(-1), begin.unsqueeze(-1) + columns, -1).unsqueeze(0)
        return _hide_padding(window, index, sequences), seen.unsqueeze(0), None
    several = len(selected.count) > 1
    count = _cut(selected.count, sequences if several else slice(0, 1), rows).unsqueeze(-1)
    columns = torch.arange(selected.width + width, device=window.device, dtype=torch.int32)
    after = columns - count
    index = torch.where((after >= 0) & (after < seen.unsqueeze(-1)), after + begin.unsqueeze(-1), -1)
    return _hide_padding(window, index, sequences), count.squeeze(-1) + seen, after < 0


def _lists(
    window: _Window, selected: _Selected | None, size: int, sequences: slice, rows: slice
) -> tuple[Tensor, Tensor]:
    """Which keys the queries see, as rows of ``[window keys, compressed keys]`` of their sequence.

    Returns:
        int32 ``[b or 1, n, k]``: compressed keys, then window keys, then -1; padding is -1 where it stands.
        int32 ``[b or 1, n]``: where the last ones begin.
    """
    make = functools.partial(_frame, window, selected, size, sequences, rows)
    if selected is None:
        return make()[:2]
    key = "frame", selected.key, sequences.start, rows.start
    small = window.q_length <= FEW_TOKENS  # enough to be kept for the layers to come
    index, lengths, compressed = window.once(key, make) if small else make()
    assert compressed is not None
    if selected.entries is None:
        entries = torch.arange(index.shape[-1], device=window.device, dtype=torch.int32)
    else:
        entries = nn.functional.pad(_cut(selected.entries, sequences, rows), (0, index.shape[-1] - selected.width))
    return torch.where(compressed, entries + window.kv_length, index), lengths


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query ``[B, H, S, 512]``, key ``[B, 1, T, 512]`` -> ``[B, S, H, 512]``."""
    window = attention_mask
    selected, pages = _handover.take()
    if not isinstance(window, _Window):
        told = "a mask of the caller's own is not served" if window is not None else "no mask was made"
        raise EngineError(Reason("engine-mode", told, "pass a mask [batch, places], or none"))
    if module.compressor is not None and selected is None:
        raise EngineError(Reason("engine-state", "the model's compressors are transformers' own", "enable(model)"))
    if dropout:
        raise EngineError(Reason("engine-mode", "the ops have no dropout", "use model.eval()"))
    if torch.is_grad_enabled():
        _refuse_gradients(query, key, module.sinks)
    sinks: Tensor = module.sinks.float()  # type: ignore[assignment]
    size: int = module.sliding_window  # type: ignore[assignment]
    with without_autocast():
        if pages is not None:
            return _attend_pages(pages, query, window, selected, size, scaling, sinks), None
        return _attend(query, key, window, selected, size, scaling, sinks), None


def _attend(
    query: Tensor, key: Tensor, window: _Window, selected: _Selected | None, size: int, scaling: float, sinks: Tensor
) -> Tensor:
    """Attention over keys in memory."""
    batch, heads, length, _ = query.shape
    attend: Callable[..., Any] = ops.sparse_mla_prefill
    if query.dtype is not torch.bfloat16:
        attend = exact.sparse_mla_prefill
    out = torch.empty((batch, length, heads, HEAD_DIM), dtype=query.dtype, device=query.device)
    width = min(size, window.kv_length) + (0 if selected is None else selected.width)
    for sequences in _sequences(batch, length):
        together = sequences.stop - sequences.start
        keys = _cut(key, sequences).to(query.dtype).reshape(-1, HEAD_DIM)
        for rows in row_chunks(length, 4 * width * together):
            make = functools.partial(_flat_lists, window, selected, size, sequences, rows, key.shape[2])
            if (selected is None or selected.entries is None) and rows == slice(0, length):
                shared = None if selected is None else selected.key
                index, lengths = window.once(("lists", shared, sequences.start), make)
            else:
                index, lengths = make()
            attend(
                _cut(query.transpose(1, 2), sequences, rows).flatten(0, 1),
                keys,
                index,
                scaling,
                attn_sink=sinks,
                topk_length=lengths,
                out=_cut(out, sequences, rows).view(-1, heads, HEAD_DIM),
            )
    return out


def _flat_lists(
    window: _Window, selected: _Selected | None, size: int, sequences: slice, rows: slice, keys: int
) -> tuple[Tensor, Tensor]:
    """``_lists`` with the rows of all sequences in one dimension, whose keys follow each other, ``keys`` of each."""
    index, lengths = _lists(window, selected, size, sequences, rows)
    together = sequences.stop - sequences.start
    if together > 1:
        offsets = torch.arange(together, device=index.device, dtype=torch.int32) * keys
        index = torch.where(index < 0, -1, index + offsets.view(-1, 1, 1))
    return index.flatten(0, 1), lengths.expand(together, -1).contiguous().view(-1)


def _attend_pages(
    layer: Any,
    query: Tensor,
    window: _Window,
    selected: _Selected | None,
    size: int,
    scaling: float,
    sinks: Tensor,
) -> Tensor:
    """Attention of a few tokens over a packed layer's pages."""
    batch, _, length, _ = query.shape
    everything = slice(0, batch), slice(0, length)

    def window_slots() -> Tensor:
        # A list of window keys alone, turned from the call's first key to places in the ring.
        index, _ = _lists(window, None, size, *everything)
        places = torch.where(index < 0, -1, (index + window.kv_offset) % layer.window.capacity)
        slots: Tensor = layer.window.slots(places)
        return slots

    extra: dict[str, Any] = {}
    if selected is not None and selected.width > 0:
        compressed = layer.compressed["compressor"]

        def seen() -> tuple[Tensor, Tensor]:
            columns = torch.arange(selected.width, device=query.device, dtype=torch.int32)
            return columns, columns < selected.count.unsqueeze(-1)

        def compressed_slots() -> Tensor:
            columns, visible = window.once(("seen", selected.key), seen)
            entries = columns if selected.entries is None else selected.entries
            slots: Tensor = compressed.slots(torch.where(visible, entries, -1))
            return slots

        shared = selected.entries is None
        slots = window.once(("slots", selected.key), compressed_slots) if shared else compressed_slots()
        extra = {"extra_k_cache": compressed.cache, "extra_indices": slots}
    out, _ = ops.sparse_mla_decode(
        query.transpose(1, 2),
        layer.window.cache,
        window.once("slots", window_slots),
        scaling,
        attn_sink=sinks,
        **extra,
    )
    return out


# ----------------------------------------------------------------------------------- the compressors and the indexer


def _angles(module: Any, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of RoPE at positions ``[B, n]``: ``[B, n, r / 2]`` in the dtype of x."""
    cos, sin = module.rotary_emb(x, position_ids=positions, layer_type=module.rope_layer_type)
    return cos.contiguous(), sin.contiguous()


def _rotate(x: Tensor, angles: tuple[Tensor, Tensor], unsqueeze_dim: int) -> Tensor:
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import apply_rotary_pos_emb

    rotated: Tensor = apply_rotary_pos_emb(x, *angles, unsqueeze_dim=unsqueeze_dim)
    return rotated


def _new_entries(module: Any, cache: Any, name: str, hidden: Tensor, position_ids: Tensor, *, overlap: bool) -> Tensor:
    """The compressed keys ``[B, n, d]`` of the windows that this call completes."""
    batch, rate, d = len(hidden), module.compress_rate, module.head_dim
    kv, gate, start = module.kv_proj(hidden), module.gate_proj(hidden), 0
    if cache is None:
        usable = kv.shape[1] // rate * rate
        kv, gate = kv[:, :usable], gate[:, :usable]
    else:
        kv, gate, start = cache.store_compression_weights(name, kv, gate)
    count = kv.shape[1] // rate
    if count == 0:
        return hidden.new_zeros((batch, 0, d), dtype=kv.dtype)
    kv = kv.reshape(batch, count, rate, -1)
    gate = gate.reshape(batch, count, rate, -1) + module.position_bias
    if overlap:
        # A window is compressed with the one before it: the first d channels speak for the next window, the others
        # for their own. The very first window has nothing before it, which weighs nothing.
        before = None, None
        if cache is not None:
            before = cache.update_overlap_state(name, kv, gate, d)
        kv = torch.cat([_shifted(kv[..., :d], before[0], 0.0), kv[..., d:]], 2)
        gate = torch.cat([_shifted(gate[..., :d], before[1], -torch.inf), gate[..., d:]], 2)
    share = gate.softmax(dim=2, dtype=torch.float32).to(kv.dtype)
    compressed = module.kv_norm((kv * share).sum(2))

    def angles() -> tuple[Tensor, Tensor]:
        positions = torch.arange(count, device=hidden.device) * rate + start
        return _angles(module, compressed, positions.expand(batch, -1))

    return _rotate(compressed.unsqueeze(1), _once(("entries", rate, start, count), position_ids, angles), 1).squeeze(1)


def _shifted(x: Tensor, before: Tensor | None, fill: float) -> Tensor:
    """``[B, n, rate, d]`` moved one window on; ``before`` ``[B, rate, d]`` comes first."""
    first = x.new_full((len(x), 1, *x.shape[2:]), fill) if before is None else before.unsqueeze(1).to(x.dtype)
    return torch.cat([first, x[:, :-1]], 1)


def _counts(position_ids: Tensor, rate: int, entries: int) -> Tensor:
    """How many of ``entries`` each query may see: those of the windows that end at its place or before."""
    return ((position_ids + 1) // rate).clamp_(max=entries).to(torch.int32)


def _store(
    module: nn.Module, cache: Any, hidden: Tensor, position_ids: Tensor, layer_type: str, *, overlap: bool
) -> tuple[Tensor, int]:
    """Compress and store. Returns the keys ``[B, T, 512]`` to attend to (none where the pages are read) and T."""
    from ._transformers_cache import COMPRESSED_PAGE, DIRECT_TOKENS

    entries = _new_entries(module, cache, "compressor", hidden, position_ids, overlap=overlap)
    if cache is None:
        return entries, entries.shape[1]
    if not hasattr(cache, "append"):
        entries = cache.update_compressor_states("compressor", entries)
        return entries, entries.shape[1]
    pages = cache.append("compressor", entries, COMPRESSED_PAGE[layer_type])
    cache.entry_count["compressor"] = pages.length
    if hidden.shape[1] <= DIRECT_TOKENS:
        return entries[:, :0], pages.length
    everything = torch.arange(pages.length, device=hidden.device)
    return pages.read_kv(everything).to(entries.dtype), pages.length


def _layer(past_key_values: Any, layer_idx: int) -> Any:
    return None if past_key_values is None else past_key_values.layers[layer_idx]


def _compress_heavily(
    self: nn.Module,
    mode: _Mode,
    hidden_states: Tensor,
    q_residual: Tensor,
    position_ids: Tensor,
    past_key_values: Any,
    layer_idx: int,
) -> tuple[Tensor, None]:
    """``DeepseekV4HCACompressor.forward``: a query sees every compressed key of a window that has ended."""
    cache = _layer(past_key_values, layer_idx)
    keys, total = _store(self, cache, hidden_states, position_ids, "heavily_compressed_attention", overlap=False)
    rate: int = self.compress_rate  # type: ignore[assignment]

    def counts() -> Tensor:
        if position_ids.shape[1] == 1:
            # transformers masks nothing for a single query, so padding on the left shifts what it sees. So here.
            return torch.full((1, 1), total, dtype=torch.int32, device=keys.device)
        return _counts(position_ids, rate, total)

    key = rate, total, "heavily"
    _handover.selected = _Selected(_once(key, position_ids, counts), total, None, key)
    return keys.unsqueeze(1), None


def _compress_and_select(
    self: nn.Module,
    mode: _Mode,
    hidden_states: Tensor,
    q_residual: Tensor,
    position_ids: Tensor,
    past_key_values: Any,
    layer_idx: int,
) -> tuple[Tensor, None]:
    """``DeepseekV4CSACompressor.forward``: a query sees the compressed keys that the indexer scores highest."""
    cache = _layer(past_key_values, layer_idx)
    keys, _ = _store(self, cache, hidden_states, position_ids, "compressed_sparse_attention", overlap=True)
    _handover.selected = _select(self.indexer, mode, cache, hidden_states, q_residual, position_ids)
    return keys.unsqueeze(1), None


def _select(
    indexer: Any, mode: _Mode, cache: Any, hidden: Tensor, q_residual: Tensor, position_ids: Tensor
) -> _Selected:
    """The ``index_topk`` best compressed keys of each query."""
    from ._transformers_cache import COMPRESSED_PAGE

    batch, length, _ = hidden.shape
    keys = _new_entries(indexer, cache, "indexer", hidden, position_ids, overlap=True)
    pages = None
    if cache is not None and hasattr(cache, "append"):
        pages = cache.append("indexer", keys, COMPRESSED_PAGE["compressed_sparse_attention"])
        cache.entry_count["indexer"] = total = pages.length
    else:
        keys = keys if cache is None else cache.update_compressor_states("indexer", keys)
        total = keys.shape[1]
    topk = min(indexer.index_topk, total)
    key = indexer.compress_rate, total, topk

    def counts() -> tuple[Tensor, Tensor]:
        count = _counts(position_ids, indexer.compress_rate, total)
        return count.expand(batch, -1).contiguous(), count.clamp(max=topk)

    count, taken = _once(key, position_ids, counts)
    if total <= topk:  # no need to score what is all selected
        return _Selected(taken, total, None, key)
    score = _scorer(mode, cache, keys, pages, key, total, position_ids)
    positions = position_ids.expand(batch, -1)
    entries = torch.empty((batch, length, topk), dtype=torch.int32, device=hidden.device)
    for sequences in _sequences(batch, length):
        together = sequences.stop - sequences.start
        for rows in row_chunks(length, 4 * total * together):
            here = sequences, rows
            if together == batch and rows == slice(0, length):
                angles = _once("queries", position_ids, lambda: _angles(indexer, hidden, positions))
            else:
                angles = _angles(indexer, hidden, positions[here])
            q, weights = _queries(indexer, mode, _cut(hidden, *here), _cut(q_residual, *here), angles)
            scores = score(sequences, q, weights, _cut(count, *here))
            # Best first, so that -inf, which no count reaches, comes last.
            _cut(entries, *here).copy_(scores.topk(topk, dim=-1).indices.view(together, -1, topk))
    return _Selected(taken, topk, entries, key)


def _queries(
    indexer: Any, mode: _Mode, hidden: Tensor, q_residual: Tensor, angles: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The rotated queries ``[b, n, h, d]``, in e4m3 for the ops, and their weights, fp32 ``[b, n, h]``."""
    q = indexer.q_b_proj(q_residual).unflatten(-1, (-1, indexer.head_dim))
    weights = indexer.scorer.weights_proj(hidden)
    factor = indexer.scorer.softmax_scale * indexer.scorer.weights_scaling
    if mode.fp8 and (kernels := choice.kernels_for(q, q.shape[-1])) is not None:
        queries: tuple[Tensor, Tensor] = kernels.indexer_queries(q, *angles, weights, factor)
        return queries
    q = _rotate(q, angles, 2)
    weights = weights.float() * factor
    if not mode.fp8:
        return q, weights
    values, scale = layouts.quantize_e4m3(q, q.shape[-1])
    return values, weights * scale.squeeze(-1)  # the query's scale is positive, so it can go into the weight


def _scorer(
    mode: _Mode, cache: Any, keys: Tensor, pages: Any, key: Any, total: int, position_ids: Tensor
) -> Callable[[slice, Tensor, Tensor, Tensor], Tensor]:
    """A function of sequences, q and weights of ``_queries`` and counts ``[b, n]``: scores ``[b n, T]``."""
    from ._transformers_cache import DIRECT_TOKENS

    def exact_scores(sequences: slice, q: Tensor, weights: Tensor, count: Tensor) -> Tensor:
        own = keys[sequences]
        return torch.cat([exact.scores(*row) for row in zip(q, own, weights, count, strict=True)])

    if not mode.fp8:
        return exact_scores

    length = position_ids.shape[1]

    def paged_scores(sequences: slice, q: Tensor, weights: Tensor, count: Tensor) -> Tensor:
        return ops.paged_mqa_logits(q, pages.cache, weights.flatten(0, 1), count, pages.block_table(), total)

    if pages is not None and length <= DIRECT_TOKENS:
        return paged_scores

    k, k_scale = _quantised_keys(cache, keys) if pages is None else pages.read_keys()

    def scores(sequences: slice, q: Tensor, weights: Tensor, count: Tensor) -> Tensor:
        together, n = count.shape

        def bounds() -> tuple[Tensor, Tensor]:
            starts = (torch.arange(together, device=q.device, dtype=torch.int32) * total).repeat_interleave(n)
            return starts, starts + count.flatten()

        shared = n == length and sequences.start == 0 and together == len(k)
        starts, ends = _once(("bounds", key), position_ids, bounds) if shared else bounds()
        return ops.mqa_logits(
            q.flatten(0, 1),
            _cut(k, sequences).flatten(0, 1),
            _cut(k_scale, sequences).flatten(),
            weights.flatten(0, 1),
            starts,
            ends,
            max_seqlen_k=total if together > 1 else None,
        )

    return scores


def _quantised_keys(cache: Any, keys: Tensor) -> tuple[Tensor, Tensor]:
    """The indexer's keys in FP8, kept with a cache until it has more of them."""
    known = getattr(cache, "dsv4_indexer_keys", None)
    if known is None or known[0] is not keys:
        values, scale = _quantise(keys, keys.shape[-1])
        known = keys, values, scale.squeeze(-1)
        if cache is not None:
            cache.dsv4_indexer_keys = known
    return known[1], known[2]


# ------------------------------------------------------------------- hyper-connections and the output projection


def _mixes(streams: Tensor, fn: Tensor) -> tuple[Tensor, Tensor]:
    """The streams ``[B, S, 4, d]`` times ``fn``, fp32 ``[B S, n]``, and their squares, fp32 ``[B S]``."""
    gemm: Callable[..., tuple[Tensor, Tensor]] = ops.hc_prenorm_gemm
    if streams.dtype is not torch.bfloat16:
        gemm = exact.hc_prenorm_gemm
    return gemm(streams.view(-1, fn.shape[1]), fn.float())


def _normalised(mixes: Tensor, squares: Tensor, fn: Tensor, eps: float) -> Tensor:
    """The norm, which the mixes come without."""
    return mixes * torch.rsqrt(squares / fn.shape[1] + eps).unsqueeze(-1)


def _hyper_kernel(streams: Tensor) -> Any:
    """The kernel for all that follows ``_mixes``, where it takes these streams."""
    kernels = choice.kernels_for(streams, streams.shape[2]) if streams.dtype is torch.bfloat16 else None
    return None if kernels is None else kernels.hyper_connection


def _collapse(pre: Tensor, streams: Tensor) -> Tensor:
    """The streams ``[B, S, 4, d]`` weighted by ``pre`` ``[B, S, 4]``, summed in fp32."""
    batch, length, count, d = streams.shape
    out = torch.empty((batch * length, d), dtype=streams.dtype, device=streams.device)
    pre, streams = pre.flatten(0, 1), streams.flatten(0, 1)
    for rows in row_chunks(batch * length, 4 * count * d):
        out[rows] = (pre[rows].unsqueeze(-1) * streams[rows]).sum(1).to(out.dtype)
    return out.view(batch, length, d)


def _doubly_stochastic(logits: Tensor, eps: float, iterations: int) -> Tensor:
    """Rows of ``[..., n, n]`` to 1 by softmax, then columns and rows by turns, columns last.

    transformers divides by each sum plus ``eps``, three kernels at a time, 39 times a module: most of what a decoding
    step launches. After the first division no sum is far below 1 (each row and column has kept an entry that is not
    small), so that ``eps`` no longer matters, and without it a division is a log-softmax: one kernel.
    """
    comb = torch.softmax(logits, -1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    if iterations == 1:
        return comb
    logs = torch.log_softmax(comb.log(), -1)
    for _ in range(iterations - 2):
        logs = torch.log_softmax(torch.log_softmax(logs, -2), -1)
    return torch.softmax(logs, -2)


def _hyper_connection(self: Any, mode: _Mode, hidden_streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``DeepseekV4HyperConnection.forward``, with post and comb rounded to the streams' dtype, which the layer does."""
    n, eps, iterations, streams = self.hc_mult, self.hc_eps, self.hc_sinkhorn_iters, hidden_streams.contiguous()
    mixes, squares = _mixes(streams, self.fn)
    if (kernel := _hyper_kernel(streams)) is not None:
        made: tuple[Tensor, Tensor, Tensor] = kernel(
            mixes,
            squares,
            self.scale,
            self.base,
            streams,
            norm_eps=self.input_norm.eps,
            eps=eps,
            iterations=iterations,
        )
        return made
    mixes = _normalised(mixes, squares, self.fn, self.input_norm.eps).view(*streams.shape[:2], -1)
    pre, post, comb = mixes.split([n, n, n * n], -1)
    pre_base, post_base, comb_base = self.base.split([n, n, n * n])
    pre = torch.sigmoid(pre * self.scale[0] + pre_base) + eps
    post = 2 * torch.sigmoid(post * self.scale[1] + post_base)
    comb = (comb * self.scale[2] + comb_base).unflatten(-1, (n, n))
    comb = _doubly_stochastic(comb, eps, iterations)
    return post.to(streams.dtype), comb.to(streams.dtype), _collapse(pre, streams)


def _hyper_head(self: Any, mode: _Mode, x: Tensor) -> Tensor:
    """``DeepseekV4HyperHead.forward``."""
    streams = x.contiguous()
    mixes, squares = _mixes(streams, self.hc_fn)
    if (kernel := _hyper_kernel(streams)) is not None:
        norm_eps, eps = self.input_norm.eps, self.eps
        collapsed: Tensor = kernel(
            mixes, squares, self.hc_scale, self.hc_base, streams, norm_eps=norm_eps, eps=eps, iterations=0
        )[2]
        return collapsed
    mixes = _normalised(mixes, squares, self.hc_fn, self.input_norm.eps).view(*streams.shape[:2], -1)
    return _collapse(torch.sigmoid(mixes * self.hc_scale.float() + self.hc_base.float()) + self.eps, streams)


def _quantise_weight(module: Any) -> tuple[Tensor, Tensor]:
    """The weight as e4m3 ``[groups, d, r]`` with a scale for each 128 x 128, fp32 ``[groups, d / 128, r / 128]``."""
    weight = module.weight.detach().view(module.n_groups, -1, module.weight.shape[1])
    values, scales = [], []
    for group in weight:  # one at a time, to bound what the copies need
        d, r = group.shape
        padded = nn.functional.pad(group, (0, -r % 128, 0, -d % 128))
        blocks = padded.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).transpose(1, 2)  # [d / 128, r / 128, 128, 128]
        quantised, scale = layouts.quantize_e4m3(blocks.flatten(2), 128 * 128)
        square = quantised.view(torch.uint8).view(blocks.shape).transpose(1, 2).reshape(padded.shape)[:d, :r]
        values.append(square)
        scales.append(scale.squeeze(-1))
    return torch.stack(values).view(torch.float8_e4m3fn), torch.stack(scales)


def _grouped_linear(self: Any, mode: _Mode, weight: Tensor, weight_scale: Tensor, x: Tensor) -> Tensor:
    """``DeepseekV4GroupedLinear.forward``: x ``[..., groups, r]`` -> ``[..., groups, d]``."""
    flat = x.reshape(-1, *x.shape[-2:])
    out = torch.empty((len(flat), *weight.shape[:2]), dtype=torch.bfloat16, device=x.device)
    for rows in row_chunks(len(flat), 2 * flat.shape[1] * flat.shape[2]):
        values, scale = _quantise(_cut(flat, rows), 128)
        ops.fp8_einsum(values, scale, weight, weight_scale, out=_cut(out, rows))
    return out.view(*x.shape[:-1], -1)
