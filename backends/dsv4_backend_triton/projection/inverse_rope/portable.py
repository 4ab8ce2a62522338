"""``inverse_rope`` in plain Triton: several tokens of one head at a time.

role   does
all    ROWS tokens of a head: 384 elements copied, then 128, of which the second half is rotated

shared memory: none
barriers: none
strides: in elements
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ...configurations import configured
from ...launch import entry, launch_kernel
from ...lib.bits import round_to
from ...lib.rope import rotate, table_rows
from ...lib.sizes import cdiv
from ..inverse_rope_quant.plan import Call, Shape


class Config(NamedTuple):
    """Tokens of a tile."""

    rows: int
    warps: int


def plan(shape: Shape) -> Config:
    return Config(**configured("inverse_rope", "portable", shape.arch))


def launch(call: Call, config: Config) -> None:
    x = call.x
    t, h, _ = x.shape
    launch_kernel(
        _inverse_rope_kernel, (cdiv(t, config.rows) * h,),
        x, call.out, call.positions, call.cos_sin,
        t, h, h // call.groups, call.cos_sin.shape[0],
        x.stride(0), x.stride(1), call.cos_sin.stride(0),
        ROWS=config.rows, ALIGNED=call.aligned, OPERAND=call.shape.arch.bf16, num_warps=config.warps,
    )  # fmt: skip


@entry(triton.jit, "t", any_alignment=["positions"])
def _inverse_rope_kernel(
    x_ptr, out_ptr, positions, cos_sin,
    t, h, heads,  # of a group
    most,  # positions of the table
    x_stride_t, x_stride_h, table_stride,
    ROWS: tl.constexpr, ALIGNED: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    head = (tile % h).to(tl.int64)
    rows = (tile // h).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = rows < t
    x_stride_t, x_stride_h, table_stride = x_stride_t.to(tl.int64), x_stride_h.to(tl.int64), table_stride.to(tl.int64)
    if ALIGNED:
        x_stride_t, x_stride_h = tl.multiple_of(x_stride_t, 8), tl.multiple_of(x_stride_h, 8)
        table_stride = tl.multiple_of(table_stride, 4)
    wide, column = tl.arange(0, 256)[None, :], tl.arange(0, 128)[None, :]
    source = x_ptr + rows[:, None] * x_stride_t + head * x_stride_h
    # All loads before all stores.
    x0 = tl.load(source + wide, mask=ok[:, None])
    x1 = tl.load(source + 256 + column, mask=ok[:, None])
    x2 = tl.load(source + 384 + column, mask=ok[:, None], other=0.0)
    turned = rotate(x2.to(tl.float32), cos_sin, table_rows(positions, rows, ok, most) * table_stride, True)
    group, within = head // heads, head % heads
    target = out_ptr + (group * t + rows)[:, None] * (heads * 512) + within * 512
    tl.store(target + wide, x0, mask=ok[:, None])
    tl.store(target + 256 + column, x1, mask=ok[:, None])
    # A NaN keeps its bits where it is copied.
    x2 = tl.where(column < 64, x2, round_to(turned, tl.bfloat16, OPERAND))
    tl.store(target + 384 + column, x2, mask=ok[:, None])
