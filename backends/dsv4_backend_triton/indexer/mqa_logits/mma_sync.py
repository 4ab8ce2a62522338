"""``mqa_logits`` (64 heads of 128) on mma.sync where e4m3 is not in hardware, in Gluon.

What limits plain Triton here is the number of instructions: two warps decode each key. Here a warp has keys of its own,
decodes each once, and reads all queries, which are decoded once a block.

    role   warps   does
    all    4       cp.async of the next keys; decodes its 32 keys; products, relu, head sum in registers, store

             2 queries of 64 heads
    KEYS keys [         S         ] -> [KEYS, 2] logits     K: 32 dimensions at a time, 32 columns at a time

Operands are fp16: an e4m3 value times 144, which is exact, and a NaN is infinite or NaN. A product of finite ones is
finite, so a key with a NaN shows in every head.

    shared memory                     bytes, with STAGES = 1
    q_smem [128, 128] fp16            32768
    k_smem [STAGES, KEYS, 128] e4m3   16384
    w_smem [128] fp32                   512

    barriers: of the whole block, placed by Triton; cp.async groups, one a tile
    strides: q and k in 16 bytes, others in elements
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from ...configurations import configured
from ...launch import entry, launch_kernel
from ...lib.bits import RELU_TERM
from ...lib.gluon import async_load, reordered, times_144
from ...lib.mma_sync import ROWS_LAYOUT, halves
from ...lib.sizes import cdiv
from .op import Call, Shape

ROWS = gl.constexpr(2)  # queries of a block
DIM = gl.constexpr(128)
HEADS = gl.constexpr(64)
COLUMNS = gl.constexpr(128)
KEYS = gl.constexpr(128)  # 32 for each warp
FEW = 12
"""Tiles for each slot, which is room for a block, up to which the slots are not filled in turns."""
LEAST = 2
"""Tiles of the smallest chunk of a call with more."""
_PART = gl.constexpr(32)
_RELU_TERM = gl.constexpr(RELU_TERM)
_QUADS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 0, 2], [64, 0, 0]],
        lane_bases=[[0, 1, 0], [8, 0, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        warp_bases=[[16, 0, 0], [32, 0, 0]],
        block_bases=[],
        shape=[128, 2, 4],
    )
)
"""Sums over some heads, [KEYS, ROWS, 4]: the 4 in registers of one thread."""
_ROW_EACH = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 0, 1], [8, 0, 0, 0], [64, 0, 0, 0]],
        lane_bases=[[0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]],
        warp_bases=[[16, 0, 0, 0], [32, 0, 0, 0]],
        block_bases=[],
        shape=[128, 2, 2, 2],
    )
)
"""The same, [KEYS, ROWS, 2, 2]: a thread has both of the last 2, and one row."""
_KEY_EACH = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [64, 0, 0]],
        lane_bases=[[0, 1, 0], [8, 0, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        warp_bases=[[16, 0, 0], [32, 0, 0]],
        block_bases=[],
        shape=[128, 2, 2],
    )
)
"""Sums over more heads, [KEYS, ROWS, 2]: a thread has both, and two keys."""


class Config(NamedTuple):
    """``blocks``: that a multiprocessor has room for. ``shuffles``: the last head sums need no shared memory, and about
    2 % more time."""

    stages: int
    blocks: int
    registers: int
    shuffles: bool


def plan(shape: Shape) -> Config | None:
    if shape.rows < ROWS.value or (shape.h, shape.d) != (HEADS.value, DIM.value):
        return None
    return Config(**configured("mqa_logits", "mma_sync", shape.arch))


def takes(call: Call) -> bool:
    """Queries and keys on 16-byte boundaries, keys within 32 GiB, and places of columns in int32."""
    q, k = call.q, call.k
    aligned = (q.data_ptr() | k.data_ptr() | q.stride(0) | q.stride(1) | k.stride(0)) % 16 == 0
    return aligned and k.shape[0] * k.stride(0) < 2**35 and call.out.shape[1] < 2**31 - 2**16


class Cut(NamedTuple):
    """How the tiles with keys of a block of queries are cut: ``wave`` equal chunks have what is left but for one
    ``rest``-th, the next ones what is left then. A chunk has at least ``least`` tiles."""

    wave: int
    rest: int
    least: int

    def chunks(self, tiles: int) -> int:
        found = 0
        while tiles > 0:
            size = max(cdiv(tiles - tiles // self.rest, self.wave), self.least)
            found += min(self.wave, cdiv(tiles, size))
            tiles -= self.wave * size
        return found


def cut(tiles: int, row_blocks: int, slots: int) -> Cut:
    """Blocks start in order, so the first chunks are long and the last short: few blocks decode queries, and all slots
    have work until the end. The first take at most three quarters of the time of the call."""
    if tiles * row_blocks <= FEW * slots:  # blocks of at most 4 tiles, for two thirds of the slots at least
        size = min(cdiv(3 * tiles * row_blocks, 4 * slots), 4)
        return Cut(cdiv(tiles, size), tiles + 1, 1)
    wave = max(slots // row_blocks, 1)
    rest = max(row_blocks // slots, 3 if 4 * row_blocks >= 5 * slots else 2)
    return Cut(wave, rest, LEAST)


def launch(call: Call, config: Config) -> None:
    (m, _, _), n, columns, arch = call.q.shape, call.k.shape[0], call.out.shape[1], call.shape.arch
    row_blocks = cdiv(m, ROWS.value)
    tiles = cdiv(columns, KEYS.value)
    by = cut(tiles, row_blocks, config.blocks * arch.sms)
    launch_kernel(
        _mqa_logits_mma_sync_kernel, (row_blocks, by.chunks(tiles)),
        *(call.q, call.k, call.k_scale, call.weights, call.starts, call.ends, call.out),
        *(m, n, columns, call.q.stride(0) // 16, call.q.stride(1) // 16, call.k.stride(0) // 16),
        *(call.weights.stride(0), call.out.stride(0), *by),
        COMPRESSED=call.shape.compressed, STAGES=config.stages, SHUFFLES=config.shuffles, num_warps=4,
        maxnreg=config.registers,
    )  # fmt: skip


@gluon.jit
def _chunk(tiles, by):
    """The first tile of this block's chunk, and behind its last: see ``Cut``. The last block has whatever is left."""
    wave, rest, least = by
    index = gl.program_id(1)
    left = tiles
    size = gl.maximum((left - left // rest + wave - 1) // wave, least)
    while index >= wave:
        index -= wave
        left -= wave * size
        size = gl.maximum((left - left // rest + wave - 1) // wave, least)
    first = gl.minimum(tiles - left + index * size, tiles)
    last = gl.where(gl.program_id(1) == gl.num_programs(1) - 1, tiles, gl.minimum(first + size, tiles))
    return first, last


@gluon.jit
def _eights(x):
    """[KEYS, 32] as four of 8 columns."""
    low, high = halves(x)
    return halves(low) + halves(high)


@gluon.jit
def _add_terms(t, x, w_smem):
    """Twice relu(x) * w, added to ``t``: in place, since the compiler would move it behind the products."""
    w = w_smem.load(gl.SliceLayout(0, x.type.layout))[None, :]
    return gl.inline_asm_elementwise(_RELU_TERM, "=f,f,f,f", [x, w, t], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def _total(sums, SHUFFLES: gl.constexpr):
    """The sums of the rows, each [KEYS, 4] in four threads, as [KEYS, ROWS]."""
    joined = gl.permute(gl.join(sums[0], sums[1]), (0, 2, 1))
    if SHUFFLES:  # two steps, each of which exchanges one bit of the place
        pairs = gl.sum(gl.convert_layout(gl.reshape(joined, [KEYS, ROWS, 2, 2]), _ROW_EACH), 3)
        total = gl.sum(gl.convert_layout(pairs, _KEY_EACH), 2)
    else:
        total = gl.sum(gl.convert_layout(joined, _QUADS), 2)
    return gl.convert_layout(total, gl.SliceLayout(2, _QUADS))


@gluon.jit
def _copy(buffer, k_ptr, key, n, k_stride, dims):
    """Start the copy of keys. Past the last it is repeated, and not in any row's range."""
    row = k_ptr + (gl.minimum(key, n - 1) * k_stride).to(gl.int64) * 16
    async_load(buffer, row[:, None] + dims[None, :])


@gluon.jit
def _fill(out_ptr, row, count, out_stride, begin, end):
    """-inf to columns [begin, end) of ``count`` rows."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    lane = gl.arange(0, 512, layout=layout)
    value = gl.full([512], float("-inf"), gl.float32, layout=layout)
    for j in range(begin, end, 512):
        for i in range(count):
            col = j + lane
            gl.store(out_ptr + (row + i).to(gl.int64) * out_stride + col, value, mask=col < end, cache_modifier=".cs")


@gluon.jit
def _range(row, starts_ptr, ends_ptr, m, n):
    """First and last key of a row, both 0 if it has none."""
    at = gl.minimum(row, m - 1)
    start = gl.minimum(gl.maximum(gl.load(starts_ptr + at), 0), n)
    end = gl.minimum(gl.maximum(gl.load(ends_ptr + at), 0), n)
    return start, end


@entry(gluon.jit, "m", any_alignment=["k_scale_ptr", "w_ptr", "starts_ptr", "ends_ptr", "out_ptr"])
def _mqa_logits_mma_sync_kernel(
    q_ptr, k_ptr, k_scale_ptr, w_ptr, starts_ptr, ends_ptr, out_ptr,
    m, n, n_cols,
    q_stride_m, q_stride_h, k_stride,  # in 16 bytes
    w_stride, out_stride,
    wave, rest, least,
    COMPRESSED: gl.constexpr, STAGES: gl.constexpr, SHUFFLES: gl.constexpr,
):  # fmt: skip
    AHEAD: gl.constexpr = max(STAGES - 1, 1)  # with one stage, from when the tile is in registers
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[4, 1], instr_shape=[16, 8])
    logits: gl.constexpr = gl.SliceLayout(2, _QUADS)  # [KEYS, ROWS]
    bytes_of: gl.constexpr = gl.DotOperandLayout(0, mma, 4)  # four a thread
    lhs: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    rhs: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    bytes_lay: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    byte_rows: gl.constexpr = gl.SliceLayout(1, bytes_lay)
    keys_lay: gl.constexpr = gl.SliceLayout(1, logits)
    q_smem = gl.allocate_shared_memory(gl.float16, [COLUMNS, DIM], ROWS_LAYOUT)
    k_smem = gl.allocate_shared_memory(gl.uint8, [STAGES, KEYS, DIM], gl.SwizzledSharedLayout(16, 1, 8, [1, 0]))
    w_smem = gl.allocate_shared_memory(gl.float32, [COLUMNS], gl.SwizzledSharedLayout(1, 1, 1, [0]))

    row0 = gl.program_id(0) * ROWS
    which = gl.arange(0, ROWS, gl.SliceLayout(0, logits))[None, :]
    start0, end0 = _range(row0, starts_ptr, ends_ptr, m, n)
    start1, end1 = _range(row0 + 1, starts_ptr, ends_ptr, m, n)
    start = gl.where(which == 0, start0, start1)
    end = gl.where(which == 0, end0, end1)
    apart = (start0 != start1).to(gl.int32)
    out = out_ptr + (row0 + which).to(gl.int64) * out_stride

    dims = gl.arange(0, DIM, gl.SliceLayout(0, bytes_lay))
    column = gl.arange(0, COLUMNS, byte_rows)
    q_row = gl.minimum(row0 + column // 64, m - 1).to(gl.int64) * (q_stride_m.to(gl.int64) * 16)
    q = q_ptr + (q_row + (column % 64) * (q_stride_h * 16))[:, None] + dims[None, :]
    q16 = reordered(times_144(gl.load(q)))
    q_smem.store(q16 + q16 * 0.0)  # infinite to NaN

    # half, since the relu is doubled, and 1/144 of the keys
    head = gl.arange(0, COLUMNS, gl.BlockedLayout([1], [32], [4], [0]))
    w_row = gl.minimum(row0 + head // 64, m - 1).to(gl.int64) * w_stride
    w_smem.store(gl.load(w_ptr + w_row + head % 64) * (0.5 / 144))

    copied = gl.arange(0, KEYS, byte_rows)
    key_of = gl.arange(0, KEYS, keys_lay)
    groups = 1
    if COMPRESSED:  # rows that start at different keys have a pass each
        groups = 1 + apart
    for group in range(groups):
        both = groups == 1
        count = gl.minimum(gl.where(both, ROWS, 1), m - row0 - group)
        first = row0 + group
        origin = 0
        lo = 2147483647
        hi = 0
        for i in gl.static_range(ROWS):
            start_i, end_i = (start0, end0) if i == 0 else (start1, end1)
            if COMPRESSED:
                origin = gl.where(group == i, start_i, origin)
            has = (end_i > start_i) & (both | (group == i)) & (row0 + i < m)
            lo = gl.minimum(lo, gl.where(has, start_i, 2147483647))
            hi = gl.maximum(hi, gl.where(has, end_i, 0))
        # tiles of the output: all, those with keys, and the block's
        all_tiles = (n_cols + KEYS - 1) // KEYS
        first_tile = gl.minimum((lo - origin) // KEYS, all_tiles)
        tiles = gl.maximum((gl.minimum(hi - origin, n_cols) + KEYS - 1) // KEYS - first_tile, 0)
        begin, last = _chunk(tiles, (wave, rest, least))
        # this block's part of the columns without keys, before and behind those with keys
        some = (all_tiles - tiles + gl.num_programs(1) - 1) // gl.num_programs(1)
        gap = gl.program_id(1) * some
        before, behind = gl.minimum(gap, first_tile), gl.minimum(gap + some, first_tile)
        _fill(out_ptr, first, count, out_stride, before * KEYS, gl.minimum(behind * KEYS, n_cols))
        before, behind = gl.maximum(gap, first_tile) + tiles, gl.minimum(gap + some, all_tiles - tiles) + tiles
        _fill(out_ptr, first, count, out_stride, before * KEYS, gl.minimum(behind * KEYS, n_cols))
        lo_col = (first_tile + begin) * KEYS
        tiles = last - begin

        wanted = (both | (which == group)) & (row0 + which < m)
        key0 = origin + lo_col
        for i in gl.static_range(AHEAD):
            if i < tiles:
                _copy(k_smem.index(i), k_ptr, key0 + i * KEYS + copied, n, k_stride, dims)
            async_copy.commit_group()
        for tile in range(tiles):
            async_copy.wait_group(AHEAD - 1)
            ahead = key0 + gl.minimum(tile + AHEAD, tiles - 1) * KEYS + copied
            if STAGES > 1:
                _copy(k_smem.index((tile + AHEAD) % STAGES), k_ptr, ahead, n, k_stride, dims)
                async_copy.commit_group()
            here = k_smem.index(tile % STAGES)
            a = ()
            for c in gl.static_range(DIM // 32):
                raw = here.slice(c * 32, 32, 1).load(bytes_of)
                a += (gl.convert_layout(reordered(times_144(raw)), lhs),)  # type: ignore[assignment]
            if STAGES == 1:
                _copy(k_smem.index(0), k_ptr, ahead, n, k_stride, dims)
                async_copy.commit_group()
            sums = ()
            pieces = ()
            for part in gl.static_range(2 * ROWS + 1):  # the sums of one under the products of the next
                if part < 2 * ROWS:
                    s = gl.zeros([KEYS, _PART], gl.float32, mma)
                for c in gl.static_range(DIM // 32):
                    if part < 2 * ROWS:
                        b = q_smem.slice(part * _PART, _PART, 0).slice(c * 32, 32, 1).permute((1, 0)).load(rhs)
                        s = mma_v2(a[c], b, s)
                    if part > 0:
                        if part % 2 == 1 and c == 0:
                            t = pieces[0] * 0.0  # type: ignore[misc]  # NaN of a key with a NaN
                        t = _add_terms(t, pieces[c], w_smem.slice((part - 1) * _PART + c * 8, 8))
                if part > 0 and part % 2 == 0:
                    sums += (gl.sum(gl.reshape(t, [KEYS, 4, 2]), 2),)  # type: ignore[assignment]
                if part < 2 * ROWS:
                    pieces = _eights(s)
            key = key0 + tile * KEYS + key_of
            scale = gl.load(k_scale_ptr + key, mask=key < n, other=0.0) * (1.0 / 144)
            total = _total(sums, SHUFFLES) * scale[:, None]
            total = gl.where((key[:, None] >= start) & (key[:, None] < end), total, float("-inf"))
            col = lo_col + tile * KEYS + key_of
            gl.store(out + col[:, None], total, mask=(col < n_cols)[:, None] & wanted, cache_modifier=".cs")
        async_copy.wait_group(0)
