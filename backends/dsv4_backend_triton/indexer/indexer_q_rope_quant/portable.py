"""``indexer_q_rope_quant`` in plain Triton: several heads of one token at a time.

role   does
all    ROWS heads of a token: the second half of each rotated, all of it transformed (HADAMARD) and quantised

shared memory: that of reductions; with HADAMARD 512 * ROWS bytes, through which rows are transposed and back
barriers: of the whole block, placed by Triton
strides: in elements
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...configurations import configured
from ...launch import entry, launch_kernel
from ...lib.bits import quantize, rounded_to_bf16
from ...lib.hadamard import hadamard128
from ...lib.rope import rotate, table_rows
from ...lib.sizes import cdiv, pow2
from .plan import Call, Shape


class Config(NamedTuple):
    """Most heads of a tile."""

    rows: int
    warps: int


def plan(shape: Shape) -> Config:
    role = "hadamard" if shape.hadamard else ""
    config = Config(**configured("indexer_q_rope_quant", "portable", shape.arch, role=role))
    return config._replace(rows=min(config.rows, pow2(shape.h, 8)))


def launch(call: Call, config: Config) -> None:
    q, weights, arch = call.q, call.weights, call.shape.arch
    t, h, _ = q.shape
    tiles = cdiv(h, config.rows)
    launch_kernel(
        _indexer_q_kernel, (t * tiles,),
        q, call.q_fp8.view(torch.uint8), weights, call.weights_out, call.positions, call.cos_sin,
        call.scale, h, tiles, call.cos_sin.shape[0],
        q.stride(0), q.stride(1), weights.stride(0), call.cos_sin.stride(0),
        ROWS=config.rows, HADAMARD=call.shape.hadamard, ALIGNED=call.aligned, NATIVE=arch.native_fp8, OPERAND=arch.bf16,
        num_warps=config.warps,
    )  # fmt: skip


@entry(triton.jit, "h", any_alignment=["w_ptr", "positions"])
def _indexer_q_kernel(
    q_ptr, out_ptr, w_ptr, w_out_ptr, positions, cos_sin,
    scale,
    h, tiles,  # heads; tiles of a token
    most,  # positions of the table
    q_stride_t, q_stride_h, w_stride, table_stride,
    ROWS: tl.constexpr, HADAMARD: tl.constexpr, ALIGNED: tl.constexpr, NATIVE: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    token = (tile // tiles).to(tl.int64)
    heads = (tile % tiles) * ROWS + tl.arange(0, ROWS)
    ok = heads < h
    q_stride_t, q_stride_h, table_stride = q_stride_t.to(tl.int64), q_stride_h.to(tl.int64), table_stride.to(tl.int64)
    if ALIGNED:
        q_stride_t, q_stride_h = tl.multiple_of(q_stride_t, 8), tl.multiple_of(q_stride_h, 8)
        table_stride = tl.multiple_of(table_stride, 4)
    column = tl.arange(0, 128)[None, :]
    source = q_ptr + token * q_stride_t + heads[:, None] * q_stride_h + column
    x = tl.load(source, mask=ok[:, None], other=0.0)
    weight = tl.load(w_ptr + token * w_stride + heads, mask=ok, other=0.0).to(tl.float32)
    x = rotate(x.to(tl.float32), cos_sin, table_rows(positions, token, True, most) * table_stride, False)
    x = rounded_to_bf16(x, OPERAND)
    if HADAMARD:
        x = rounded_to_bf16(hadamard128(x), OPERAND)
    y, own, _ = quantize(x, NATIVE)
    row = token * h + heads
    tl.store(out_ptr + row[:, None] * 128 + column, y, mask=ok[:, None])
    tl.store(w_out_ptr + row, weight * own * scale, mask=ok)
