"""``inverse_rope_quant`` in plain Triton: several tokens of one head at a time.

role   does
all    ROWS tokens of a head: four blocks of 128, of which the last is rotated in its second half; each is quantised as
       it is loaded

shared memory: none but that of reductions
barriers: of the whole block, placed by Triton
strides: in elements

Tokens, not heads, make a tile, so that the scales of a block, tokens innermost, are written side by side.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...configurations import configured
from ...launch import entry, launch_kernel
from ...lib.bits import quantize
from ...lib.rope import rotate, table_rows
from ...lib.sizes import cdiv
from .plan import Call, Shape


class Config(NamedTuple):
    """Tokens of a tile."""

    rows: int
    warps: int


def plan(shape: Shape) -> Config:
    return Config(**configured("inverse_rope_quant", "portable", shape.arch))


def launch(call: Call, config: Config) -> None:
    x, scale = call.x, call.scale
    assert scale is not None
    t, h, _ = x.shape
    launch_kernel(
        _inverse_rope_quant_kernel, (cdiv(t, config.rows) * h,),
        x, call.out.view(torch.uint8), scale, call.positions, call.cos_sin,
        t, h, h // call.groups, scale.shape[2], call.cos_sin.shape[0],
        x.stride(0), x.stride(1), call.cos_sin.stride(0),
        ROWS=config.rows, PACKED=scale.dtype == torch.int32, ALIGNED=call.aligned, NATIVE=call.shape.arch.native_fp8,
        num_warps=config.warps,
    )  # fmt: skip


@entry(triton.jit, "t", any_alignment=["positions"])
def _inverse_rope_quant_kernel(
    x_ptr, out_ptr, scale_ptr, positions, cos_sin,
    t, h, heads,  # of a group
    padded, most,  # tokens of a row of scales; positions of the table
    x_stride_t, x_stride_h, table_stride,
    ROWS: tl.constexpr, PACKED: tl.constexpr, ALIGNED: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    head = (tile % h).to(tl.int64)
    rows = (tile // h).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = rows < t
    x_stride_t, x_stride_h, table_stride = x_stride_t.to(tl.int64), x_stride_h.to(tl.int64), table_stride.to(tl.int64)
    if ALIGNED:
        x_stride_t, x_stride_h = tl.multiple_of(x_stride_t, 8), tl.multiple_of(x_stride_h, 8)
        table_stride = tl.multiple_of(table_stride, 4)
    column = tl.arange(0, 128)[None, :]
    source = x_ptr + rows[:, None] * x_stride_t + (head * x_stride_h + column)
    # All loads before all stores.
    x0 = tl.load(source, mask=ok[:, None], other=0.0)
    x1 = tl.load(source + 128, mask=ok[:, None], other=0.0)
    x2 = tl.load(source + 256, mask=ok[:, None], other=0.0)
    x3 = tl.load(source + 384, mask=ok[:, None], other=0.0).to(tl.float32)
    x3 = rotate(x3, cos_sin, table_rows(positions, rows, ok, most) * table_stride, True)
    group, within = head // heads, head % heads
    target = out_ptr + (group * t + rows)[:, None] * (heads * 512) + (within * 512 + column)
    scales = scale_ptr + rows
    y0, s0, c0 = quantize(x0.to(tl.float32), NATIVE)
    y1, s1, c1 = quantize(x1.to(tl.float32), NATIVE)
    y2, s2, c2 = quantize(x2.to(tl.float32), NATIVE)
    y3, s3, c3 = quantize(x3, NATIVE)
    tl.store(target, y0, mask=ok[:, None])
    tl.store(target + 128, y1, mask=ok[:, None])
    tl.store(target + 256, y2, mask=ok[:, None])
    tl.store(target + 384, y3, mask=ok[:, None])
    if PACKED:
        tl.store(scales + head * padded, c0 | (c1 << 8) | (c2 << 16) | (c3 << 24), mask=ok)
    else:
        block = tl.arange(0, 4)[None, :]
        four = tl.join(tl.join(s0, s2), tl.join(s1, s3)).reshape(ROWS, 4)
        tl.store(scales[:, None] + (head * 4 + block) * padded, four, mask=ok[:, None])
