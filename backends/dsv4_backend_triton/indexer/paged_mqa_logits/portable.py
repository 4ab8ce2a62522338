"""``paged_mqa_logits`` in plain Triton, persistent: as many blocks as run at once share the tiles of keys equally, then
the columns beyond them, whatever the lengths are (``schedule.py``). A block computes all next_n queries of a request,
or ROWS of them, at a time, and reads each key once for them.

    role   does
    all    tiles of keys: product with all heads of all rows, relu, head sum in registers, store; then -inf elsewhere

                 ROWS x BLOCK_H heads
    BLOCK_N keys [        S         ] -> [BLOCK_N, ROWS] logits     K: BLOCK_D

    K_MODE 0 looks every key's page up; 1 and 2 need PAGE % BLOCK_N == 0 and look one page up per tile, one
    tile ahead; 2 fetches keys through the tensor-map descriptor. No length reaches beyond ``limit``, where the table
    ends; a page that the cache does not have is not read (the descriptor reads zeros), and its keys are -inf.

    shared memory: ROWS * BLOCK_H * BLOCK_D + STAGES * BLOCK_N * BLOCK_D operands of 1 byte, or decoded of 2
    barriers: of the whole block, placed by Triton
    strides: as the signature says
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ...launch import entry, launch_kernel
from ...lib.bits import fp8_operand
from ...lib.sizes import cdiv
from ..heads import Config, constants, fill, fitted, load_q, padded, relu_head_sum
from .op import Call, Shape
from .schedule import FEW, MANY, count_places, item_of, part, share, tiles_of

_REGISTERS = 65536  # of a multiprocessor


def plan(shape: Shape) -> Config:
    config = fitted("paged_mqa_logits", shape.arch, shape.next_n, shape.h, shape.d)
    # The table is for up to 64 heads: with more, S takes more registers. Each thread takes about 72 others.
    threads, columns = 32 * config.warps, config.rows * padded(shape.h, shape.d)[0]
    most = _REGISTERS // (config.block_n * columns + 72 * threads)
    return config._replace(waves=max(1, min(config.waves, most)))


def launch(call: Call, config: Config) -> None:
    q, k_cache, lens, out, arch = call.q, call.k_cache, call.lens, call.out, call.shape.arch
    b, next_n, h, d = q.shape
    pages, page_size, page_stride, columns = k_cache.shape[0], k_cache.shape[1], k_cache.stride(0), out.shape[1]
    block_d = padded(h, d)[1]
    aligned = page_stride % 16 == 0 and all(s % 16 == 0 for s in q.stride()[:3])
    k_mode, k_desc = 0 if page_size % config.block_n else 1, None
    whole = pages > 0 and (pages == 1 or page_stride >= page_size * d)
    if k_mode and config.tma and d == block_d and page_stride % 16 == 0 and k_cache.data_ptr() % 16 == 0 and whole:
        k_mode, box = 2, [1, config.block_n, block_d]
        k_desc = TensorDescriptor(k_cache.view(arch.fp8_view), [pages, page_size, d], [page_stride, d, 1], box)
    # As many programs as run at once, which the registers limit, and not more than there are places.
    registers = _REGISTERS // (32 * config.warps * config.waves) // 8 * 8
    places = b * cdiv(next_n, config.rows) * (cdiv(columns, config.block_n) + config.visit)
    launch_kernel(
        _paged_mqa_logits_kernel, (min(config.waves * arch.sms, places),),
        *(q, k_cache, k_desc, call.weights, lens, call.table, out),
        *(b, next_n, columns, columns if call.fill else 0, min(columns, page_size * call.table.shape[1]), pages),
        *q.stride()[:3],
        *(page_stride, call.weights.stride(0), lens.stride(0), lens.stride(1) if lens.dim() == 2 else 0),
        *(call.table.stride(0), out.stride(0)), **constants(config, arch, h, d), PAGE=page_size, K_MODE=k_mode,
        ALIGNED=aligned, SCAN=FEW if b <= FEW else MANY, VISIT=config.visit, num_warps=config.warps,
        maxnreg=min(registers, 255),
    )  # fmt: skip


@entry(triton.jit, "B", any_alignment=["w_ptr", "lens_ptr", "table_ptr", "out_ptr"])
def _paged_mqa_logits_kernel(
    q_ptr, cache_ptr, k_desc, w_ptr, lens_ptr, table_ptr, out_ptr,
    B, next_n,
    max_len, filled,  # columns; filled up to which
    limit, pages,
    q_stride_b, q_stride_n, q_stride_h,  # in elements
    page_stride,  # in bytes
    w_stride, len_stride_b, len_stride_n, table_stride, out_stride,  # in elements
    H: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, K_MODE: tl.constexpr, ALIGNED: tl.constexpr,
    OPERAND: tl.constexpr, STAGES: tl.constexpr, SCAN: tl.constexpr, VISIT: tl.constexpr,
):  # fmt: skip
    if ALIGNED:
        q_stride_b = tl.multiple_of(q_stride_b.to(tl.int64), 16)
        q_stride_n = tl.multiple_of(q_stride_n.to(tl.int64), 16)
        q_stride_h = tl.multiple_of(q_stride_h.to(tl.int64), 16)
        page_stride = tl.multiple_of(page_stride.to(tl.int64), 16)
    lengths = (lens_ptr, B, next_n, limit, len_stride_b, len_stride_n)
    lane, row = tl.arange(0, SCAN), tl.arange(0, ROWS)
    ends, total = count_places(lane, lengths, ROWS, BLOCK_N, SCAN, VISIT)
    all_tiles = (filled + BLOCK_N - 1) // BLOCK_N
    item, place, count = share(lane, ends, total, all_tiles, lengths, ROWS, BLOCK_N, SCAN, VISIT, FILL=False)
    while count > 0:
        b, row0, length = item_of(row, item, lengths, ROWS)
        longest = tl.max(length, axis=0)
        first, last, count = part(place, count, tiles_of(longest, BLOCK_N), VISIT)
        place = 0
        item += 1
        if first < last:
            keys_ptr = table_ptr + b * table_stride
            c0 = first * BLOCK_N
            c1 = last * BLOCK_N
            if K_MODE != 0:
                page_next = tl.load(keys_ptr + c0 // PAGE)
            rows = row0 + tl.arange(0, ROWS)
            row_ok = rows < next_n
            out_row = b * next_n + rows
            rh = tl.arange(0, ROWS * BLOCK_H)
            q_row = tl.minimum(row0 + rh // BLOCK_H, next_n - 1)
            head = rh % BLOCK_H
            q = load_q(
                q_ptr + b * q_stride_b, q_row, q_row < next_n, head, q_stride_n, q_stride_h, H, D, BLOCK_D, OPERAND,
            )  # fmt: skip
            q_t = tl.trans(q)
            w = tl.load(w_ptr + (b * next_n + q_row) * w_stride + head, mask=head < H, other=0.0)
            dim = tl.arange(0, BLOCK_D)
            for j in tl.range(c0, c1, BLOCK_N, num_stages=STAGES):
                col = j + tl.arange(0, BLOCK_N)
                if K_MODE == 0:
                    page = tl.load(keys_ptr + col // PAGE, mask=col < longest, other=-1)
                    key_ok = (page >= 0) & (page < pages)
                    inside = key_ok[:, None] & (col[:, None] < length[None, :])
                    base = cache_ptr + page.to(tl.int64) * page_stride
                    slot = col % PAGE
                else:
                    known = (page_next >= 0) & (page_next < pages)
                    page = page_next.to(tl.int64)
                    key_ok = col < tl.where(known, longest, 0)
                    inside = col[:, None] < tl.where(known, length, 0)[None, :]
                    page_next = tl.load(keys_ptr + (j + BLOCK_N) // PAGE, mask=j + BLOCK_N < c1, other=0)
                    base = cache_ptr + page * page_stride
                    slot = j % PAGE + tl.arange(0, BLOCK_N)
                scale_ptr = (base + PAGE * D + slot * 4).to(tl.pointer_type(tl.float32))
                scale = tl.load(scale_ptr, mask=key_ok, other=0.0)
                if K_MODE == 2:
                    k = tl.reshape(k_desc.load([page.to(tl.int32), j % PAGE, 0]), (BLOCK_N, BLOCK_D))
                else:
                    k_ptr = (base + slot * D)[:, None] + dim[None, :]
                    if OPERAND == tl.float8e4nv:
                        k_ptr = k_ptr.to(tl.pointer_type(tl.float8e4nv))
                    k = tl.load(k_ptr, mask=key_ok[:, None] & (dim < D)[None, :], other=0.0)
                s = relu_head_sum(fp8_operand(k, OPERAND), q_t, w, ROWS, BLOCK_H, BLOCK_N) * (0.5 * scale)[:, None]
                s = tl.where(inside, s, float("-inf"))
                ptr = out_ptr + out_row[None, :] * out_stride + col[:, None]
                tl.store(ptr, s, mask=row_ok[None, :] & (col < max_len)[:, None], cache_modifier=".cs")

    item, place, count = share(lane, ends, total, all_tiles, lengths, ROWS, BLOCK_N, SCAN, VISIT, FILL=True)
    while count > 0:
        b, row0, length = item_of(row, item, lengths, ROWS)
        tiles = tiles_of(tl.max(length, axis=0), BLOCK_N)
        first, last, count = part(place, count, all_tiles - tiles, VISIT)
        place = 0
        item += 1
        rows = row0 + tl.arange(0, ROWS)
        begin = (tiles + first) * BLOCK_N
        end = tl.minimum((tiles + last) * BLOCK_N, max_len)
        fill(out_ptr, b * next_n + rows, rows < next_n, out_stride, begin, end, 16 * BLOCK_N // ROWS)
