"""Pages of FP8 keys, in the byte layout of ``contract/layouts.py``.

A *page* holds ``page_size`` tokens. Sequence b of a batch owns the pages ``j * batch + b``, so growing appends pages
and renumbers none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...contract import layouts
from ...contract.traffic import BLOCK
from . import fused

COMPRESSED_PAGE = {"compressed_sparse_attention": BLOCK // 4, "heavily_compressed_attention": BLOCK // 128}
"""Keys in a page, as in engines."""


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
        """Grow to at least ``length`` tokens for each sequence, at least doubling."""
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
        """Write at most ``capacity`` bf16 keys ``[batch, n, 512]`` from a position on, counted modulo the capacity."""
        if (kernels := fused.kernels_on(kv.device)) is not None:
            kernels.write_tokens(self.cache, kv, start, self.capacity, kv=True)
            return
        # Not `layouts.write_kv`: it may skip slots, so it waits for the GPU.
        data, scales = layouts.kv_page_views(self.cache)
        place = self._places(start, kv.shape[1])
        data[place], scales[place] = layouts.pack_kv(kv.flatten(0, 1))

    def read_kv(self, positions: Tensor) -> Tensor:
        """The bf16 keys ``[batch, n, 512]`` at positions ``[n]``."""
        slots = self.slots(positions.int().unsqueeze(0)).flatten().long()
        return layouts.read_kv(self.cache, slots).view(self.batch, len(positions), layouts.HEAD_DIM)

    def write_keys(self, start: int, keys: Tensor) -> None:
        """Write bf16 indexer keys ``[batch, n, d]`` from a position on."""
        if (kernels := fused.kernels_for(keys, keys.shape[-1])) is not None:
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
