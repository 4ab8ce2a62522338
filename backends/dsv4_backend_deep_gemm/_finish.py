"""Make bounds safe for DeepGEMM, and its logits what the contract defines: one small kernel each."""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from dsv4_backends.provider import launch

_BLOCK = 4096
_MOVED_BLOCK = 2048
_ROWS_TO_MOVE = 256
"""A row is moved in place by one program. With fewer rows, copying to new memory by more programs is faster."""
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_EARLY = not _INTERPRETED
"""Launched before DeepGEMM's kernel has ended (programmatic dependent launch, which all of its GPUs have)."""

# One compiled kernel for each set of flags, for all sizes: `launch` keeps kernels by their flags.
_SIZES = ["width", "row_stride", "source_stride", "rows_per_length"]
_TABLE_SIZES = ["rows_per_entry", "table_stride", "limit", "pages"]
_LENGTHS = ["starts", "ends", "safe_starts", "safe_ends"]


@triton.jit(
    do_not_specialize=[*_SIZES, *_TABLE_SIZES], do_not_specialize_on_alignment=["source", "table", *_LENGTHS[:2]]
)
def _finish_kernel(
    target,
    source,
    starts,
    ends,
    table,
    width,
    row_stride: tl.int64,
    source_stride: tl.int64,
    rows_per_length,
    rows_per_entry,
    table_stride: tl.int64,
    limit,
    pages,
    STARTS: tl.constexpr,
    SHIFTED: tl.constexpr,
    COPIES: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * BLOCK
    column = begin + tl.arange(0, BLOCK)
    width = width * UNIT
    last = tl.load(ends + row // rows_per_length)
    first = 0
    missing = 0
    if PAGE > 0:  # pages that the cache does not have
        last = tl.minimum(last, limit)
        table += row // rows_per_entry * table_stride
        entry = begin // PAGE + tl.arange(0, BLOCK // PAGE)
        page = tl.load(table + entry, mask=entry * PAGE < last, other=0)
        missing = tl.max(((page < 0) | (page >= pages)).to(tl.int32), 0)
    if STARTS:
        start = tl.load(starts + row // rows_per_length)
        first = start if SHIFTED else first
        last = last if SHIFTED else last - start
    here = column < width
    place = target + row * row_stride * UNIT + column
    if (last <= begin) | (first >= begin + BLOCK):
        tl.store(place, float("-inf"), mask=here)  # 16 bytes at a time if rows are aligned
    elif COPIES:
        inside = (column >= first) & (column < last)
        values = tl.load(source + row * source_stride + (column - first), mask=inside & here, other=float("-inf"))
        tl.store(place, values, mask=here)
    elif (first > begin) | (last < begin + BLOCK):
        # Columns within the row's range are neither read nor written.
        tl.store(place, float("-inf"), mask=here & ((column < first) | (column >= last)))
    if PAGE > 0:
        if missing != 0:
            tl.debug_barrier()  # another thread may have stored the same column above
            for piece in range(0, BLOCK, 512):  # rare: in pieces, so that the common path needs fewer registers
                at = begin + piece + tl.arange(0, 512)
                own = tl.load(table + at // PAGE, mask=at < last, other=0)
                absent = (at < width) & ((own < 0) | (own >= pages))
                tl.store(target + row * row_stride * UNIT + at, float("-inf"), mask=absent)


@triton.jit(do_not_specialize=_SIZES[:2], do_not_specialize_on_alignment=_LENGTHS[:2])
def _move_kernel(
    logits,
    starts,
    ends,
    width,
    row_stride: tl.int64,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    width = width * UNIT
    place = logits + row * row_stride * UNIT
    first = tl.load(starts + row)
    last = tl.load(ends + row)
    column = tl.arange(0, BLOCK)
    if first > 0:
        # The row moves right, so its last block moves first. A block is read completely before it is written.
        blocks = tl.cdiv(last - first, BLOCK)
        for i in range(blocks):
            at = (blocks - 1 - i) * BLOCK + column
            inside = at < last - first
            values = tl.load(place + at, mask=inside)
            tl.debug_barrier()
            tl.store(place + first + at, values, mask=inside)
            tl.debug_barrier()
        for i in range(tl.cdiv(first, BLOCK)):
            tl.store(place + i * BLOCK + column, float("-inf"), mask=i * BLOCK + column < first)
    edge = last // BLOCK * BLOCK + column
    tl.store(place + edge, float("-inf"), mask=(edge >= last) & (edge < width))
    for i in range(last // BLOCK + 1, tl.cdiv(width, BLOCK)):
        tl.store(place + i * BLOCK + column, float("-inf"), mask=i * BLOCK + column < width)


@triton.jit(do_not_specialize=["rows", "keys", "width"], do_not_specialize_on_alignment=_LENGTHS)
def _bounds_kernel(starts, ends, safe_starts, safe_ends, rows, keys, width, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = row < rows
    start = tl.minimum(tl.maximum(tl.load(starts + row, mask=here, other=0), 0), keys)
    end = tl.minimum(tl.maximum(tl.load(ends + row, mask=here, other=0), 0), keys)
    end = tl.maximum(tl.minimum(end - start, width), 0) + start
    tl.store(safe_starts + row, start, mask=here)
    tl.store(safe_ends + row, end, mask=here)


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda or _INTERPRETED


def bounds(row_starts: Tensor, row_ends: Tensor, keys: int, width: int) -> tuple[Tensor, Tensor]:
    """Bounds that are safe for the kernels: ``0 <= start <= end <= keys``, and at most ``width`` keys between them.

    The kernels read bounds as unsigned numbers, loop from start to end without comparing them first, and do not check
    them against the width of the result.
    """
    if _on_gpu(row_starts):
        rows = row_starts.shape[0]
        row_starts, row_ends = row_starts.contiguous(), row_ends.contiguous()
        starts, ends = torch.empty_like(row_starts), torch.empty_like(row_ends)
        tensors = (row_starts, row_ends, starts, ends)
        grid = (-(-rows // 1024), 1, 1)
        launch(_bounds_kernel, row_starts.get_device(), grid, tensors, (rows, keys, width), (1024,))
        return starts, ends
    starts = row_starts.clamp(0, keys)
    return starts, starts + (row_ends.clamp(0, keys) - starts).clamp(0, width)


def finish(
    logits: Tensor,
    starts: Tensor | None,
    ends: Tensor,
    width: int,
    *,
    shifted: bool = False,
    out: Tensor | None,
    table: Tensor | None = None,
    cache: tuple[int, int] = (0, 0),
) -> Tensor:
    """Logits as the contract defines them.

    Args:
        logits: fp32 ``[m, width]``. Column j of row i is key ``starts[i] + j``, and undefined if that is
            not below ``ends[i]``. Changed in place, unless ``out`` is given or few rows are copied.
        starts, ends: int32, contiguous, one for each row or for each group of equally many rows. With starts,
            ``0 <= starts <= ends``. Without starts they are 0, and ends may be any numbers.
        width: Columns of the result.
        shifted: Key n belongs in column n of the result, and there is one start for each row; otherwise columns stay.
        out: fp32 ``[m, width]`` to write to.
        table: int32 ``[b, blocks]``, one row for each group of equally many rows: the page of each column. Columns
            beyond it and those of pages that the cache does not have are -inf.
        cache: The number of pages of the cache and of keys in a page (a power of two); only with a table.
    """
    rows = logits.shape[0]
    pages, page_size = cache
    if rows == 0 or width == 0:
        return logits if out is None else out
    if not _on_gpu(logits):
        return _finish_on_cpu(logits, starts, ends, width, shifted, out, table, cache)
    if out is None and shifted and rows < _ROWS_TO_MOVE:
        out = logits.new_empty((rows, width))
    target = logits if out is None else out
    stride, _ = target.stride()
    # In units of 16 bytes if rows allow it, so that Triton knows that it can store 16 bytes at once.
    aligned = target.data_ptr() % 16 == 0
    unit = 4 if aligned and (stride | width) % 4 == 0 else 1
    device = logits.get_device()
    if out is None and shifted:
        assert starts is not None
        numbers: tuple[int, ...] = (width // unit, stride // unit)
        flags: tuple[Any, ...] = (unit, _MOVED_BLOCK, _EARLY)
        launch(_move_kernel, device, (rows, 1, 1), (logits, starts, ends), numbers, flags, aligned, _EARLY)
        return logits
    begin = ends if starts is None else starts
    source_stride = stride if out is None else logits.stride(0)
    numbers = (width // unit, stride // unit, source_stride, rows // ends.numel())
    if table is None:
        table, entries = ends, (1, 0, 0, 0)
    else:
        entries = (rows // table.shape[0], table.stride(0), min(width, page_size * table.shape[1]), pages)
    flags = (starts is not None, shifted, out is not None, page_size, unit, _BLOCK, _EARLY)
    grid = (rows, -(-width // _BLOCK), 1)
    tensors = (target, logits, begin, ends, table)
    launch(_finish_kernel, device, grid, tensors, (*numbers, *entries), flags, aligned, _EARLY)
    return target


def _finish_on_cpu(
    logits: Tensor,
    starts: Tensor | None,
    ends: Tensor,
    width: int,
    shifted: bool,
    out: Tensor | None,
    table: Tensor | None,
    cache: tuple[int, int],
) -> Tensor:
    target = logits if out is None else out
    group = logits.shape[0] // ends.numel()
    ends = ends.reshape(-1)
    start = torch.zeros_like(ends) if starts is None else starts
    first, last = (bound.repeat_interleave(group).unsqueeze(1) for bound in (start, ends))
    column = torch.arange(width, device=logits.device)
    if shifted:
        moved = logits.gather(1, (column - first).clamp(0, logits.shape[1] - 1))
        return target.copy_(moved.where((column >= first) & (column < last), -torch.inf))
    inside = column < last - first
    if table is not None:
        pages, page_size = cache
        page = table.repeat_interleave(page_size, 1)[:, :width]
        known = torch.nn.functional.pad((page >= 0) & (page < pages), (0, width - page.shape[1]))
        inside &= known.repeat_interleave(len(logits) // len(table), 0)
    return target.copy_(logits.where(inside, -torch.inf))
