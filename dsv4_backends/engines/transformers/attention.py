"""The attention: a list of keys for every query, and the calls over keys in memory and over a packed cache's pages."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...contract.settings import without_autocast
from ...contract.sparse_mla.meaning import HEAD_DIM
from ...selection.provider import Reason
from . import chunks, exact
from .chunks import FEW_TOKENS, cut
from .handover import Selected, Window, handover
from .refusals import EngineError, refuse_gradients


def _window_places(window: Window, size: int, rows: slice) -> tuple[Tensor, Tensor]:
    """For each query, the index of its first window key in the call, and its number of window keys: int32 ``[n]``."""
    first = window.q_offset - window.kv_offset
    own = torch.arange(first + rows.start, first + rows.stop, device=window.device, dtype=torch.int32)
    begin = (own - (size - 1)).clamp_(min=0)
    return begin, own - begin + 1


def _hide_padding(window: Window, index: Tensor, sequences: slice) -> Tensor:
    """Window keys ``[b or 1, n, k]`` with those that are padding set to -1."""
    if window.padding is None:
        return index
    visible = window.padding[sequences, window.kv_offset : window.kv_offset + window.kv_length]
    index = index.expand(len(visible), -1, -1)
    place = index.clamp(0, window.kv_length - 1).flatten(1).long()
    hidden = ~visible.gather(1, place).view(index.shape) & (index >= 0) & (index < window.kv_length)
    return index.masked_fill(hidden, -1)


def _frame(
    window: Window, selected: Selected | None, size: int, sequences: slice, rows: slice
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The part of the index lists that all layers share: window keys and lengths, and a mask ``[b or 1, n, k]`` of the
    columns for compressed keys (None: there are none)."""
    begin, seen = _window_places(window, size, rows)
    width = min(size, window.kv_length)
    if selected is None:
        columns = torch.arange(width, device=window.device, dtype=torch.int32)
        index = torch.where(columns < seen.unsqueeze(-1), begin.unsqueeze(-1) + columns, -1).unsqueeze(0)
        return _hide_padding(window, index, sequences), seen.unsqueeze(0), None
    several = len(selected.count) > 1
    count = cut(selected.count, sequences if several else slice(0, 1), rows).unsqueeze(-1)
    columns = torch.arange(selected.width + width, device=window.device, dtype=torch.int32)
    after = columns - count
    index = torch.where((after >= 0) & (after < seen.unsqueeze(-1)), after + begin.unsqueeze(-1), -1)
    return _hide_padding(window, index, sequences), count.squeeze(-1) + seen, after < 0


def _lists(
    window: Window, selected: Selected | None, size: int, sequences: slice, rows: slice
) -> tuple[Tensor, Tensor]:
    """The keys that each query sees, as indices into ``[window keys, compressed keys]`` of its sequence.

    Returns:
        int32 ``[b or 1, n, k]``: compressed keys, then window keys, then -1; a window key that is padding is -1.
        int32 ``[b or 1, n]``: the number of entries before the -1 at the end.
    """
    make = functools.partial(_frame, window, selected, size, sequences, rows)
    if selected is None:
        return make()[:2]
    key = "frame", selected.key, sequences.start, rows.start
    small = window.q_length <= FEW_TOKENS  # small enough to keep for the layers that follow
    index, lengths, compressed = window.once(key, make) if small else make()
    assert compressed is not None
    if selected.entries is None:
        entries = torch.arange(index.shape[-1], device=window.device, dtype=torch.int32)
    else:
        entries = nn.functional.pad(cut(selected.entries, sequences, rows), (0, index.shape[-1] - selected.width))
    return torch.where(compressed, entries + window.kv_length, index), lengths


def attention(
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
    selected, pages = handover.take()
    if not isinstance(window, Window):
        message = "a mask of the caller's own is not served" if window is not None else "no mask was made"
        raise EngineError(Reason("engine-mode", message, "pass a mask [batch, places], or none"))
    if module.compressor is not None and selected is None:
        raise EngineError(Reason("engine-state", "the model's compressors are transformers' own", "enable(model)"))
    if dropout:
        raise EngineError(Reason("engine-mode", "the ops have no dropout", "use model.eval()"))
    if torch.is_grad_enabled():
        refuse_gradients(query, key, module.sinks)
    sinks: Tensor = module.sinks.float()  # type: ignore[assignment]
    size: int = module.sliding_window  # type: ignore[assignment]
    with without_autocast():
        if pages is not None:
            return _attend_pages(pages, query, window, selected, size, scaling, sinks), None
        return _attend(query, key, window, selected, size, scaling, sinks), None


def _attend(
    query: Tensor, key: Tensor, window: Window, selected: Selected | None, size: int, scaling: float, sinks: Tensor
) -> Tensor:
    """Attention over keys in memory."""
    batch, heads, length, _ = query.shape
    attend: Callable[..., Any] = ops.sparse_mla_prefill
    if query.dtype is not torch.bfloat16:
        attend = exact.sparse_mla_prefill
    out = torch.empty((batch, length, heads, HEAD_DIM), dtype=query.dtype, device=query.device)
    width = min(size, window.kv_length) + (0 if selected is None else selected.width)
    for sequences in chunks.sequences_of(batch, length):
        together = sequences.stop - sequences.start
        keys = cut(key, sequences).to(query.dtype).reshape(-1, HEAD_DIM)
        for rows in chunks.row_chunks(length, 4 * width * together):
            make = functools.partial(_flat_lists, window, selected, size, sequences, rows, key.shape[2])
            if (selected is None or selected.entries is None) and rows == slice(0, length):
                shared = None if selected is None else selected.key
                index, lengths = window.once(("lists", shared, sequences.start), make)
            else:
                index, lengths = make()
            attend(
                cut(query.transpose(1, 2), sequences, rows).flatten(0, 1),
                keys,
                index,
                scaling,
                attn_sink=sinks,
                topk_length=lengths,
                out=cut(out, sequences, rows).view(-1, heads, HEAD_DIM),
            )
    return out


def _flat_lists(
    window: Window, selected: Selected | None, size: int, sequences: slice, rows: slice, keys: int
) -> tuple[Tensor, Tensor]:
    """``_lists`` with the rows of all sequences in one dimension; each has ``keys`` keys, one after the other."""
    index, lengths = _lists(window, selected, size, sequences, rows)
    together = sequences.stop - sequences.start
    if together > 1:
        offsets = torch.arange(together, device=index.device, dtype=torch.int32) * keys
        index = torch.where(index < 0, -1, index + offsets.view(-1, 1, 1))
    return index.flatten(0, 1), lengths.expand(together, -1).contiguous().view(-1)


def _attend_pages(
    layer: Any,
    query: Tensor,
    window: Window,
    selected: Selected | None,
    size: int,
    scaling: float,
    sinks: Tensor,
) -> Tensor:
    """Attention of a few tokens over a packed layer's pages."""
    batch, _, length, _ = query.shape
    everything = slice(0, batch), slice(0, length)

    def window_slots() -> Tensor:
        # Window keys only: indices counted from the call's first key become places in the ring.
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
