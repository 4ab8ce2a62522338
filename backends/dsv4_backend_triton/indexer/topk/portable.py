"""Both top-k ops in plain Triton: for some rows at a time the kernels of the logits, into a buffer, and the columns of
the largest logits in each of its rows, in three launches.

    grid            does
    rows x splits   the maxima of GROUPS / splits groups of a split's logits
    rows x splits   a bound: the topk-th largest of all maxima of the row, which topk logits reach; and the split's
                    logits that reach it
    rows            the topk largest of these, which are a few more than topk

A group is every GROUPS-th column, so that neighbours are in different groups; a split has TILE neighbouring groups.
If the logits are in random order, 8 groups for each selected key leave 1.07 topk logits. If more than KEEP logits of a
row reach its bound, for example since many are equal, the last launch searches the whole row. If a row has at most KEEP
keys, all of them are candidates.

Logits are compared by their image: int32 that sorts as they do, with NaN above all and -inf last. A logit of -inf is
never selected. The selection and its order depend on the logits and the splits only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...configurations import configured
from ...launch import entry, launch_kernel
from ...lib.sizes import cdiv, pow2
from .op import Call, Shape

_LEAST = 64
"""The least number of groups of a split."""


class Config(NamedTuple):
    """Launch configuration. ``mib``: the size of the workspace, which holds the logits of some rows. ``waves``: blocks
    for each multiprocessor up to which rows are split. ``splits``: the most of a row. ``groups``: those for each
    selected key."""

    mib: int
    block: int
    warps: int
    waves: int
    splits: int
    groups: int


class Plan(NamedTuple):
    """The number of rows at a time, and how each is searched."""

    config: Config
    rows: int
    splits: int
    groups: int
    keep: int


def plan(shape: Shape) -> Plan:
    """The plan for calls of a shape. The kernels compiled for it depend only on the rows at a time and ``topk``.
    Warm-up makes calls with few rows, which have every number of splits."""
    config = Config(**configured(shape.op, "portable", shape.arch))
    groups, keep = min(max(config.groups * shape.topk, 2048), 8192), min(4 * shape.topk, 8192)
    space, each = min(config.mib, 255) * 2**18, max(shape.columns, 64) + groups  # elements
    rows = max(1, min(shape.rows, space // (each + 2 * keep)))
    blocks = 2 if shape.arch.interpret else config.waves * shape.arch.sms  # the interpreter runs one at a time
    wanted = max(1, blocks // (1 if shape.batch_invariant else rows))
    splits = min(pow2(wanted + 1) // 2, config.splits, groups // _LEAST)  # rounded down to a power of two
    return Plan(config, max(1, min(rows, space // (each + splits * 2 * keep))), splits, groups, keep)


def launch(call: Call, config: Plan) -> None:
    tile, rows, out = config.config, call.rows, call.out
    count, next_n, topk, device = call.items, rows.next_n, out.shape[1], out.device
    stride = cdiv(call.columns, 64) * 64  # the last columns of a row are read four at a time
    items = cdiv(count, cdiv(count, max(1, config.rows // next_n)))  # equal chunks
    most = items * next_n
    logits = torch.empty((most, stride), dtype=torch.float32, device=device)
    maxima = torch.empty((most, config.groups), dtype=torch.int32, device=device)
    images = torch.empty((most, config.splits, config.keep), dtype=torch.int32, device=device)
    indices = torch.empty((most, config.splits, config.keep), dtype=torch.int32, device=device)
    counts = torch.empty((most, config.splits), dtype=torch.int32, device=device)
    bounds = torch.empty((most,), dtype=torch.int32, device=device)
    split = {"TILE": config.groups // config.splits, "BLOCK": tile.block, "KEEP": config.keep}
    for first in range(0, count, items):
        part = slice(first, min(first + items, count))
        here = (part.stop - first) * next_n
        call.write(part, logits[:here, : call.columns])
        starts = None if rows.starts is None else rows.starts[part]
        spans = (starts, rows.ends[part], next_n, rows.stride_i, rows.stride_j, rows.limit, int(rows.compressed))
        given = (*spans, call.columns, stride)
        launch_kernel(_maxima_kernel, (here, config.splits), logits, maxima, *given, **split, num_warps=tile.warps)
        launch_kernel(
            _candidates_kernel, (here, config.splits), logits, maxima, images, indices, counts, bounds, *given, topk,
            **split, GROUPS=config.groups, num_warps=tile.warps,
        )  # fmt: skip
        launch_kernel(
            _select_kernel, (here,), logits, images, indices, counts, bounds, out[first * next_n :], *given, topk,
            config.splits, out.stride(0), BLOCK=min(tile.block, 2048), KEEP=config.keep, num_warps=tile.warps,
        )  # fmt: skip


_LOWEST = tl.constexpr(-(2**31) + 0x7FFFFF + 1)  # the image after that of -inf


@triton.jit
def image_of(x):
    """int32 that sorts as x does, NaN above all."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def bound_of(image, topk):
    """The largest t that at least ``topk`` elements reach, or a smaller t that exactly ``topk`` elements reach."""
    low = tl.min(image, axis=0).to(tl.int64)
    high = tl.max(image, axis=0).to(tl.int64)
    while low < high:
        middle = low + (high - low + 1) // 2
        reach = tl.sum((image >= middle.to(tl.int32)).to(tl.int32), axis=0)
        low = tl.where(reach >= topk, middle, low)
        high = tl.where(reach > topk, high, tl.where(reach == topk, middle, middle - 1))
    return low.to(tl.int32)


@triton.jit
def span(row, starts_ptr, ends_ptr, next_n, stride_i, stride_j, limit, compressed, columns):
    """The column of a row's first key, and the number of its keys."""
    i = row // next_n
    end = tl.load(ends_ptr + i.to(tl.int64) * stride_i + (row - i * next_n) * stride_j)
    end = tl.minimum(tl.maximum(end, 0), limit)
    start = 0
    if starts_ptr is not None:
        start = tl.minimum(tl.maximum(tl.load(starts_ptr + i), 0), limit)
    count = tl.minimum(tl.maximum(end - start, 0), columns)
    return tl.where(compressed != 0, 0, start), count


@triton.jit
def images(row_ptr, column, begin, end):
    """The images of some columns of a row, read 4 at a time, since the buffer's rows go on past ``columns``."""
    x = tl.load(row_ptr + column, mask=column < tl.multiple_of((end + 3) // 4 * 4, 4), other=float("-inf"))
    return tl.where((column >= begin) & (column < end), image_of(x), -(2**31))


_ANY_ALIGNMENT = ["starts_ptr", "ends_ptr", "out_ptr"]


@entry(triton.jit, "next_n", any_alignment=_ANY_ALIGNMENT)
def _maxima_kernel(
    logits_ptr, maxima_ptr, starts_ptr, ends_ptr,
    next_n, stride_i, stride_j, limit, compressed, columns, stride,  # strides in elements
    TILE: tl.constexpr, BLOCK: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    split = tl.program_id(1)
    begin, count = span(row, starts_ptr, ends_ptr, next_n, stride_i, stride_j, limit, compressed, columns)
    end = begin + count
    if count <= KEEP:  # all are candidates
        return
    row_ptr = logits_ptr + row * tl.multiple_of(stride.to(tl.int64), 16)
    DEEP: tl.constexpr = BLOCK // TILE if BLOCK > TILE else 1
    splits = tl.num_programs(1)
    group = tl.arange(0, TILE)
    inner = (tl.arange(0, DEEP) * splits + split)[:, None] * TILE + group[None, :]
    most = tl.full((TILE,), -(2**31), tl.int32)
    for j in range(begin // 4 * 4, end, splits * (DEEP * TILE)):
        most = tl.maximum(most, tl.max(images(row_ptr, tl.multiple_of(j, 4) + inner, begin, end), axis=0))
    tl.store(maxima_ptr + (row.to(tl.int64) * splits + split) * TILE + group, most)


@entry(triton.jit, "next_n", any_alignment=_ANY_ALIGNMENT)
def _candidates_kernel(
    logits_ptr, maxima_ptr, images_ptr, indices_ptr, counts_ptr, bounds_ptr, starts_ptr, ends_ptr,
    next_n, stride_i, stride_j, limit, compressed, columns, stride,  # strides in elements
    topk,
    TILE: tl.constexpr, BLOCK: tl.constexpr, KEEP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    split = tl.program_id(1)
    begin, count = span(row, starts_ptr, ends_ptr, next_n, stride_i, stride_j, limit, compressed, columns)
    end = begin + count
    row_ptr = logits_ptr + row * tl.multiple_of(stride.to(tl.int64), 16)
    bound = _LOWEST
    if count > KEEP:
        maxima = tl.load(maxima_ptr + row.to(tl.int64) * GROUPS + tl.arange(0, GROUPS))
        bound = tl.maximum(bound, bound_of(maxima, topk))
    UNIT: tl.constexpr = TILE if TILE < BLOCK else BLOCK
    splits = tl.num_programs(1)
    lane = tl.arange(0, BLOCK)
    inner = (lane // UNIT * splits + split) * UNIT + lane % UNIT
    at = row.to(tl.int64) * splits + split
    found = 0
    for j in range(begin // 4 * 4, end, splits * BLOCK):
        column = tl.multiple_of(j, 4) + inner
        image = images(row_ptr, column, begin, end)
        taken = (image >= bound).to(tl.int32)
        here = tl.sum(taken, axis=0)
        if here > 0:
            place = found + tl.cumsum(taken, axis=0) - 1
            kept = (taken > 0) & (place < KEEP)
            tl.store(images_ptr + at * KEEP + place, image, mask=kept)
            tl.store(indices_ptr + at * KEEP + place, column - begin, mask=kept)
            found += here
    tl.store(counts_ptr + at, found)
    if split == 0:
        tl.store(bounds_ptr + row, bound)


@triton.jit
def _of_candidates(images_ptr, indices_ptr, source, total, out_row, topk, KEEP: tl.constexpr):
    """Select among ``total`` candidates, which are at ``source``."""
    lane = tl.arange(0, KEEP)
    there = lane < total
    image = tl.load(images_ptr + source, mask=there, other=-(2**31))
    index = tl.load(indices_ptr + source, mask=there, other=-1)
    least = -(2**31)
    if total > topk:
        least = bound_of(image, topk)
    above = there & (image > least)
    equal = (there & (image == least)).to(tl.int32)
    room = topk - tl.sum(above.to(tl.int32), axis=0)
    taken = above | ((equal > 0) & (tl.cumsum(equal, axis=0) <= room))
    place = tl.cumsum(taken.to(tl.int32), axis=0) - 1
    tl.store(out_row + place, index, mask=taken)
    tl.store(out_row + lane, tl.full((KEEP,), -1, tl.int32), mask=(lane >= total) & (lane < topk))


@triton.jit
def _of_row(row_ptr, begin, end, low, out_row, topk, BLOCK: tl.constexpr):
    """Select among all columns of a row, of which more than ``topk`` reach the image ``low``."""
    block = tl.arange(0, BLOCK)
    # As bound_of, beginning with a bound that mostly is the result: if so many logits reach it, many are equal to it.
    high = low * 0 + (2**31 - 1)
    middle = low + 1
    above = 0  # logits above high
    while low < high:
        reach = 0
        for j in range(begin // 4 * 4, end, BLOCK):
            image = images(row_ptr, tl.multiple_of(j, 4) + block, begin, end)
            reach += tl.sum((image >= middle.to(tl.int32)).to(tl.int32), axis=0)
        low = tl.where(reach >= topk, middle, low)
        high = tl.where(reach > topk, high, tl.where(reach == topk, middle, middle - 1))
        above = tl.where(reach < topk, reach, above)
        middle = low + (high - low + 1) // 2
    least = low.to(tl.int32)
    room = topk - above
    found = 0
    equals = 0
    for j in range(begin // 4 * 4, end, BLOCK):
        column = tl.multiple_of(j, 4) + block
        image = images(row_ptr, column, begin, end)
        equal = (image == least).to(tl.int32)
        taken = ((image > least) | ((equal > 0) & (equals + tl.cumsum(equal, axis=0) <= room))).to(tl.int32)
        tl.store(out_row + found + tl.cumsum(taken, axis=0) - 1, column - begin, mask=taken > 0)
        found += tl.sum(taken, axis=0)
        equals += tl.sum(equal, axis=0)


@entry(triton.jit, "next_n", any_alignment=_ANY_ALIGNMENT)
def _select_kernel(
    logits_ptr, images_ptr, indices_ptr, counts_ptr, bounds_ptr, out_ptr, starts_ptr, ends_ptr,
    next_n, stride_i, stride_j, limit, compressed, columns, stride,  # strides in elements
    topk, splits, out_stride,
    BLOCK: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    at = row.to(tl.int64) * splits
    out_row = out_ptr + row.to(tl.int64) * out_stride
    lane = tl.arange(0, KEEP)
    source = lane
    total = 0
    for split in range(splits):
        here = tl.load(counts_ptr + at + split)
        source = tl.where(lane >= total, split * KEEP + lane - total, source)
        total += here
    if total <= KEEP:
        _of_candidates(images_ptr + at * KEEP, indices_ptr + at * KEEP, source, total, out_row, topk, KEEP)
    else:
        begin, count = span(row, starts_ptr, ends_ptr, next_n, stride_i, stride_j, limit, compressed, columns)
        row_ptr = logits_ptr + row * tl.multiple_of(stride.to(tl.int64), 16)
        _of_row(row_ptr, begin, begin + count, tl.load(bounds_ptr + row).to(tl.int64), out_row, topk, BLOCK)
