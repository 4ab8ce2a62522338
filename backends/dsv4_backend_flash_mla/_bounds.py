"""Make indices and lengths safe for FlashMLA's decode, which does not check them against the cache or the row."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsv4_backends.provider import launch

try:
    import triton
    import triton.language as tl
except ImportError:  # without Triton a few launches of torch do the same
    triton = None

_BLOCK = 1024
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


class Scope(NamedTuple):
    """One scope of a call.

    Attributes:
        indices: int32 ``[b, s_q, topk]``, the last dimension contiguous.
        length: int32 ``[b]`` or None.
        slots: The number of slots of the cache.
        width: The width of the returned indices, topk or more.
    """

    indices: Tensor
    length: Tensor | None
    slots: int
    width: int


if triton is not None:

    @triton.jit
    def _safe_indices(indices, safe, first, topk, width, slots, BLOCK: tl.constexpr):
        k = first + tl.arange(0, BLOCK)
        slot = tl.load(indices + k, mask=k < topk, other=-1)
        tl.store(safe + k, tl.where((slot >= 0) & (slot < slots), slot, -1), mask=k < width)

    @triton.jit
    def _safe_length(length, safe, b, topk, has_length):
        if has_length != 0:
            tl.store(safe + b, tl.minimum(tl.maximum(tl.load(length + b), 0), topk))

    _TENSORS = [f"{name}{scope}" for scope in "12" for name in ("indices", "length", "safe", "safe_length")]
    _NUMBERS = [f"{n}{scope}" for scope in "12" for n in ("has_length", "topk", "width", "slots", "row", "token")]

    @triton.jit(do_not_specialize=["s_q", *_NUMBERS], do_not_specialize_on_alignment=_TENSORS)
    def _bounds_kernel(
        indices1,
        length1,
        safe1,
        safe_length1,
        indices2,
        length2,
        safe2,
        safe_length2,
        s_q,
        has_length1,
        topk1,
        width1,
        slots1,
        row1: tl.int64,
        token1: tl.int64,
        has_length2,
        topk2,
        width2,
        slots2,
        row2: tl.int64,
        token2: tl.int64,
        BLOCK: tl.constexpr,
    ):
        """A program does a block of one scope's indices of a query; a request's first program also does its lengths."""
        query = tl.program_id(0)
        b, s = query // s_q, query % s_q
        b64, s64, query64 = b.to(tl.int64), s.to(tl.int64), query.to(tl.int64)
        block, blocks1 = tl.program_id(1), tl.cdiv(width1, BLOCK)
        if block < blocks1:
            own = indices1 + b64 * row1 + s64 * token1
            _safe_indices(own, safe1 + query64 * width1, block * BLOCK, topk1, width1, slots1, BLOCK)
        else:
            own = indices2 + b64 * row2 + s64 * token2
            _safe_indices(own, safe2 + query64 * width2, (block - blocks1) * BLOCK, topk2, width2, slots2, BLOCK)
        if (block == 0) & (s == 0):
            _safe_length(length1, safe_length1, b, topk1, has_length1)
            _safe_length(length2, safe_length2, b, topk2, has_length2)


def bounded(first: Scope, second: Scope | None) -> list[tuple[Tensor, Tensor | None]]:
    """New indices ``[b, s_q, width]`` of each scope, -1 if they name no slot, and new lengths of at most topk.

    One launch for all scopes.
    """
    scopes = [first] if second is None else [first, second]
    if triton is None or not (first.indices.is_cuda or _INTERPRETED):
        return [_bounded_by_torch(scope) for scope in scopes]
    b, s_q, _ = first.indices.shape
    safe = [scope.indices.new_empty((b, s_q, scope.width)) for scope in scopes]
    lengths = [None if scope.length is None else torch.empty_like(scope.length) for scope in scopes]
    tensors: list[Tensor] = []
    numbers: list[int] = []
    for scope, indices, length in zip(scopes, safe, lengths, strict=True):
        unused = scope.indices
        given = (unused, unused) if scope.length is None or length is None else (scope.length, length)
        tensors += [scope.indices, given[0], indices, given[1]]
        numbers += [int(length is not None), scope.indices.shape[2], scope.width, scope.slots]
        numbers += scope.indices.stride()[:2]
    if second is None:  # these are neither read nor written
        tensors += tensors[:4]
        numbers += [0, 0, 0, 0, 0, 0]
    blocks = sum(-(-scope.width // _BLOCK) for scope in scopes)
    launch(_bounds_kernel, first.indices.get_device(), (b * s_q, blocks, 1), tensors, (s_q, *numbers), (_BLOCK,))
    return list(zip(safe, lengths, strict=True))


def _bounded_by_torch(scope: Scope) -> tuple[Tensor, Tensor | None]:
    topk = scope.indices.shape[2]
    known = (scope.indices >= 0) & (scope.indices < scope.slots)
    indices = pad(torch.where(known, scope.indices, -1), (0, scope.width - topk), value=-1)
    return indices, None if scope.length is None else scope.length.clamp(0, topk)
