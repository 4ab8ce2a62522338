"""The packed cache for transformers: FP8 pages in place of dense bf16 keys.

A *page* holds ``page_size`` tokens in the byte layout of ``contract/layouts.py``. Sequence b of a batch owns the pages
``j * batch + b``, so growing appends pages and moves none to another number. Every layer has a ring of window keys;
a compressing layer has pages of compressed keys, and a ratio-4 layer has pages of indexer keys besides.

A call with few tokens (decode, or the verification of a draft) reads the pages. A longer one attends over the same
values unpacked to bf16, so that both see what the pages hold.

The layers subclass transformers' own, so this module imports it. It is imported itself where a model is enabled only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4CSACache, DeepseekV4HCACache

from ..contract import layouts
from ..contract.traffic import BLOCK, WINDOW_PAGE
from ..errors import DSV4Error
from . import _transformers_choice as choice

DIRECT_TOKENS = choice.FEW_TOKENS
"""A call with at most this many tokens reads the pages themselves."""
COMPRESSED_PAGE = {"compressed_sparse_attention": BLOCK // 4, "heavily_compressed_attention": BLOCK // 128}
"""Keys in a page, as engines have them."""


class Pages:
    """Pages of one kind for all sequences of a batch.

    Attributes:
        cache: uint8 ``[pages, page_size, token_bytes]``, what the ops take.
        length: Tokens written for each sequence, unless the pages are used as a ring.
    """

    def __init__(self, batch: int, page_size: int, token_bytes: int, device: torch.device, capacity: int) -> None:
        self.batch, self.page_size, self.token_bytes = batch, page_size, token_bytes
        self.length = 0
        self._table: Tensor | None = None
        self.cache = self._allocate(capacity, device)

    def _allocate(self, capacity: int, device: torch.device) -> Tensor:
        pages = -(-capacity // self.page_size) * self.batch
        stride = self.page_size * self.token_bytes
        stride += -stride % layouts.PAGE_ALIGNMENT
        raw = torch.empty((pages, stride), dtype=torch.uint8, device=device)
        return raw.as_strided((pages, self.page_size, self.token_bytes), (stride, self.token_bytes, 1))

    @property
    def capacity(self) -> int:
        return self.cache.shape[0] // self.batch * self.page_size

    @property
    def nbytes(self) -> int:
        return self.cache.shape[0] * self.cache.stride(0)

    def reserve(self, length: int) -> None:
        """Make room for ``length`` tokens of each sequence, at least doubling."""
        if length > self.capacity:
            old, pages = self.cache, self.cache.shape[0]
            self.cache = self._allocate(max(length, 2 * self.capacity), old.device)
            whole = (pages, old.stride(0))
            self.cache.as_strided(whole, (old.stride(0), 1)).copy_(old.as_strided(whole, (old.stride(0), 1)))

    def slots(self, positions: Tensor) -> Tensor:
        """Slots of int32 positions ``[batch or 1, ...]`` as int32 ``[batch, ...]``; -1 stays -1."""
        if self.batch == 1:  # owns every page
            return positions
        sequence = torch.arange(self.batch, device=positions.device, dtype=torch.int32)
        sequence = sequence.view(-1, *[1] * (positions.dim() - 1))
        page = positions // self.page_size * self.batch + sequence
        slots = page * self.page_size + positions % self.page_size
        return torch.where(positions < 0, -1, slots).to(torch.int32)

    def _places(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Page and offset of every new token, those of the first sequence first."""
        device = self.cache.device
        position = torch.arange(start, start + count, device=device) % self.capacity
        sequence = torch.arange(self.batch, device=device).unsqueeze(-1)
        page = position // self.page_size * self.batch + sequence
        return page.flatten(), (position % self.page_size).repeat(self.batch)

    def write_kv(self, start: int, kv: Tensor) -> None:
        """Write bf16 keys ``[batch, n, 512]`` from a position on, at most the capacity, modulo which it counts."""
        if (kernels := choice.kernels_on(kv.device)) is not None:
            kernels.write_tokens(self.cache, kv, start, self.capacity, kv=True)
            return
        # Not `layouts.write_kv`, which may skip slots and so has to wait for the GPU.
        data, scales = layouts.kv_page_views(self.cache)
        place = self._places(start, kv.shape[1])
        data[place], scales[place] = layouts.pack_kv(kv.flatten(0, 1))

    def read_kv(self, positions: Tensor) -> Tensor:
        """The bf16 keys ``[batch, n, 512]`` at positions ``[n]``."""
        slots = self.slots(positions.int().unsqueeze(0)).flatten().long()
        return layouts.read_kv(self.cache, slots).view(self.batch, len(positions), layouts.HEAD_DIM)

    def write_keys(self, start: int, keys: Tensor) -> None:
        """Write bf16 indexer keys ``[batch, n, d]`` from a position on."""
        if (kernels := choice.kernels_for(keys, keys.shape[-1])) is not None:
            kernels.write_tokens(self.cache, keys, start, self.capacity, kv=False)
            return
        values, scales = layouts.indexer_page_views(self.cache)
        place = self._places(start, keys.shape[1])
        quantised, scale = layouts.quantize_e4m3(keys.flatten(0, 1), keys.shape[-1])
        values[place], scales[place] = quantised.view(torch.uint8), scale.view(torch.uint8)

    def read_keys(self) -> tuple[Tensor, Tensor]:
        """All indexer keys: e4m3 ``[batch, n, d]`` and fp32 scales ``[batch, n]``."""
        positions = torch.arange(self.length, device=self.cache.device, dtype=torch.int32)
        slots = self.slots(positions.unsqueeze(0)).flatten().long()
        values, scale = layouts.read_indexer_keys(self.cache, slots)
        d = self.token_bytes - layouts.INDEXER_SCALE_BYTES
        return values.view(self.batch, self.length, d), scale.view(self.batch, self.length)

    def block_table(self) -> Tensor:
        """int32 ``[batch, blocks]``, the pages of each sequence in order."""
        blocks = -(-self.length // self.page_size)
        if self._table is None or self._table.shape[1] != blocks:
            table = torch.arange(blocks * self.batch, device=self.cache.device, dtype=torch.int32)
            self._table = table.view(blocks, self.batch).T.contiguous()
        return self._table


HandOver = Callable[[Any], None]
"""Called with a layer whose pages the attention of this call has to read."""


class _PackedWindow(DynamicSlidingWindowLayer):  # type: ignore[misc]
    """The ring of window keys. What a subclass adds is the compressed part."""

    # A class with a `_layer_type` would replace transformers' own for every model.
    _layer_type = None
    is_croppable = False
    cumulative_length: int

    def _start(self, hand_over: HandOver) -> None:
        self.hand_over = hand_over
        self.window: Pages | None = None
        self.compressed: dict[str, Pages] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new keys ``[B, 1, S, 512]``; return the keys that a long call attends to, for a short one only
        the new ones: its attention reads the pages."""
        batch, _, count, _ = key_states.shape
        if self.window is None:
            ring = self.sliding_window - 1 + DIRECT_TOKENS
            self.window = Pages(batch, WINDOW_PAGE, layouts.KV_BYTES, key_states.device, ring)
            self.is_initialized, self.device, self.dtype = True, key_states.device, key_states.dtype
        before, after = self.cumulative_length, self.cumulative_length + count
        ring = self.window.capacity
        new = key_states.squeeze(1).to(torch.bfloat16)
        keys = key_states
        if count > DIRECT_TOKENS:
            rounded = layouts.unpack_kv(*layouts.pack_kv(new.flatten(0, 1))).view_as(new)
            old = torch.arange(max(0, before - self.sliding_window + 1), before, device=new.device) % ring
            keys = torch.cat([self.window.read_kv(old), rounded], 1).unsqueeze(1).to(key_states.dtype)
        first = max(before, after - ring)
        self.window.write_kv(first, new[:, first - before :])
        self.cumulative_length = after
        if count <= DIRECT_TOKENS:
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
        """Forget everything, the compressor's state included."""
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
