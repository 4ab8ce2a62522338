"""The compressor in fp32: gather the window of every token, and write the entries of tokens that complete one.

The host does not know which tokens do, so an entry is computed for every token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dsv4_backends.contract import layouts

from .indexer import walsh_hadamard
from .memory import row_chunks
from .rope import rotate
from .settings import under_any_setting


def _windows(positions: Tensor, pages: Tensor, state: Tensor, ratio: int, dim: int) -> Tensor:
    """The softmax-weighted sums fp32 ``[n, dim]`` of the windows that end at positions.

    Args:
        positions: int64 ``[n]``.
        pages: ``[n, blocks]``, the tokens' rows of the table.
        state: fp32 ``[state_pages, page_size, parts, dim]``: kv of one or two windows, then their scores.
    """
    page_size, overlap = state.shape[1], state.shape[2] == 4
    back = torch.arange((1 + overlap) * ratio - 1, -1, -1, device=state.device)
    at = positions.unsqueeze(1) - back
    there = (at >= 0) & (at < pages.shape[1] * page_size)
    at = at.masked_fill(~there, 0)
    page = pages.gather(1, at // page_size).long()
    there &= (page >= 0) & (page < state.shape[0])
    page = page.masked_fill(~there, 0)
    part = (back < ratio).long() if overlap else torch.zeros_like(back)
    there = there.unsqueeze(-1)
    kv = state[page, at % page_size, part].masked_fill_(~there, 0.0)
    score = state[page, at % page_size, part + 1 + overlap].masked_fill_(~there, -torch.inf)
    top = score.amax(1, keepdim=True)
    share = score.sub_(top.masked_fill(top == -torch.inf, 0.0)).exp_()
    total = share.sum(1)
    return ((share * kv).sum(1) / total).masked_fill(total == 0, 0.0)


def _entries(
    positions: Tensor,
    requests: Tensor,
    slots: Tensor,
    state: Tensor,
    block_table: Tensor,
    norm_weight: Tensor,
    eps: float,
    cos_sin: Tensor,
    ratio: int,
    size: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Chunks of tokens: the slots and entries (bf16 ``[n, dim]``) to write, and whether there are any.

    Tokens that write nothing repeat a token that does.
    """
    dim, r = norm_weight.shape[0], block_table.shape[0]
    if r == 0 or size == 0:
        return
    if block_table.shape[1] == 0:
        block_table = block_table.new_full((r, 1), -1)
    if state.shape[0] == 0:
        state = state.new_zeros((1, *state.shape[1:]))
        block_table = torch.full_like(block_table, -1)
    state = state.unflatten(-1, (-1, dim))
    rows = state.shape[2] // 2 * ratio
    for part in row_chunks(len(positions), 4 * rows * dim):
        position, request, slot = positions[part].long(), requests[part].long(), slots[part].long()
        writes = (position >= 0) & (position % ratio == ratio - 1) & (request >= 0) & (request < r)
        writes &= (slot >= 0) & (slot < size)
        c = _windows(position, block_table[request.clamp(0, r - 1)], state, ratio, dim)
        mean = c.square().mean(-1, keepdim=True) + eps
        n = c * torch.rsqrt(mean).masked_fill(mean == 0, 0.0) * norm_weight.float()
        rotate(n[:, -layouts.ROPE_DIM :].unsqueeze(1), position // ratio * ratio, cos_sin)
        source = torch.where(writes, torch.arange(len(slot), device=slot.device), writes.int().argmax())
        yield slot[source].clamp(0, size - 1), n.to(torch.bfloat16)[source], writes.any()


def _write(target: Tensor, slot: Tensor, rows: Tensor, there: Tensor) -> None:
    """Write rows ``[n, bytes]`` into slots of ``target [pages, page_size, bytes]``; if not ``there``, the old bytes."""
    page, offset = slot // target.shape[1], slot % target.shape[1]
    target[page, offset] = torch.where(there, rows, target[page, offset])


@under_any_setting
def compress_norm_rope_insert(
    positions: Tensor,
    requests: Tensor,
    slots: Tensor,
    state: Tensor,
    block_table: Tensor,
    norm_weight: Tensor,
    eps: float,
    cos_sin: Tensor,
    ratio: int,
    k_cache: Tensor,
) -> Tensor:
    """See ``dsv4_backends.ops.compress_norm_rope_insert``."""
    data, scales = layouts.kv_page_views(k_cache)
    size = k_cache.shape[0] * k_cache.shape[1]
    tokens = (positions, requests, slots)
    for slot, keys, there in _entries(*tokens, state, block_table, norm_weight, eps, cos_sin, ratio, size):
        for target, rows in zip((data, scales), layouts.pack_kv(keys), strict=True):
            _write(target, slot, rows, there)
    return k_cache


@under_any_setting
def indexer_compress_insert(
    positions: Tensor,
    requests: Tensor,
    slots: Tensor,
    state: Tensor,
    block_table: Tensor,
    norm_weight: Tensor,
    eps: float,
    cos_sin: Tensor,
    ratio: int,
    k_cache: Tensor,
    *,
    hadamard: bool = False,
) -> Tensor:
    """See ``dsv4_backends.ops.indexer_compress_insert``."""
    data, scales = layouts.indexer_page_views(k_cache)
    size = k_cache.shape[0] * k_cache.shape[1]
    tokens = (positions, requests, slots)
    for slot, keys, there in _entries(*tokens, state, block_table, norm_weight, eps, cos_sin, ratio, size):
        if hadamard:
            keys = walsh_hadamard(keys.float()).to(torch.bfloat16)
        values, scale = layouts.quantize_e4m3(keys, keys.shape[-1])
        _write(data, slot, values.view(torch.uint8), there)
        _write(scales, slot, scale.view(torch.uint8), there)
    return k_cache
