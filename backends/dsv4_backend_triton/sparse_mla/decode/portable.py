"""Sparse MLA decode over the paged FP8 cache, in plain Triton: one program serves one query row, a block of heads and
one split of the row's keys.

It gathers every KV row once (K and V are the same vector), decodes it to bf16 in registers and uses it in both
products. A row's two scopes are one list of tiles, so they share one softmax. Loops end at the row's own length.

    role   does
    all    loads the bytes of the next tile; decodes a tile, S = Q K^T, the softmax, O += P V

             BN keys           512 columns
    BH heads [ S ]  K: 512    [     O     ]  K: BN

    shared memory: what Triton takes for the operands of both products
    barriers: of the whole block, placed by Triton
    strides: as the signature says
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from ...configurations import configured
from ...launch import entry
from ...lib.bits import round_to
from ...lib.sizes import cdiv
from ...lib.softmax import LN2, NEGATIVE, attend
from .cache_rows import UNBIAS, gather, keys_of
from .combine import launch_splits
from .plan import ANY_ALIGNMENT, MOST_SPLITS, Call, Plan, Shape, Tile, splits_for


def plan(shape: Shape) -> Plan:
    """With few rows every program gets one tile, the smallest with which all programs still run at once."""
    programs, sms = shape.planned_rows * cdiv(shape.heads, 16), shape.arch.sms
    for role in ("small", "medium"):
        tile = _tile(shape, role)
        tiles = shape.tiles(tile.keys)
        if programs * tiles <= sms and tiles <= MOST_SPLITS and not (role == "medium" and shape.unaligned):
            return Plan(tile, tiles, single=True)
    tile = _tile(shape, "bytes" if shape.unaligned else "loop")  # in a loop of byte loads 64 keys take more than 99 KiB
    return Plan(tile, splits_for(programs, shape.tiles(tile.keys), sms))


def _tile(shape: Shape, role: str) -> Tile:
    return Tile(**configured("sparse_mla_decode", "portable", shape.arch, role=role))


def launch(call: Call, plan: Plan) -> None:
    tile = plan.tile
    launch_splits(
        _decode_kernel, call, plan, words=False, block_heads=tile.heads, BH=tile.heads, BN=tile.keys,
        THREADS=32 * tile.warps, SINGLE=plan.single, POW2=call.scopes.pow2, UNIT=call.scopes.unit, Q_UNIT=call.q_unit,
        OPERAND=call.shape.arch.bf16, num_warps=tile.warps, num_stages=1,
    )  # fmt: skip


@triton.jit
def _tile_index(i, here1, first1, first2, splits, idx1, idx2, length1, length2, BN: tl.constexpr):
    """The indices of the i-th tile of this split, and whether each lies within its row's length."""
    one = i < here1
    tile = tl.where(one, first1 + i * splits, first2 + (i - here1) * splits)
    k = tile * BN + tl.arange(0, BN)
    inside = k < tl.where(one, length1, length2)
    index = tl.load(tl.where(one, idx1, idx2) + k, mask=inside, other=-1)
    return index, one


@triton.jit
def _block_index(AXIS: tl.constexpr, OPERAND: tl.constexpr):
    """The program's index, by PTX that is opaque to the compiler: with ``tl.program_id`` it keeps the index and all
    that is derived from it in registers across a loop, which spills."""
    if OPERAND == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "mov.u32 $0, %ctaid." + ("x" if AXIS == 0 else "y") + ";", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        return tl.program_id(AXIS)


@entry(triton.jit, "has_sink", any_alignment=ANY_ALIGNMENT)
def _decode_kernel(
    q, out, lse, part, part_lse, sink,
    cache1, idx1, len1, cache2, idx2, len2,
    has_sink: tl.int32, has_len1: tl.int32, has_len2: tl.int32,
    scale_log2: tl.float32,
    heads: tl.int32, block_heads: tl.int32, head_blocks: tl.int32, s_q: tl.int32, splits: tl.int32,
    q_sb: tl.int64, q_ss: tl.int64, q_sh: tl.int64, o_sb: tl.int64, o_ss: tl.int64, o_sh: tl.int64,  # in Q_UNITs
    i1_sb: tl.int64, i1_ss: tl.int64, i2_sb: tl.int64, i2_ss: tl.int64,  # in indices
    topk1: tl.int32, topk2: tl.int32, slots1: tl.int32, slots2: tl.int32,
    stride1: tl.int64, stride2: tl.int64,  # of a page, in UNIT bytes
    page1: tl.int32, page2: tl.int32, shift1: tl.int32, shift2: tl.int32,
    BH: tl.constexpr, BN: tl.constexpr, THREADS: tl.constexpr, SPLIT: tl.constexpr, SINGLE: tl.constexpr,
    POW2: tl.constexpr, UNIT: tl.constexpr, Q_UNIT: tl.constexpr, OPERAND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    pid = tl.program_id(0)
    split = tl.program_id(1)
    row = pid // head_blocks
    b = row // s_q
    s = row - b * s_q
    b64, s64 = b.to(tl.int64), s.to(tl.int64)
    head = (pid - row * head_blocks) * block_heads + tl.arange(0, BH)
    head_ok = head < heads
    idx1 += b64 * i1_sb + s64 * i1_ss
    idx2 += b64 * i2_sb + s64 * i2_ss
    length1 = tl.minimum(tl.maximum(tl.load(len1 + b, mask=has_len1 != 0, other=topk1), 0), topk1)
    length2 = tl.minimum(tl.maximum(tl.load(len2 + b, mask=has_len2 != 0, other=topk2), 0), topk2)

    d = tl.arange(0, 512)
    q_ok = head_ok[:, None]
    q_row = (q + (b64 * q_sb + s64 * q_ss) * Q_UNIT) + head.to(tl.int64)[:, None] * (q_sh * Q_UNIT)
    query = tl.load(q_row + d[None, :], mask=q_ok, other=0.0).to(OPERAND)

    scopes = (cache1, cache2, stride1, stride2, page1, page2, shift1, shift2)
    m_i = tl.full([BH], NEGATIVE, tl.float32)
    l_i = tl.zeros([BH], tl.float32)
    if SINGLE:
        # one split for each tile of the widths: a split's tile does not depend on the lengths
        tiles1 = tl.cdiv(topk1, BN)
        one = split < tiles1
        k = tl.where(one, split, split - tiles1) * BN + tl.arange(0, BN)
        index = tl.load(tl.where(one, idx1, idx2) + k, mask=k < tl.where(one, topk1, topk2), other=-1)
        valid = (k < tl.where(one, length1, length2)) & (index >= 0) & (index < tl.where(one, slots1, slots2))
        raw = gather(one, scopes, index, valid, UNIT, POW2)
        k = keys_of(raw, OPERAND, THREADS)
        acc, m_i, l_i = attend(query, 0.0, m_i, l_i, k, valid, scale_log2, OPERAND, True)
    else:
        acc = tl.zeros([BH, 512], tl.float32)
        # tiles go round robin over the splits, those of the second scope after those of the first
        tiles1, tiles2 = tl.cdiv(length1, BN), tl.cdiv(length2, BN)
        first2 = (split - tiles1 % splits + splits) % splits
        here1 = tl.maximum(tl.cdiv(tiles1 - split, splits), 0)
        here = here1 + tl.maximum(tl.cdiv(tiles2 - first2, splits), 0)
        index, one = _tile_index(0, here1, split, first2, splits, idx1, idx2, length1, length2, BN)
        for i in range(here):
            valid = (index >= 0) & (index < tl.where(one, slots1, slots2))
            raw = gather(one, scopes, index, valid, UNIT, POW2)
            # loaded again, not kept: in the layout of the logits the mask would take registers
            again, one_again = _tile_index(i, here1, split, first2, splits, idx1, idx2, length1, length2, BN)
            valid = (again >= 0) & (again < tl.where(one_again, slots1, slots2))
            index, one = _tile_index(i + 1, here1, split, first2, splits, idx1, idx2, length1, length2, BN)
            k = keys_of(raw, OPERAND, THREADS)
            acc, m_i, l_i = attend(query, acc, m_i, l_i, k, valid, scale_log2, OPERAND, False)

    has_keys = l_i != 0.0  # true for NaN too: a NaN key must show
    l_i = tl.where(has_keys, l_i, 1.0)
    inverse = tl.where(has_keys, UNBIAS / l_i, 0.0)
    pid = _block_index(0, OPERAND)
    row = pid // head_blocks
    head = (pid - row * head_blocks) * block_heads + tl.arange(0, BH)
    head_ok = head < heads
    b64 = (row // s_q).to(tl.int64)
    s64 = (row % s_q).to(tl.int64)
    row64 = row.to(tl.int64)
    if SPLIT:
        lse_at = (row64 * splits + _block_index(1, OPERAND)) * heads + head
        tl.store(part_lse + lse_at, tl.where(has_keys, m_i + tl.log2(l_i), float("-inf")), mask=head_ok)
        o_row = part + lse_at[:, None] * 512
    else:
        row_lse = tl.where(has_keys, (m_i + tl.log2(l_i)) * LN2, float("inf"))
        tl.store(lse + row64 * heads + head, row_lse, mask=head_ok)
        sink_value = tl.load(sink + head, mask=head < tl.where(has_sink != 0, heads, 0), other=float("-inf"))
        inverse = tl.where(has_keys, inverse / (1.0 + tl.exp(sink_value - row_lse)), 0.0)
        o_row = (out + (b64 * o_sb + s64 * o_ss) * Q_UNIT) + head.to(tl.int64)[:, None] * (o_sh * Q_UNIT)
    result = round_to(acc * inverse[:, None], o_row.dtype.element_ty, OPERAND)
    tl.store(o_row + d[None, :], result, mask=head_ok[:, None])
