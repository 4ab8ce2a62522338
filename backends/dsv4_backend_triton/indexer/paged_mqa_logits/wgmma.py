"""``paged_mqa_logits`` for several tokens of a request (64 heads of 128, pages of 64 keys) on wgmma: warp-specialised,
persistent. The work is shared by the lengths, see ``schedule.py``.

The two consumers take the tiles of a program in turn. Each has one product on the tensor cores while it adds up the
heads of another: with 2 rows two pages of a tile, with 3 or 4 rows rows 0 and 1 and the others.

    role            warps   registers   does
    producer        1       32          fetches queries, keys and their scales through tensor maps
    consumer 0, 1   4 each  REGISTERS   keys x all queries, relu, head sum in registers, store; then -inf elsewhere

            two rows of 64 heads, or one
    64 keys [             S            ] -> [64, 2] or [64, 1] logits        K: the 128 dimensions

    shared memory                            bytes, ROWS = 2 and STAGES = 8
    a_smem [2, 2 * 64, 128] e4m3             32768     queries of rows 0 and 1, slot turn % 2
    b_smem [2, (ROWS - 2) * 64, 128] e4m3    -         of the others
    k_smem [STAGES, PAGES, 64, 128]          131072
    s_smem [STAGES, PAGES, 64] fp32          4096

    barrier          arrives                     waits       count
    q_full [2]       the tensor maps' bytes      consumers   1
    q_empty [2]      each consumer               producer    2
    k_full [STAGES]  the tensor maps' bytes      a consumer  1
    k_empty [STAGES] that consumer               producer    1

    strides: in elements
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...configurations import configured
from ...launch import entry, launch_kernel
from ...lib import ring
from ...lib.boxes import boxes
from ...lib.gluon import load_box, reinterpret
from ...lib.sizes import cdiv
from ..head_sum import HALF, logits, product, products, relu_head_sum
from .op import Call, Shape
from .schedule import FEW, MANY, count_places, item_of, part, share, tiles_of

KEYS = HALF  # of a page
DIM = gl.constexpr(128)
MOST_COLUMNS = 2**31 - 2**16  # the last tile lies behind them, and places are int32
_PAGE = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=3)
_SCALES = NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=8, rank=2)


class Config(NamedTuple):
    """Tiles of ``rows`` and, with 2 rows, two pages, with 3 or 4 rows one.

    Attributes:
        visit: As in the portable kernel.
    """

    rows: int
    stages: int
    registers: int
    visit: int


def plan(shape: Shape) -> Config | None:
    if shape.next_n < 2 or (shape.h, shape.d) != (64, 128):
        return None
    rows = cdiv(shape.next_n, cdiv(shape.next_n, 4))  # as few as keep the number of times that keys are read
    return Config(rows, **configured("paged_mqa_logits", "wgmma", shape.arch, size=rows))


def takes(call: Call) -> bool:
    """Contiguous queries, and pages of 64 keys on 16-byte boundaries."""
    q, cache = call.q, call.k_cache
    dense = q.is_contiguous() and (q.data_ptr() | cache.data_ptr() | cache.stride(0)) % 16 == 0
    pages = cache.shape[0] > 0 and cache.shape[1] == 64 and cache.stride(0) >= 64 * 132
    return dense and pages and call.out.shape[1] < MOST_COLUMNS


def launch(call: Call, config: Config) -> None:
    q, cache, lens, out, arch = call.q, call.k_cache, call.lens, call.out, call.shape.arch
    (b, next_n, _, _), pages, columns = q.shape, cache.shape[0], out.shape[1]
    stride, keys = cache.stride(0), 128 if config.rows == 2 else 64
    scales = cache.as_strided((pages, 256), (stride, 1), cache.storage_offset() + 64 * 128)
    places = b * cdiv(next_n, config.rows) * (cdiv(columns, keys) + config.visit)
    launch_kernel(
        _paged_mqa_logits_wgmma_kernel, (min(arch.sms, places),),
        boxes(q, [b * next_n * 64, 128], [128, 1], [64, 128], 8),
        TensorDescriptor(cache.view(arch.fp8_view), [pages, 64, 128], [stride, 128, 1], [1, 64, 128], _PAGE),
        TensorDescriptor(scales, [pages, 256], [stride, 1], [1, 256], _SCALES),
        *(call.weights, lens, call.table, out),
        *(b, next_n, columns, columns if call.fill else 0, min(columns, 64 * call.table.shape[1]), pages),
        *(call.weights.stride(0), lens.stride(0), lens.stride(1) if lens.dim() == 2 else 0),
        *(call.table.stride(0), out.stride(0)), ROWS=config.rows, STAGES=config.stages, REGISTERS=config.registers,
        SCAN=FEW if b <= FEW else MANY, VISIT=config.visit, num_warps=4,
    )  # fmt: skip


@gluon.jit
def _rows(ROWS: gl.constexpr, WARPS: gl.constexpr):
    """Rows 0 to ROWS - 1; of three the last is repeated."""
    span: gl.constexpr = 4 if ROWS == 3 else ROWS
    return gl.minimum(gl.arange(0, span, layout=gl.BlockedLayout([span], [32], [WARPS], [0])), ROWS - 1)


@gluon.jit
def _producer(
    descs, smem, bars, shares, lengths, tables, ROWS: gl.constexpr, STAGES: gl.constexpr, VISIT: gl.constexpr
):  # fmt: skip
    PAGES: gl.constexpr = 2 if ROWS == 2 else 1
    item, place, count, _, _, _, _ = shares
    q_desc, k_desc, s_desc = descs
    a_smem, b_smem, k_smem, s_smem = smem
    q_full, q_empty, k_full, k_empty = bars
    table_ptr, table_stride, _pages = tables
    _, _, next_n, _, _, _ = lengths
    row = _rows(ROWS, 1)
    each = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    step = 0
    turn = 0
    while count > 0:
        b, row0, length = item_of(row, item, lengths, ROWS)
        longest = gl.max(length, axis=0)
        first, last, count = part(place, count, tiles_of(longest, PAGES * KEYS), VISIT)
        place = 0
        item += 1
        if first < last:
            # 32 entries of the table at a time, and the next ones ahead; a page that no key needs is -1
            page_ptr = table_ptr + b * table_stride
            at = first * PAGES + each
            ahead = gl.load(page_ptr + at, mask=at * KEYS < longest, other=-1)
            slot = ring.empty_slot(q_empty, turn, 2)
            mbarrier.expect(q_full.index(slot), ROWS * 64 * DIM)
            q_row = ((b * next_n + row0) * 64).to(gl.int32)
            for r in gl.static_range(2):
                load_box(q_desc, [q_row + r * 64, 0], q_full.index(slot), a_smem.index(slot * 2 + r))
            for r in gl.static_range(2, ROWS):
                load_box(q_desc, [q_row + r * 64, 0], q_full.index(slot), b_smem.index(slot * (ROWS - 2) + r - 2))
            turn += 1
            for begin in range(first * PAGES, last * PAGES, 32):
                pages = ahead
                at += 32
                ahead = gl.load(page_ptr + at, mask=at * KEYS < longest, other=-1)
                for i in range(0, gl.minimum(last * PAGES - begin, 32), PAGES):
                    stage = ring.empty_slot(k_empty, step, STAGES)
                    mbarrier.expect(k_full.index(stage), PAGES * KEYS * (DIM + 4))
                    for p in gl.static_range(PAGES):
                        page = gl.sum(gl.where(each == i + p, pages, 0), axis=0)
                        load_box(k_desc, [page, 0, 0], k_full.index(stage), k_smem.index(stage * PAGES + p))
                        load_box(s_desc, [page, 0], k_full.index(stage), s_smem.index(stage * PAGES + p))
                    step += 1


@gluon.jit
def _values(b, row0, head, row, tensors, lengths):
    """Of the rows of a product: half of the weights, since the relu is doubled; the lengths; where to store, and up to
    which column."""
    w_ptr, out_ptr, w_stride, out_stride, max_len = tensors
    lens_ptr, _, next_n, limit, len_stride_b, len_stride_n = lengths
    w_row = row0 + head // 64
    w = 0.5 * gl.load(w_ptr + (b * next_n + w_row) * w_stride + head % 64, mask=w_row < next_n, other=0.0)
    row += row0
    length = gl.load(lens_ptr + b * len_stride_b + gl.minimum(row, next_n - 1) * len_stride_n)
    row_ptr = out_ptr + (b * next_n + row) * out_stride
    return w, gl.minimum(length, limit), row_ptr, gl.where(row < next_n, max_len, 0)


@gluon.jit
def _store(s, w, col, scale, bound, row_ptr, stop):
    """The logits of keys below the bound of each row, else -inf, in columns below ``stop``."""
    total = relu_head_sum(s, w) * scale[:, None]
    total = gl.where(col[:, None] < bound[None, :], total, float("-inf"))
    gl.store(row_ptr[None, :] + col[:, None], total, mask=col[:, None] < stop[None, :], cache_modifier=".cs")


@gluon.jit
def _fill(row_ptr, begin, end):
    """-inf to every second 1024 columns of [begin, end)."""
    lane = gl.arange(0, 1024, layout=gl.BlockedLayout([1], [32], [4], [0]))
    value = gl.full([1024], float("-inf"), gl.float32, layout=gl.BlockedLayout([1], [32], [4], [0]))
    for j in range(begin, end, 2048):
        gl.store(row_ptr + j + lane, value, mask=j + lane < end, cache_modifier=".cs")


@gluon.jit
def _consumer(
    WHO: gl.constexpr, tensors, smem, bars, shares, lengths, tables,
    ROWS: gl.constexpr, STAGES: gl.constexpr, VISIT: gl.constexpr,
):  # fmt: skip
    PAGES: gl.constexpr = 2 if ROWS == 2 else 1
    ROWS_B: gl.constexpr = 1 if ROWS == 3 else 2  # of the second product
    item, place, count, fill_item, fill_place, fill_count, all_tiles = shares
    row = _rows(ROWS, 4)
    head_a = gl.arange(0, 128, layout=gl.SliceLayout(0, products(2)))
    head_b = gl.arange(0, ROWS_B * 64, layout=gl.SliceLayout(0, products(ROWS_B)))
    key_a = gl.arange(0, KEYS, layout=gl.SliceLayout(1, logits(2)))
    key_b = gl.arange(0, KEYS, layout=gl.SliceLayout(1, logits(ROWS_B)))
    row_a = gl.arange(0, 2, layout=gl.SliceLayout(0, logits(2)))
    row_b = gl.arange(0, ROWS_B, layout=gl.SliceLayout(0, logits(ROWS_B)))
    _, out_ptr, _, out_stride, max_len = tensors
    _, _, next_n, _, _, _ = lengths
    table_ptr, table_stride, pages = tables
    a_smem, b_smem, k_smem, s_smem = smem
    q_full, q_empty, k_full, k_empty = bars
    done = 0  # tiles of the program before this item
    turn = 0
    while count > 0:
        b, row0, length = item_of(row, item, lengths, ROWS)
        longest = gl.max(length, axis=0)
        first, last, count = part(place, count, tiles_of(longest, PAGES * KEYS), VISIT)
        place = 0
        item += 1
        if first < last:
            w_a, length_a, ptr_a, stop_a = _values(b, row0, head_a, row_a, tensors, lengths)
            if ROWS == 2:
                w_b, length_b, ptr_b, stop_b = w_a, length_a, ptr_a, stop_a
            else:
                w_b, length_b, ptr_b, stop_b = _values(b, row0 + 2, head_b, row_b, tensors, lengths)
            page_ptr = table_ptr + b * table_stride
            slot = ring.full_slot(q_full, turn, 2)
            q_a = a_smem.index(slot).permute((1, 0))
            q_b = b_smem.index(slot).permute((1, 0))
            mine = first + (done + WHO) % 2
            if mine < last:
                step = done + mine - first
                page_a = gl.load(page_ptr + mine * PAGES)
                page_b = gl.load(page_ptr + mine * PAGES + 1, mask=(mine * PAGES + 1) * KEYS < longest, other=-1)
                stage = ring.full_slot(k_full, step, STAGES)
                a = product(k_smem.index(stage * PAGES), q_a)
                for j in range(mine, last, 2):
                    more = j + 2 < last
                    step += 2
                    col_a = j * (PAGES * KEYS) + key_a
                    col_b = j * (PAGES * KEYS) + (PAGES - 1) * KEYS + key_b
                    known_a = (page_a >= 0) & (page_a < pages)
                    known_b = known_a
                    if PAGES == 2:
                        known_b = (page_b >= 0) & (page_b < pages)
                        next_b = (j + 2) * PAGES + 1
                        page_b = gl.load(page_ptr + next_b, mask=next_b * KEYS < longest, other=-1)
                    page_a = gl.load(page_ptr + (j + 2) * PAGES, mask=more, other=-1)
                    scale_a = s_smem.index(stage * PAGES).load(gl.SliceLayout(1, logits(2)))
                    scale_b = s_smem.index(stage * PAGES + PAGES - 1).load(gl.SliceLayout(1, logits(ROWS_B)))
                    s = warpgroup_mma_wait(0, deps=[a])
                    other = product(k_smem.index(stage * PAGES + PAGES - 1), q_b)
                    mbarrier.arrive(k_empty.index((step + STAGES - 4) % STAGES), pred=j > mine)
                    after = step % STAGES
                    mbarrier.wait(k_full.index(after), (step // STAGES) & 1, pred=more)
                    # The branches keep the head sum behind the product's start: the assembler would mix them.
                    if row0 < next_n:
                        _store(s, w_a, col_a, scale_a, gl.where(known_a, length_a, 0), ptr_a, stop_a)
                    s = warpgroup_mma_wait(0, deps=[other])
                    # beyond the last tile: the product of any bytes, which is not used
                    a = product(k_smem.index(after * PAGES), q_a)
                    if row0 < next_n:
                        _store(s, w_b, col_b, scale_b, gl.where(known_b, length_b, 0), ptr_b, stop_b)
                    stage = after
                warpgroup_mma_wait(0, deps=[a])
                mbarrier.arrive(k_empty.index((step + STAGES - 2) % STAGES))
            mbarrier.arrive(q_empty.index(slot))
            turn += 1
            done += last - first
    while fill_count > 0:
        b, row0, length = item_of(row, fill_item, lengths, ROWS)
        tiles = tiles_of(gl.max(length, axis=0), PAGES * KEYS)
        first, last, fill_count = part(fill_place, fill_count, all_tiles - tiles, VISIT)
        fill_place = 0
        fill_item += 1
        begin = (tiles + first) * (PAGES * KEYS)
        end = gl.minimum((tiles + last) * (PAGES * KEYS), max_len)
        for i in range(gl.minimum(ROWS, next_n - row0)):
            _fill(out_ptr + (b * next_n + row0 + i) * out_stride, begin + (i + WHO) % 2 * 1024, end)


@entry(gluon.jit, "B", any_alignment=["w_ptr", "lens_ptr", "table_ptr", "out_ptr"])
def _paged_mqa_logits_wgmma_kernel(
    q_desc, k_desc, s_desc,  # [B * next_n * 64, 128], [pages, 64, 128], and the scales' bytes [pages, 256]
    w_ptr, lens_ptr, table_ptr, out_ptr,
    B, next_n,
    max_len, filled,  # columns; filled up to which
    limit, pages,
    w_stride, len_stride_b, len_stride_n, table_stride, out_stride,  # in elements
    ROWS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr, SCAN: gl.constexpr, VISIT: gl.constexpr,
):  # fmt: skip
    PAGES: gl.constexpr = 2 if ROWS == 2 else 1
    a_boxes = gl.allocate_shared_memory(q_desc.dtype, [4, 64, DIM], q_desc.layout)
    k_boxes = gl.allocate_shared_memory(k_desc.dtype, [STAGES * PAGES, 1, KEYS, DIM], k_desc.layout)
    s_boxes = gl.allocate_shared_memory(s_desc.dtype, [STAGES * PAGES, 1, KEYS * 4], s_desc.layout)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    a_smem = reinterpret(a_boxes, q_desc.dtype, [2, 128, DIM], q_desc.layout)
    if ROWS == 2:
        b_boxes, b_smem = a_boxes, a_smem
    else:
        b_boxes = gl.allocate_shared_memory(q_desc.dtype, [2 * (ROWS - 2), 64, DIM], q_desc.layout)
        b_smem = reinterpret(b_boxes, q_desc.dtype, [2, (ROWS - 2) * 64, DIM], q_desc.layout)
    k_smem = reinterpret(k_boxes, k_desc.dtype, [STAGES * PAGES, KEYS, DIM], q_desc.layout)
    s_smem = reinterpret(s_boxes, gl.float32, [STAGES * PAGES, KEYS], flat)
    q_full, q_empty = ring.barriers(2, (1, 2))
    k_full, k_empty = ring.barriers(STAGES, (1, 1))
    lengths = (lens_ptr, B, next_n, limit, len_stride_b, len_stride_n)
    lane = gl.arange(0, SCAN, layout=gl.BlockedLayout([SCAN // 32], [32], [gl.num_warps()], [0]))
    ends, total = count_places(lane, lengths, ROWS, PAGES * KEYS, SCAN, VISIT)
    all_tiles = (filled + PAGES * KEYS - 1) // (PAGES * KEYS)
    mine = share(lane, ends, total, all_tiles, lengths, ROWS, PAGES * KEYS, SCAN, VISIT, FILL=False)
    to_fill = share(lane, ends, total, all_tiles, lengths, ROWS, PAGES * KEYS, SCAN, VISIT, FILL=True)
    shares = mine + to_fill + (all_tiles,)
    tables = (table_ptr, table_stride, pages)
    tensors = (w_ptr, out_ptr, w_stride, out_stride, max_len)
    bars, smem = (q_full, q_empty, k_full, k_empty), (a_smem, b_smem, k_smem, s_smem)
    descs, boxed = (q_desc, k_desc, s_desc), (a_boxes, b_boxes, k_boxes, s_boxes)
    gl.warp_specialize(
        [
            (_consumer, (0, tensors, smem, bars, shares, lengths, tables, ROWS, STAGES, VISIT)),
            (_consumer, (1, tensors, smem, bars, shares, lengths, tables, ROWS, STAGES, VISIT)),
            (_producer, (descs, boxed, bars, shares, lengths, tables, ROWS, STAGES, VISIT)),
        ],
        [4, 1],
        [REGISTERS, 32],
    )
