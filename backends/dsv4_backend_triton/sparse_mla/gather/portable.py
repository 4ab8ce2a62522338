"""``gather_dequant_kv`` in plain Triton: as many programs as the machine holds take the tiles round robin.

role   does
all    ROWS entries of one request: their bytes, their scales, decoded and written

The host does not know how many entries a request has. So each program adds up the tiles of all requests, REQUESTS at a
time, and takes those whose number is its own modulo the number of programs: equal shares, whatever the lengths.

An entry is 8 groups of 64 columns: 7 of e4m3 bytes with an E8M0 scale each, then one of bf16, which is copied.

shared memory: that of reductions
barriers: of the whole block, placed by Triton
strides: in elements, of the cache in UNIT bytes
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ...configurations import configured
from ...launch import entry, launch_kernel
from ...lib.bits import e4m3_times_e8m0, e4m3_to_fp32, e8m0_to_fp32, round_to
from ...lib.sizes import cdiv
from .plan import Call, Shape

_TOKEN_BYTES = tl.constexpr(576)  # 448 e4m3, then 64 bf16


class Config(NamedTuple):
    """Entries of a tile; programs for each multiprocessor."""

    rows: int
    warps: int
    blocks: int


def plan(shape: Shape) -> Config:
    return Config(**configured("gather_dequant_kv", "portable", shape.arch))


def launch(call: Call, config: Config) -> None:
    cache, table, out, (arch, unit) = call.cache, call.block_table, call.out, call.shape
    requests, blocks = table.shape
    programs = min(config.blocks * arch.sms, requests * cdiv(call.rows, config.rows))
    given = call.gather_lens is not None
    launch_kernel(
        _gather_kernel, (programs,),
        cache, call.seq_lens, call.gather_lens if given else call.seq_lens, table, out,
        requests, min(call.page_size * blocks, 2**31 - 1), call.rows, call.offset, cache.shape[0], call.page_size,
        cache.stride(0) // unit, table.stride(0), out.stride(0), out.stride(1),
        ROWS=config.rows, REQUESTS=32, GIVEN=given, UNIT=unit, ALIGNED=call.aligned, OPERAND=arch.bf16,
        num_warps=config.warps,
    )  # fmt: skip


@entry(triton.jit, "requests", any_alignment=["seq_lens", "gather_lens", "table"])
def _gather_kernel(
    cache, seq_lens, gather_lens, table, out,
    requests, room, rows,  # room: entries of a row of the table; rows: the most that a request writes
    offset, pages, page_size, page_stride, table_stride, o_stride_r, o_stride_m,
    ROWS: tl.constexpr, REQUESTS: tl.constexpr, GIVEN: tl.constexpr,
    UNIT: tl.constexpr, ALIGNED: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    o_stride_r, o_stride_m = o_stride_r.to(tl.int64), o_stride_m.to(tl.int64)
    if ALIGNED:
        o_stride_r, o_stride_m = tl.multiple_of(o_stride_r, 8), tl.multiple_of(o_stride_m, 8)
    group, lane = tl.arange(0, 8)[None, :, None], tl.arange(0, 64)[None, None, :]
    column = group * 64 + lane
    own, programs = tl.program_id(0), tl.num_programs(0)
    before = own * 0  # tiles of the requests of earlier turns
    for start in range(0, requests, REQUESTS):
        request = start + tl.arange(0, REQUESTS)
        have = tl.load(seq_lens + request, mask=request < requests, other=0)
        have = tl.minimum(tl.maximum(have, 0), room)
        want = have
        if GIVEN:
            want = tl.load(gather_lens + request, mask=request < requests, other=0)
            want = tl.minimum(tl.maximum(want, 0), have)
        count = tl.minimum(want, rows)
        tiles = (count + (ROWS - 1)) // ROWS
        ends = tl.cumsum(tiles, 0)
        total = tl.sum(tiles, 0)
        for tile in range((own + programs - before % programs) % programs, total, programs):
            at = tl.sum((ends <= tile).to(tl.int32), 0)  # the request that has the tile
            here = request == start + at
            first = tile - tl.sum(tl.where(here, ends - tiles, 0), 0)
            row = first * ROWS + tl.arange(0, ROWS)
            ok = row < tl.sum(tl.where(here, count, 0), 0)
            entry = tl.sum(tl.where(here, have - want, 0), 0) + row
            block = entry // page_size
            slot = entry - block * page_size
            i = (start + at).to(tl.int64)
            page = tl.load(table + i * table_stride + block, mask=ok, other=-1)
            there = (page >= 0) & (page < pages)
            base = cache + page.to(tl.int64) * (page_stride.to(tl.int64) * UNIT)
            data = base + slot * _TOKEN_BYTES
            scales = base + page_size.to(tl.int64) * _TOKEN_BYTES + slot * 8
            there3 = there[:, None, None]
            source = data[:, None, None] + column
            if UNIT > 1:  # 8 bytes a thread, since it writes 16: data of wider loads would move between threads
                source = tl.max_contiguous(tl.multiple_of(source, (1, 1, 8)), (1, 1, 8))
            raw = tl.load(source, mask=there3 & (group < 7), other=0)
            last = there3 & (group == 7)
            if UNIT > 1:
                rope = (data + 448).to(tl.pointer_type(tl.bfloat16))[:, None, None] + (group * 0 + lane)
                rope = tl.load(rope, mask=last, other=0.0)
            else:  # perhaps at an odd address
                rope = (data + 448)[:, None, None] + (group * 0 + lane * 2)
                low, high = tl.load(rope, mask=last, other=0), tl.load(rope + 1, mask=last, other=0)
                rope = (low.to(tl.int16) | (high.to(tl.int16) << 8)).to(tl.bfloat16, bitcast=True)
            code = tl.load(scales[:, None] + tl.arange(0, 8)[None, :], mask=there[:, None], other=0)
            code = code[:, :, None].broadcast_to(raw.shape)
            if OPERAND == tl.bfloat16:
                value = e4m3_times_e8m0(raw, code)
            else:
                value = round_to(e4m3_to_fp32(raw) * e8m0_to_fp32(code), tl.bfloat16, OPERAND)
            value = tl.where(group < 7, value, rope)
            target = out + i * o_stride_r + (offset + row)[:, None, None] * o_stride_m + column
            tl.store(target, value, mask=ok[:, None, None])
        before += total
