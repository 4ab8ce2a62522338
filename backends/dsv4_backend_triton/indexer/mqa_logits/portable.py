"""``mqa_logits`` in plain Triton: a block is ROWS queries against a chunk of the output's columns.

role   does
all    a tile of keys: product with all heads of all rows, relu, head sum in registers, store; -inf elsewhere

             ROWS x BLOCK_H heads
BLOCK_N keys [        S         ] -> [BLOCK_N, ROWS] logits     K: BLOCK_D

Keys are the M side, so that the head sum runs along registers of one thread. Columns are keys, or with COMPRESSED
keys - row start; compressed rows that start at different keys cannot share a tile: then each row has its own pass.

shared memory: ROWS * BLOCK_H * BLOCK_D + STAGES * BLOCK_N * BLOCK_D operands of 1 byte, or decoded of 2
barriers: of the whole block, placed by Triton
strides: in elements
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ...launch import entry, launch_kernel
from ...lib.bits import fp8_operand
from ...lib.sizes import cdiv
from ..heads import Config, chunk_of, constants, fill, fitted, load_q, padded, relu_head_sum
from .op import Call, Shape


def plan(shape: Shape) -> Config:
    """Only whether there is more than one row matters, so at most two kernels are compiled.

    A tile of 128 keys: one 16-row slice of them for each of the 4 warps and its instruction, so that no key is read, or
    decoded from bytes, by two warps. By the compiled loops, mma.sync is then at its peak or near it (0.95 to 1), with
    64 keys at 0.4 to 0.6.
    """
    return fitted("mqa_logits", shape.arch, None if shape.rows > 1 else 1, shape.h, shape.d)


def launch(call: Call, config: Config) -> None:
    q, k, out, shape = call.q, call.k, call.out, call.shape
    (m, h, d), n, n_cols = q.shape, k.shape[0], out.shape[1]
    block_d = padded(h, d)[1]
    aligned = q.stride(0) % 16 == 0 and q.stride(1) % 16 == 0 and k.stride(0) % 16 == 0
    apart = n == 1 or (n > 1 and k.stride(0) >= d)
    tma = config.tma and k.stride(0) % 16 == 0 and k.data_ptr() % 16 == 0 and apart and d == block_d
    k_src = TensorDescriptor(k, [n, d], [k.stride(0), 1], [config.block_n, block_d]) if tma else k
    row_blocks = cdiv(m, config.rows)
    chunk = chunk_of(n_cols, row_blocks, config, shape.arch.sms)
    launch_kernel(
        _mqa_logits_kernel, (row_blocks, cdiv(n_cols, chunk)),
        *(q, k_src, call.k_scale, call.weights, call.starts, call.ends, out),
        *(m, n, n_cols, q.stride(0), q.stride(1), k.stride(0), call.weights.stride(0), out.stride(0), chunk),
        **constants(config, shape.arch, h, d), COMPRESSED=shape.compressed, K_TMA=tma, ALIGNED=aligned,
        num_warps=config.warps,
    )  # fmt: skip


@entry(triton.jit, "m", any_alignment=["k_scale_ptr", "w_ptr", "starts_ptr", "ends_ptr", "out_ptr"])
def _mqa_logits_kernel(
    q_ptr,
    k_src,  # a pointer, or with K_TMA a tensor map
    k_scale_ptr, w_ptr, starts_ptr, ends_ptr, out_ptr,
    m, n, n_cols,
    q_stride_m, q_stride_h, k_stride, w_stride, out_stride,  # all in elements
    chunk,
    H: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, COMPRESSED: tl.constexpr, K_TMA: tl.constexpr, ALIGNED: tl.constexpr,
    OPERAND: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row_block = tl.program_id(0)
    c0 = tl.program_id(1) * chunk
    c1 = tl.minimum(c0 + chunk, n_cols)
    if ALIGNED:
        q_stride_m = tl.multiple_of(q_stride_m.to(tl.int64), 16)
        q_stride_h = tl.multiple_of(q_stride_h.to(tl.int64), 16)
        k_stride = tl.multiple_of(k_stride.to(tl.int64), 16)

    # rows past m repeat the last row and are not stored
    rows = row_block * ROWS + tl.arange(0, ROWS)
    row_ok = rows < m
    row_of = tl.minimum(rows, m - 1)
    start = tl.minimum(tl.maximum(tl.load(starts_ptr + row_of), 0), n)
    end = tl.minimum(tl.maximum(tl.load(ends_ptr + row_of), 0), n)

    rh = tl.arange(0, ROWS * BLOCK_H)
    q_row = tl.minimum(row_block * ROWS + rh // BLOCK_H, m - 1)
    head = rh % BLOCK_H
    q = load_q(q_ptr, q_row, q_row < m, head, q_stride_m, q_stride_h, H, D, BLOCK_D, OPERAND)
    q_t = tl.trans(q)
    w = tl.load(w_ptr + q_row.to(tl.int64) * w_stride + head, mask=head < H, other=0.0)

    first = tl.min(start, axis=0)
    n_groups = 1
    if COMPRESSED:
        shared = first == tl.max(start, axis=0)
        n_groups = tl.where(shared, 1, ROWS)
    for group in range(n_groups):
        selected = row_ok
        origin = 0
        if COMPRESSED:
            # all rows, or the group's; the interpreter cannot combine a mask and a scalar by or
            row = tl.arange(0, ROWS)
            selected = row_ok & (row == tl.where(shared, row, group))
            origin = tl.where(shared, first, tl.sum(tl.where(tl.arange(0, ROWS) == group, start, 0), axis=0))
        filled = selected & (end > start)
        lo = tl.min(tl.where(filled, start, 2147483647), axis=0)
        hi = tl.max(tl.where(filled, end, 0), axis=0)
        lo_col = tl.minimum(tl.maximum(c0, (lo - origin) // BLOCK_N * BLOCK_N), c1)
        hi_col = tl.maximum(tl.minimum(c1, hi - origin), lo_col)
        hi_col = tl.minimum((hi_col + BLOCK_N - 1) // BLOCK_N * BLOCK_N, c1)
        fill(out_ptr, rows, selected, out_stride, c0, lo_col, 4 * BLOCK_N)
        fill(out_ptr, rows, selected, out_stride, hi_col, c1, 4 * BLOCK_N)
        for j in tl.range(lo_col, hi_col, BLOCK_N, num_stages=STAGES):
            col = j + tl.arange(0, BLOCK_N)
            key = origin + col
            key_ok = key < n
            scale = tl.load(k_scale_ptr + key, mask=key_ok, other=0.0)
            if K_TMA:
                k = k_src.load([origin + j, 0])
            else:
                dim = tl.arange(0, BLOCK_D)
                k_ptr = k_src + key.to(tl.int64)[:, None] * k_stride + dim[None, :]
                k = tl.load(k_ptr, mask=key_ok[:, None] & (dim < D)[None, :], other=0.0)
            k = fp8_operand(k, OPERAND)
            s = relu_head_sum(k, q_t, w, ROWS, BLOCK_H, BLOCK_N) * (0.5 * scale)[:, None]
            inside = (key[:, None] >= start[None, :]) & (key[:, None] < end[None, :])
            s = tl.where(inside, s, float("-inf"))
            ptr = out_ptr + rows.to(tl.int64)[None, :] * out_stride + col[:, None]
            tl.store(ptr, s, mask=selected[None, :] & (col < c1)[:, None], cache_modifier=".cs")
