"""The packed cache for transformers: FP8 pages instead of dense bf16 keys.

Every layer has a ring of window keys in pages (``pages.py``); a compressing layer has pages of compressed keys, and a
ratio-4 layer also has pages of indexer keys.

A call with few tokens (decode, or the verification of a draft) reads the pages. A longer call attends over the same
values unpacked to bf16, so both see the quantised keys.

The layers subclass transformers' classes, so this module imports transformers. It is imported only when a model is
enabled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4CSACache, DeepseekV4HCACache

from ...contract import layouts
from ...contract.traffic import WINDOW_PAGE
from ...errors import DSV4Error
from .chunks import FEW_TOKENS
from .pages import Pages

HandOver = Callable[[Any], None]
"""Called with the layer whose pages the attention of this call reads."""


class _PackedWindow(DynamicSlidingWindowLayer):  # type: ignore[misc]
    """The ring of window keys. A subclass adds the compressed keys."""

    # With a `_layer_type` this class would replace transformers' own for every model.
    _layer_type = None
    is_croppable = False
    cumulative_length: int

    def _start(self, hand_over: HandOver) -> None:
        self.hand_over = hand_over
        self.window: Pages | None = None
        self.compressed: dict[str, Pages] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new keys ``[B, 1, S, 512]``. Return the keys that a long call attends to; for a short call only the
        new ones, since its attention reads the pages."""
        batch, _, count, _ = key_states.shape
        if self.window is None:
            ring = self.sliding_window - 1 + FEW_TOKENS
            self.window = Pages(batch, WINDOW_PAGE, layouts.KV_BYTES, key_states.device, ring)
            self.is_initialized, self.device, self.dtype = True, key_states.device, key_states.dtype
        before, after = self.cumulative_length, self.cumulative_length + count
        ring = self.window.capacity
        new = key_states.squeeze(1).to(torch.bfloat16)
        keys = key_states
        if count > FEW_TOKENS:
            rounded = layouts.unpack_kv(*layouts.pack_kv(new.flatten(0, 1))).view_as(new)
            old = torch.arange(max(0, before - self.sliding_window + 1), before, device=new.device) % ring
            keys = torch.cat([self.window.read_kv(old), rounded], 1).unsqueeze(1).to(key_states.dtype)
        first = max(before, after - ring)
        self.window.write_kv(first, new[:, first - before :])
        self.cumulative_length = after
        if count <= FEW_TOKENS:
            self.hand_over(self)
        return keys, keys

    def append(self, name: str, entries: Tensor, page_size: int) -> Pages:
        """Write new compressed entries ``[B, n, d]`` of ``compressor`` or ``indexer``."""
        token_bytes = layouts.KV_BYTES
        if name == "indexer":
            token_bytes = entries.shape[-1] + layouts.INDEXER_SCALE_BYTES
        if name not in self.compressed:
            batch, count, _ = entries.shape
            self.compressed[name] = Pages(batch, page_size, token_bytes, entries.device, max(1024, count))
        pages = self.compressed[name]
        if (count := entries.shape[1]) > 0:
            pages.reserve(pages.length + count)
            pages.write_keys(pages.length, entries) if name == "indexer" else pages.write_kv(pages.length, entries)
            pages.length += count
        return pages

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return sum(pages.nbytes for pages in (self.window, *self.compressed.values()) if pages is not None)

    def reset(self) -> None:
        """Drop all keys and the compressor's state."""
        self.__init__(self._config, self.hand_over)  # type: ignore[misc]

    def update_compressor_states(self, name: str, compressed: Tensor) -> Tensor:
        raise DSV4Error("a packed cache serves an enabled model only; this one runs transformers' own compressor")

    def _unsupported(self, *args: Any, **kwargs: Any) -> Any:
        raise DSV4Error("a packed cache can neither be reordered, cropped, offloaded nor split by sequence")

    reorder_cache = crop = offload = prefetch = _unsupported
    batch_repeat_interleave = batch_select_indices = activate_past_recording = _unsupported


class PackedSlidingLayer(_PackedWindow):
    def __init__(self, config: Any, hand_over: HandOver) -> None:
        super().__init__(sliding_window=config.sliding_window)
        self._config = config
        self._start(hand_over)


class PackedHCALayer(_PackedWindow, DeepseekV4HCACache):  # type: ignore[misc]
    _layer_type = None

    def __init__(self, config: Any, hand_over: HandOver) -> None:
        DeepseekV4HCACache.__init__(self, config)
        self._config = config
        self._start(hand_over)


class PackedCSALayer(_PackedWindow, DeepseekV4CSACache):  # type: ignore[misc]
    _layer_type = None

    def __init__(self, config: Any, hand_over: HandOver) -> None:
        DeepseekV4CSACache.__init__(self, config)
        self._config = config
        self._start(hand_over)


_LAYERS = {
    "sliding_attention": PackedSlidingLayer,
    "compressed_sparse_attention": PackedCSALayer,
    "heavily_compressed_attention": PackedHCALayer,
}


class PackedCache(Cache):  # type: ignore[misc]
    """A cache of packed layers, one for each layer of ``config``; made by ``packed_cache``."""

    def __init__(self, config: Any, hand_over: HandOver) -> None:
        super().__init__(layers=[_LAYERS[kind](config, hand_over) for kind in config.layer_types])

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return sum(layer.nbytes for layer in self.layers)
