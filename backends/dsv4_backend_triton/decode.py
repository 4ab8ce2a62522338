"""Sparse MLA decode over the paged FP8 cache: split over the keys, then combine.

One program serves one query row, one block of heads and one split of the row's keys. It gathers every KV row
once (K and V are the same vector), decodes it to bf16 in registers and feeds both products from it. A row's
two scopes are walked as one list of tiles, so their softmax is joint by construction. Loops end at the row's
own length.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import prefill
from ._arch import Arch, arch_of
from ._launch import launch
from ._numeric import LN2 as _LN2
from ._numeric import NEGATIVE as _NEGATIVE
from ._numeric import round_to
from ._sizes import cdiv, pow2
from ._variants import variant

_TOKEN_BYTES = tl.constexpr(576)  # 448 e4m3, then 64 bf16
# Decoded keys are kept as value * 2^-60. A byte's e4m3 bits placed into bf16 read as value * 2^-120, so one
# bf16 multiplication has to undo 2^-120 and apply the E8M0 scale; with 2^60 left over its factor stays a
# normal number for every scale code up to 194 (2^67), where 2^120 * 2^(code-127) would overflow from code 135
# on. The 2^60 is applied to the logits (in their scale) and to the output (in the normaliser), where it costs
# nothing.
_BIAS = tl.constexpr(60)
_UNBIAS = tl.constexpr(2.0**60)

# n e4m3 bytes to bf16, times a bf16 factor: spread a byte and its sign over 16 bits (prmt with sign
# replication), shift the magnitude to bf16's place, drop the surplus sign bits, multiply. (byte & 0x7f) + 1
# reaches 0x80 for the NaN codes alone; one NaN key element makes the logit NaN and with it every output of
# the row, so it is enough that all elements decoded together become NaN, through the addend of the
# multiplication. fma and not mul: mul.bf16x2 needs SM90.


def _decode_asm(words: int) -> str:
    outs, factors = 2 * words, words
    lines = ["{", ".reg .b32 n, t, z;", ".reg .pred p;"]
    first_raw, first_factor = outs, outs + factors
    for i in range(words):
        raw = f"${first_raw + i}"
        lines.append(f"and.b32 t, {raw}, 0x7f7f7f7f;")
        lines.append("add.u32 t, t, 0x01010101;")
        lines.append("mov.b32 n, t;" if i == 0 else "or.b32 n, n, t;")
    lines += ["and.b32 n, n, 0x80808080;", "setp.ne.u32 p, n, 0;", "selp.b32 z, 0x7fc07fc0, 0x80008000, p;"]
    for i in range(words):
        for half, selector in ((0, "0x9180"), (1, "0xb3a2")):
            factor = f"${first_factor + 2 * i + half}"  # elementwise: the layout may put other rows beside each other
            lines.append(f"prmt.b32 t, ${first_raw + i}, 0, {selector};")
            lines.append("shl.b32 t, t, 4;")
            lines.append("and.b32 t, t, 0x87f087f0;")
            lines.append(f"fma.rn.bf16x2 ${2 * i + half}, t, {factor}, z;")
    return "\n".join([*lines, "}"])


def _decode_constraints(words: int) -> str:
    return ",".join(["=&r"] * (2 * words) + ["r"] * (words + 2 * words))


_ASM4, _CON4 = tl.constexpr(_decode_asm(1)), tl.constexpr(_decode_constraints(1))
_ASM8, _CON8 = tl.constexpr(_decode_asm(2)), tl.constexpr(_decode_constraints(2))
_ASM16, _CON16 = tl.constexpr(_decode_asm(4)), tl.constexpr(_decode_constraints(4))
_ASM_ROPE = tl.constexpr(
    "{ .reg .b32 f, z; mov.b32 f, 0x21802180; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, f, z; }"
)


@triton.jit
def _scale_factor(code, OPERAND: tl.constexpr):
    """E8M0 bytes to the factor 2^(code - 127 + 120 - 60); code 0 is 2^-127 and needs no special case, 255
    is NaN.
    """
    exponent = tl.minimum(code.to(tl.int32) + (120 - _BIAS), 254)
    if OPERAND == tl.bfloat16:
        bits = tl.where(code == 255, 0x7FC0, exponent << 7)
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        bits = tl.where(code == 255, 0x7FC00000, exponent << 23)
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def _decode_nope(raw, word, FIRST: tl.constexpr, OPERAND: tl.constexpr, THREADS: tl.constexpr):
    """e4m3 bytes [N, G, 64], scale groups FIRST.. of the rows' scale words [N], to keys [N, G * 64],
    times 2^-60.
    """
    group = tl.arange(0, raw.shape[1]) + FIRST
    code = ((word[:, None] >> (group * 8)[None, :]) & 0xFF).to(tl.int32)
    factor = _scale_factor(code, OPERAND)[:, :, None].broadcast_to(raw.shape)
    if OPERAND == tl.bfloat16:
        # as many at once as a thread has, never more: the rest would be undefined and could look like a NaN
        if raw.numel >= 16 * THREADS:
            value = tl.inline_asm_elementwise(_ASM16, _CON16, [raw, factor], dtype=tl.bfloat16, is_pure=True, pack=16)
        elif raw.numel >= 8 * THREADS:
            value = tl.inline_asm_elementwise(_ASM8, _CON8, [raw, factor], dtype=tl.bfloat16, is_pure=True, pack=8)
        else:
            value = tl.inline_asm_elementwise(_ASM4, _CON4, [raw, factor], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        byte = raw.to(tl.int32)
        bits = ((byte & 0x80) << 24) | ((byte & 0x7F) << 20)
        value = bits.to(tl.float32, bitcast=True)
        value = tl.where((byte & 0x7F) == 0x7F, float("nan"), value) * factor
    return value.reshape(raw.shape[0], raw.shape[1] * raw.shape[2])


@triton.jit
def _bias_rope(rope, OPERAND: tl.constexpr):
    """bf16 values times 2^-60, to match the decoded nope part."""
    if OPERAND == tl.bfloat16:
        return tl.inline_asm_elementwise(_ASM_ROPE, "=r,r", [rope], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        return rope.to(tl.float32) * (1.0 / _UNBIAS)


@triton.jit
def _gather(cache, page_stride, page_size, page_shift, index, valid, UNIT: tl.constexpr, POW2: tl.constexpr):
    """The raw bytes of the rows ``index`` of one cache: nope groups 0-3, 4-5, 6, the rope part, and their
    scales.
    """
    if POW2:
        page = index >> page_shift
        slot = index & (page_size - 1)
    else:
        page = index // page_size
        slot = index - page * page_size
    block = page.to(tl.int64) * (page_stride * UNIT)
    row = cache + (block + slot * _TOKEN_BYTES)
    scale = cache + (block + page_size.to(tl.int64) * _TOKEN_BYTES + slot * 8)
    group4, group2, lane = tl.arange(0, 4), tl.arange(0, 2), tl.arange(0, 64)
    row3, valid3 = row[:, None, None], valid[:, None, None]
    raw_a = tl.load(row3 + (group4[:, None] * 64 + lane[None, :])[None], mask=valid3, other=0)
    raw_b = tl.load(row3 + (group2[:, None] * 64 + lane[None, :] + 256)[None], mask=valid3, other=0)
    raw_c = tl.load(row3 + (lane[None, :] + 384)[None], mask=valid3, other=0)
    rope = tl.load(
        (row + 448).to(tl.pointer_type(tl.bfloat16))[:, None] + lane[None, :], mask=valid[:, None], other=0.0
    )
    if UNIT == 1:
        byte = tl.arange(0, 8)
        codes = tl.load(scale[:, None] + byte[None, :], mask=valid[:, None], other=127).to(tl.int64)
        word = tl.sum(codes << (byte * 8)[None, :].to(tl.int64), 1)
    else:
        word = tl.load(scale.to(tl.pointer_type(tl.int64)), mask=valid, other=0)
    return raw_a, raw_b, raw_c, rope, word


@triton.jit
def _concat(left, right):
    """[N, D] and [N, D] to [N, 2 D]; moves nothing between threads."""
    return tl.join(left, right).permute(0, 2, 1).reshape(left.shape[0], 2 * left.shape[1])


@triton.jit
def _keys(raw_a, raw_b, raw_c, rope, word, OPERAND: tl.constexpr, THREADS: tl.constexpr):
    """The gathered bytes as keys [N, 512], times 2^-60."""
    tail = _concat(_decode_nope(raw_c, word, 6, OPERAND, THREADS), _bias_rope(rope, OPERAND))
    tail = _concat(_decode_nope(raw_b, word, 4, OPERAND, THREADS), tail)
    return _concat(_decode_nope(raw_a, word, 0, OPERAND, THREADS), tail)


@triton.jit
def _attend(q, acc, peak, total, k, valid, scale_log2, OPERAND: tl.constexpr, FIRST: tl.constexpr):
    """One tile of keys into the running (accumulator, maximum, sum) of an online softmax in base 2."""
    logits = tl.dot(q, tl.trans(k))
    logits = tl.where(valid[None, :], logits * scale_log2, _NEGATIVE)
    if FIRST:
        new_peak = tl.max(logits, 1)
    else:
        new_peak = tl.maximum(peak, tl.max(logits, 1))
    weight = tl.where(valid[None, :], tl.exp2(logits - new_peak[:, None]), 0.0)
    if FIRST:
        total = tl.sum(weight, 1)
        acc = tl.dot(weight.to(OPERAND), k)
    else:
        alpha = tl.exp2(peak - new_peak)
        total = total * alpha + tl.sum(weight, 1)
        acc = tl.dot(weight.to(OPERAND), k, acc * alpha[:, None])
    return acc, new_peak, total


@triton.jit
def _tile_index(i, here1, first1, first2, splits, idx1, idx2, length1, length2, BN: tl.constexpr):
    """The indices of the i-th tile of this split, and whether each entry lies within its row's length."""
    one = i < here1
    tile = tl.where(one, first1 + i * splits, first2 + (i - here1) * splits)
    k = tile * BN + tl.arange(0, BN)
    inside = k < tl.where(one, length1, length2)
    index = tl.load(tl.where(one, idx1, idx2) + k, mask=inside, other=-1)
    return index, one


@triton.jit
def _block_index(AXIS: tl.constexpr, OPERAND: tl.constexpr):
    """The program's index again, as the compiler does not know: it would keep it, and all that was made of it."""
    if OPERAND == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "mov.u32 $0, %ctaid." + ("x" if AXIS == 0 else "y") + ";", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        return tl.program_id(AXIS)


_NO_SPECIALIZE = [
    "has_sink",
    "has_len1",
    "has_len2",
    "scale_log2",
    "heads",
    "block_heads",
    "head_blocks",
    "s_q",
    "splits",
    "q_sb",
    "q_ss",
    "q_sh",
    "o_sb",
    "o_ss",
    "o_sh",
    "i1_sb",
    "i1_ss",
    "i2_sb",
    "i2_ss",
    "topk1",
    "topk2",
    "slots1",
    "slots2",
    "stride1",
    "stride2",
    "page1",
    "page2",
    "shift1",
    "shift2",
]
_NO_ALIGN = ["sink", "idx1", "len1", "idx2", "len2", "lse"]


@triton.jit(do_not_specialize=_NO_SPECIALIZE, do_not_specialize_on_alignment=_NO_ALIGN)
def _decode_kernel(
    q,
    out,
    lse,
    part,
    part_lse,
    sink,
    cache1,
    idx1,
    len1,
    cache2,
    idx2,
    len2,
    has_sink: tl.int32,
    has_len1: tl.int32,
    has_len2: tl.int32,
    scale_log2: tl.float32,
    heads: tl.int32,
    block_heads: tl.int32,
    head_blocks: tl.int32,
    s_q: tl.int32,
    splits: tl.int32,
    q_sb: tl.int64,
    q_ss: tl.int64,
    q_sh: tl.int64,
    o_sb: tl.int64,
    o_ss: tl.int64,
    o_sh: tl.int64,
    i1_sb: tl.int64,
    i1_ss: tl.int64,
    i2_sb: tl.int64,
    i2_ss: tl.int64,
    topk1: tl.int32,
    topk2: tl.int32,
    slots1: tl.int32,
    slots2: tl.int32,
    stride1: tl.int64,
    stride2: tl.int64,
    page1: tl.int32,
    page2: tl.int32,
    shift1: tl.int32,
    shift2: tl.int32,
    BH: tl.constexpr,
    BN: tl.constexpr,
    THREADS: tl.constexpr,
    SPLIT: tl.constexpr,
    SINGLE: tl.constexpr,
    POW2: tl.constexpr,
    UNIT: tl.constexpr,
    Q_UNIT: tl.constexpr,
    OPERAND: tl.constexpr,
    PDL: tl.constexpr,
):
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

    peak = tl.full([BH], _NEGATIVE, tl.float32)
    total = tl.zeros([BH], tl.float32)
    if SINGLE:
        # as many splits as the widths have tiles: which tile is whose does not wait for the lengths
        tiles1 = tl.cdiv(topk1, BN)
        one = split < tiles1
        k = tl.where(one, split, split - tiles1) * BN + tl.arange(0, BN)
        index = tl.load(tl.where(one, idx1, idx2) + k, mask=k < tl.where(one, topk1, topk2), other=-1)
        valid = (k < tl.where(one, length1, length2)) & (index >= 0) & (index < tl.where(one, slots1, slots2))
        raw_a, raw_b, raw_c, rope, word = _gather(
            tl.where(one, cache1, cache2),
            tl.where(one, stride1, stride2),
            tl.where(one, page1, page2),
            tl.where(one, shift1, shift2),
            index,
            valid,
            UNIT,
            POW2,
        )
        k = _keys(raw_a, raw_b, raw_c, rope, word, OPERAND, THREADS)
        acc, peak, total = _attend(query, 0.0, peak, total, k, valid, scale_log2, OPERAND, True)
    else:
        acc = tl.zeros([BH, 512], tl.float32)
        # tiles go round robin over the splits, the second scope's after the first's
        tiles1, tiles2 = tl.cdiv(length1, BN), tl.cdiv(length2, BN)
        first2 = (split - tiles1 % splits + splits) % splits
        here1 = tl.maximum(tl.cdiv(tiles1 - split, splits), 0)
        here = here1 + tl.maximum(tl.cdiv(tiles2 - first2, splits), 0)
        index, one = _tile_index(0, here1, split, first2, splits, idx1, idx2, length1, length2, BN)
        for i in range(here):
            valid = (index >= 0) & (index < tl.where(one, slots1, slots2))
            raw_a, raw_b, raw_c, rope, word = _gather(
                tl.where(one, cache1, cache2),
                tl.where(one, stride1, stride2),
                tl.where(one, page1, page2),
                tl.where(one, shift1, shift2),
                index,
                valid,
                UNIT,
                POW2,
            )
            # read again rather than kept: the mask is wanted in the layout of the logits, where it costs
            # registers
            again, one_again = _tile_index(i, here1, split, first2, splits, idx1, idx2, length1, length2, BN)
            valid = (again >= 0) & (again < tl.where(one_again, slots1, slots2))
            index, one = _tile_index(i + 1, here1, split, first2, splits, idx1, idx2, length1, length2, BN)
            k = _keys(raw_a, raw_b, raw_c, rope, word, OPERAND, THREADS)
            acc, peak, total = _attend(query, acc, peak, total, k, valid, scale_log2, OPERAND, False)

    some = total != 0.0  # true for NaN too: a NaN key must show
    total = tl.where(some, total, 1.0)
    inverse = tl.where(some, _UNBIAS / total, 0.0)
    # Found again: kept from before the loop, all this would cost its registers.
    pid = _block_index(0, OPERAND)
    row = pid // head_blocks
    head = (pid - row * head_blocks) * block_heads + tl.arange(0, BH)
    head_ok = head < heads
    b64 = (row // s_q).to(tl.int64)
    s64 = (row % s_q).to(tl.int64)
    row64 = row.to(tl.int64)
    if SPLIT:
        lse_at = (row64 * splits + _block_index(1, OPERAND)) * heads + head
        tl.store(part_lse + lse_at, tl.where(some, peak + tl.log2(total), float("-inf")), mask=head_ok)
        o_row = part + lse_at[:, None] * 512
    else:
        row_lse = tl.where(some, (peak + tl.log2(total)) * _LN2, float("inf"))
        tl.store(lse + row64 * heads + head, row_lse, mask=head_ok)
        sink_value = tl.load(sink + head, mask=head < tl.where(has_sink != 0, heads, 0), other=float("-inf"))
        inverse = tl.where(some, inverse / (1.0 + tl.exp(sink_value - row_lse)), 0.0)
        o_row = (out + (b64 * o_sb + s64 * o_ss) * Q_UNIT) + head.to(tl.int64)[:, None] * (o_sh * Q_UNIT)
    tl.store(
        o_row + d[None, :], round_to(acc * inverse[:, None], o_row.dtype.element_ty, OPERAND), mask=head_ok[:, None]
    )


@triton.jit(
    do_not_specialize=[
        "has_len1",
        "has_len2",
        "s_q",
        "i1_sb",
        "i1_ss",
        "i2_sb",
        "i2_ss",
        "topk1",
        "topk2",
        "slots1",
        "slots2",
        "stride1",
        "stride2",
        "page1",
        "page2",
        "shift1",
        "shift2",
    ],
    do_not_specialize_on_alignment=["idx1", "len1", "idx2", "len2", "places", "lengths"],
)
def _stage_kernel(
    staged,
    places,
    lengths,
    cache1,
    idx1,
    len1,
    cache2,
    idx2,
    len2,
    has_len1: tl.int32,
    has_len2: tl.int32,
    s_q: tl.int32,
    i1_sb: tl.int64,
    i1_ss: tl.int64,
    i2_sb: tl.int64,
    i2_ss: tl.int64,
    topk1: tl.int32,
    topk2: tl.int32,
    slots1: tl.int32,
    slots2: tl.int32,
    stride1: tl.int64,
    stride2: tl.int64,
    page1: tl.int32,
    page2: tl.int32,
    shift1: tl.int32,
    shift2: tl.int32,
    BN: tl.constexpr,
    THREADS: tl.constexpr,
    POW2: tl.constexpr,
    UNIT: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """One tile of a row's keys as bf16 into ``staged`` [rows, topk1 + topk2, 512], both scopes without a gap
    between.

    ``places`` says where each key is (-1: invalid) and ``lengths`` how many there are: what prefill takes.
    """
    row = tl.program_id(0)
    tile = tl.program_id(1)
    b = row // s_q
    s = row - b * s_q
    b64, s64, row64 = b.to(tl.int64), s.to(tl.int64), row.to(tl.int64)
    length1 = tl.minimum(tl.maximum(tl.load(len1 + b, mask=has_len1 != 0, other=topk1), 0), topk1)
    length2 = tl.minimum(tl.maximum(tl.load(len2 + b, mask=has_len2 != 0, other=topk2), 0), topk2)
    tiles1 = tl.cdiv(topk1, BN)
    one = tile < tiles1
    k = tl.where(one, tile, tile - tiles1) * BN + tl.arange(0, BN)
    inside = k < tl.where(one, length1, length2)
    index = tl.load(
        tl.where(one, idx1 + b64 * i1_sb + s64 * i1_ss, idx2 + b64 * i2_sb + s64 * i2_ss) + k,
        mask=inside,
        other=-1,
    )
    valid = (index >= 0) & (index < tl.where(one, slots1, slots2))
    raw_a, raw_b, raw_c, rope, word = _gather(
        tl.where(one, cache1, cache2),
        tl.where(one, stride1, stride2),
        tl.where(one, page1, page2),
        tl.where(one, shift1, shift2),
        index,
        valid,
        UNIT,
        POW2,
    )
    keys = _keys(raw_a, raw_b, raw_c, rope, word, OPERAND, THREADS)
    place = row64 * (topk1 + topk2) + k + tl.where(one, 0, length1)
    keys = (keys.to(tl.float32) * _UNBIAS).to(tl.bfloat16)
    tl.store(staged + place[:, None] * 512 + tl.arange(0, 512)[None, :], keys, mask=valid[:, None])
    tl.store(places + place, tl.where(valid, place.to(tl.int32), -1), mask=inside)
    if tile == 0:
        tl.store(lengths + row, length1 + length2)


@triton.jit(
    do_not_specialize=["has_sink", "heads", "s_q", "splits", "o_sb", "o_ss", "o_sh"],
    do_not_specialize_on_alignment=["sink", "lse", "part_lse"],
)
def _combine_kernel(
    part,
    part_lse,
    sink,
    out,
    lse,
    has_sink: tl.int32,
    heads: tl.int32,
    s_q: tl.int32,
    splits: tl.int32,
    o_sb: tl.int64,
    o_ss: tl.int64,
    o_sh: tl.int64,
    BS: tl.constexpr,
    O_UNIT: tl.constexpr,
    PDL: tl.constexpr,
):
    """The at most ``BS`` splits of one (row, head) into the output: every load is on its way before the first is waited
    for, and no thread needs what another has."""
    pid = tl.program_id(0)
    row = pid // heads
    head = pid - row * heads
    b = row // s_q
    s = row - b * s_q
    d = tl.arange(0, 512)
    first = row.to(tl.int64) * splits * heads + head
    part_lse += first
    part += first * 512
    o_row = out + (b.to(tl.int64) * o_sb + s.to(tl.int64) * o_ss + head.to(tl.int64) * o_sh) * O_UNIT
    sink_value = tl.load(sink + head, mask=has_sink != 0, other=float("-inf"))
    if PDL:
        gdc_wait()
    values = ()
    for i in tl.static_range(BS):
        there = d < tl.where(i < splits, 512, 0)  # not a scalar: the interpreter would not take it
        values += (tl.load(part + i * heads * 512 + d, mask=there, other=0.0),)  # type: ignore[assignment]
    # Last, and wanted first: were they loaded first, the compiler would use some values before it loads the others.
    lses = ()
    for i in tl.static_range(BS):
        lses += (tl.load(part_lse + i * heads, mask=i < splits, other=float("-inf")),)  # type: ignore[assignment]
    peak = lses[0]  # type: ignore[misc]
    for i in tl.static_range(1, BS):
        peak = tl.maximum(peak, lses[i])
    peak = tl.maximum(peak, _NEGATIVE)
    total = 0.0
    acc = tl.zeros([512], tl.float32)
    for i in tl.static_range(BS):
        weight = tl.exp2(lses[i] - peak)
        total += weight
        # a split without keys has written no values: select, do not multiply
        acc += tl.where(lses[i] != float("-inf"), values[i] * weight, 0.0)
    some = total != 0.0
    total = tl.where(some, total, 1.0)
    row_lse = tl.where(some, (peak + tl.log2(total)) * _LN2, float("inf"))
    inverse = tl.where(some, 1.0 / (total * (1.0 + tl.exp(sink_value - row_lse))), 0.0)
    tl.store(lse + pid, row_lse)
    tl.store(o_row + d, (acc * inverse).to(tl.bfloat16))


# ---------------------------------------------------------------------------------------------------------------------
# what to launch


@dataclass(frozen=True)
class Tile:
    """How one program of the portable split kernel is shaped; what the compiler sees besides the data types.

    ``keys`` must be 32 or more. A 16-key tile came out wrong on the H200 (Triton 3.6; the logits right, the
    product with the values not): its operands get kWidth 8, as if for the byte loads they come from, with a K
    dimension of 16.
    """

    heads: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Plan:
    """A launch of decode: which kernel, its tile, and how the keys of a row are split."""

    tile: Tile
    splits: int
    single: bool = False  # every split is exactly one tile of the widths
    hopper: bool = False  # the Gluon kernel of decode_hopper.py in place of the portable one
    block_heads: int = 64  # heads of one program of that kernel: its tile is 64 high, fewer mean more programs
    ampere: bool = False  # the Gluon kernel of decode_ampere.py in place of the portable one
    staged: bool = False  # decode the rows to a workspace first, then attend as prefill does


# Measured on the H200, Triton 3.6, 2026-11-22. The portable tiles keep to 99 KiB and have not been timed on any other
# architecture.
_SMALL = Tile(16, 32, 4, 1)  # one tile a split, two programs fit a multiprocessor
_MEDIUM = Tile(16, 64, 8, 1)
_LOOP = Tile(16, 32, 8, 1)  # for byte loads, where _MEDIUM in a loop outgrows 99 KiB
_HOPPER = Tile(64, 64, 8, 1)
# decode_ampere.py's: 138 KiB, and 67 KiB for architectures with 99. Timed on the H200 under SM80's and SM89's names,
# with as much shared memory as they have, 2026-11-27.
_AMPERE, _AMPERE_SMALL = Tile(64, 64, 8, 1), Tile(32, 32, 4, 1)
_AMPERE_FEW = Tile(16, 32, 4, 1)  # on Hopper too: of a sweep for few queries or at most 16 heads there, the fastest
_STAGE_KEYS, _STAGE_WARPS = 32, 4
_MOST_SPLITS = 40  # the registers of one that combines them
_INVARIANT_ROWS = 16  # the batch that the batch-invariant mode is laid out for


def _tiles(topk: int, extra_topk: int, keys: int) -> int:
    return max(cdiv(topk, keys) + cdiv(extra_topk, keys), 1)


def _splits(programs: int, tiles: int, sms: int, resident: int = 1) -> int:
    """The split count with the least expected time.

    In units of one tile: what the longest program of a wave computes, for every program with which it shares a
    multiprocessor (``resident`` at most) half as much again, 2 to start and finish a program, 0.0102 to write and read
    back a program's partial result. The numbers are fitted to sweeps on the H200, 2026-11-27: within 3 % of the best.
    """
    best, least = 1, float("inf")
    for splits in range(1, min(tiles, _MOST_SPLITS) + 1):
        sharing = min(cdiv(programs * splits, sms), resident)
        waves = cdiv(programs * splits, sms * sharing)
        cost = waves * ((1 + 0.5 * (sharing - 1)) * (tiles / splits + cdiv(tiles, splits)) / 2 + 2)
        cost += 0.0102 * programs * splits if splits > 1 else 0.0
        if cost < least - 1e-9:
            best, least = splits, cost
    return best


def _resident(tile: Tile, arch: Arch) -> int:
    """How many programs of decode_ampere.py share a multiprocessor, by their registers and their shared memory."""
    by_registers, kib = {_AMPERE: (1, 138), _AMPERE_SMALL: (2, 67), _AMPERE_FEW: (3, 49)}[tile]
    return max(1, min(by_registers, (arch.smem // 1024 + 1) // (kib + 1)))  # each program's last KiB is the system's


@lru_cache(maxsize=4096)
def plan(
    arch: Arch,
    rows: int,
    heads: int,
    topk: int,
    extra_topk: int,
    *,
    gluon: bool = True,
    rough: bool = False,
    batch_invariant: bool = False,
) -> Plan:
    """The launch for ``rows`` = b * s_q queries, from shapes and machine alone.

    ``gluon=False`` rules out the Gluon kernels (cache pages or strides they cannot take); ``rough`` says that pages are
    not even 8-byte aligned, where byte loads make the 64-key tile outgrow 99 KiB. ``batch_invariant``: kernel,
    tile and split count are those of 16 rows, whatever ``rows`` is.
    """
    gluon = gluon and not arch.interpret
    ampere = gluon and arch.major in (8, 9, 12) and variant("decode_ampere") is not None
    hopper = gluon and arch.major == 9 and arch.smem >= 210 * 1024 and variant("decode_hopper") is not None
    small, tiles = _tiles(topk, extra_topk, _SMALL.keys), _tiles(topk, extra_topk, 64)
    narrow = cdiv(heads, 16)
    if batch_invariant:
        rows = _INVARIANT_ROWS
    if ampere and (each := cdiv(rows * narrow * small, arch.sms)) <= 3:
        # few rows are latency: up to three small tiles a program, every program on the machine at once
        return Plan(_AMPERE_FEW, cdiv(small, max(each, cdiv(small, _MOST_SPLITS))), ampere=True)
    if ampere and (arch.major != 9 or heads <= 16):
        few = rows * cdiv(heads, 32) * small <= 6 * arch.sms
        tile = _AMPERE_SMALL if few or heads <= 32 or arch.smem < prefill.AMPERE_SHARED else _AMPERE
        tile = _AMPERE_FEW if heads <= 16 else tile
        programs, tiles = rows * cdiv(heads, tile.heads), _tiles(topk, extra_topk, tile.keys)
        return Plan(tile, _splits(programs, tiles, arch.sms, _resident(tile, arch)), ampere=True)
    # few programs: every one gets a single tile, the smallest that still fits all of them on the machine at
    # once
    if rows * narrow * small <= arch.sms and small <= _MOST_SPLITS:
        return Plan(_SMALL, small, single=True)
    if rows * narrow * tiles <= arch.sms and tiles <= _MOST_SPLITS and not rough:
        return Plan(_MEDIUM, tiles, single=True)
    if hopper:
        # few rows: a program for each tile, and each tile's heads over as many programs as there is room for
        blocks = min(arch.sms // (rows * tiles), narrow) if tiles <= _MOST_SPLITS else 1
        if heads > 32 and blocks > 1 and blocks * _HOPPER.heads >= heads:
            return Plan(_HOPPER, tiles, single=True, hopper=True, block_heads=cdiv(heads, blocks))
        splits = _splits(rows * cdiv(heads, 64), tiles, arch.sms)
        return Plan(_HOPPER, splits, single=splits == tiles, hopper=True)
    programs = rows * cdiv(heads, 32)
    if heads > 16 and programs * 10 >= arch.sms * 9:
        # enough rows to keep the machine busy without splits: decoding a row once pays more than keeping it
        # on chip
        return Plan(_LOOP, 1, staged=True)
    loop = _LOOP if rough or arch.major == 10 else _MEDIUM  # on SM100 Triton 3.8 spills the wide one
    return Plan(loop, _splits(rows * narrow, _tiles(topk, extra_topk, loop.keys), arch.sms))


# ---------------------------------------------------------------------------------------------------------------------
# launch


def _unit(*sizes: int) -> int:
    """The largest of 16, 8, 1 that divides every byte address and stride given."""
    together = 0
    for size in sizes:
        together |= size
    return 16 if together % 16 == 0 else 8 if together % 8 == 0 else 1


def _is_pow2(n: int) -> bool:
    return n & (n - 1) == 0


@dataclass(frozen=True)
class _Scopes:
    """Both scopes of a call as the kernels take them; one scope is two, the second without indices."""

    cache1: torch.Tensor
    cache2: torch.Tensor
    idx1: torch.Tensor
    idx2: torch.Tensor
    len1: torch.Tensor
    len2: torch.Tensor
    has_len1: int
    has_len2: int
    strides: tuple[int, int, int, int]  # of the indices
    topk1: int
    topk2: int
    unit: int
    pow2: bool

    @property
    def pages(self) -> tuple[int, ...]:
        """slots, page strides (in units), page sizes and their logarithms, each of both scopes."""
        page1, page2 = self.cache1.shape[1], self.cache2.shape[1]
        most = 2**31 - 1
        return (
            min(self.cache1.shape[0] * page1, most),
            min(self.cache2.shape[0] * page2, most),
            self.cache1.stride(0) // self.unit,
            self.cache2.stride(0) // self.unit,
            page1,
            page2,
            page1.bit_length() - 1,
            page2.bit_length() - 1,
        )


def _scopes(k_cache, indices, topk_length, extra_k_cache, extra_indices, extra_topk_length) -> _Scopes:
    cache1 = cache2 = k_cache.view(torch.uint8)
    idx2, topk2, strides2 = indices, 0, (0, 0)
    if extra_k_cache is not None:
        cache2, idx2, topk2 = extra_k_cache.view(torch.uint8), extra_indices, extra_indices.shape[2]
        strides2 = (idx2.stride(0), idx2.stride(1))
    page1, page2 = cache1.shape[1], cache2.shape[1]
    # page_size * 576 is a multiple of 64, so the scales are aligned wherever the pages are
    unit = _unit(cache1.data_ptr(), cache2.data_ptr(), cache1.stride(0), cache2.stride(0))
    return _Scopes(
        cache1,
        cache2,
        indices,
        idx2,
        indices if topk_length is None else topk_length,
        indices if extra_topk_length is None else extra_topk_length,
        int(topk_length is not None),
        int(extra_topk_length is not None),
        (indices.stride(0), indices.stride(1), *strides2),
        indices.shape[2],
        topk2,
        unit,
        _is_pow2(page1) and _is_pow2(page2),
    )


def _launch_staged(q, scopes: _Scopes, sm_scale, attn_sink, out, lse, arch: Arch) -> None:
    """Decode the chosen rows to bf16 in a workspace, then attend to them as prefill does."""
    b, s_q, heads, _ = q.shape
    rows, both = b * s_q, scopes.topk1 + scopes.topk2
    staged = torch.empty((rows * both, 512), dtype=torch.bfloat16, device=q.device)
    places = torch.empty((rows, both), dtype=torch.int32, device=q.device)
    lengths = torch.empty((rows,), dtype=torch.int32, device=q.device)
    launch(
        _stage_kernel,
        (rows, _tiles(scopes.topk1, scopes.topk2, _STAGE_KEYS)),
        staged,
        places,
        lengths,
        scopes.cache1,
        scopes.idx1,
        scopes.len1,
        scopes.cache2,
        scopes.idx2,
        scopes.len2,
        scopes.has_len1,
        scopes.has_len2,
        s_q,
        *scopes.strides,
        scopes.topk1,
        scopes.topk2,
        *scopes.pages,
        BN=_STAGE_KEYS,
        THREADS=32 * _STAGE_WARPS,
        POW2=scopes.pow2,
        UNIT=scopes.unit,
        OPERAND=tl.float32 if arch.interpret else tl.bfloat16,
        num_warps=_STAGE_WARPS,
        num_stages=1,
    )
    direct = out.is_contiguous()
    flat = out if direct else torch.empty((b, s_q, heads, 512), dtype=torch.bfloat16, device=q.device)
    prefill._launch(
        q.reshape(rows, heads, 512),
        staged,
        places,
        sm_scale,
        attn_sink,
        lengths,
        flat.view(rows, heads, 512),
        torch.empty_like(lse).view(rows, heads),
        lse.view(rows, heads),
        arch,
    )
    if not direct:
        out.copy_(flat)


def _launch(q, scopes: _Scopes, sm_scale, attn_sink, out, lse, arch: Arch, chosen: Plan) -> None:
    if chosen.staged:
        _launch_staged(q, scopes, sm_scale, attn_sink, out, lse, arch)
        return
    b, s_q, heads, _ = q.shape
    rows, tile, splits = b * s_q, chosen.tile, chosen.splits
    q_unit = _q_unit(q, out)
    pdl = arch.major >= 9 and not arch.interpret
    if splits > 1:
        part = torch.empty((rows, splits, heads, 512), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((rows, splits, heads), dtype=torch.float32, device=q.device)
    else:
        part, part_lse = lse, lse
    sink = lse if attn_sink is None else attn_sink
    gluon = chosen.hopper or chosen.ampere
    block_heads = min(chosen.block_heads, tile.heads) if gluon else tile.heads
    blocks = cdiv(heads, block_heads)
    cache1, cache2 = scopes.cache1, scopes.cache2
    if gluon:
        cache1, cache2 = cache1.view(torch.int32), cache2.view(torch.int32)
    arguments = (
        q,
        out,
        lse,
        part,
        part_lse,
        sink,
        cache1,
        scopes.idx1,
        scopes.len1,
        cache2,
        scopes.idx2,
        scopes.len2,
        int(attn_sink is not None),
        scopes.has_len1,
        scopes.has_len2,
        sm_scale * 1.4426950408889634 * 2.0**60,
        heads,
        block_heads,
        blocks,
        s_q,
        splits,
        *(x // q_unit for x in q.stride()[:3]),
        *(x // q_unit for x in out.stride()[:3]),
        *scopes.strides,
        scopes.topk1,
        scopes.topk2,
        *scopes.pages,
    )
    grid = (rows * blocks, splits)
    if chosen.hopper:
        decode_hopper = variant("decode_hopper")
        loaders, registers = decode_hopper.LOADERS[chosen.single]
        launch(
            decode_hopper._decode_hopper_kernel,
            grid,
            *arguments,
            SPLIT=splits > 1,
            SINGLE=chosen.single,
            LOADERS=loaders,
            LOADER_REGISTERS=registers,
            PDL=pdl,
            num_warps=8,
        )
    elif chosen.ampere:
        launch(
            variant("decode_ampere")._decode_ampere_kernel,
            grid,
            *arguments,
            SPLIT=splits > 1,
            HEADS=tile.heads,
            KEYS=tile.keys,
            PDL=pdl,
            num_warps=tile.warps,
        )
    else:
        launch(
            _decode_kernel,
            grid,
            *arguments,
            BH=tile.heads,
            BN=tile.keys,
            THREADS=32 * tile.warps,
            SPLIT=splits > 1,
            SINGLE=chosen.single,
            POW2=scopes.pow2,
            UNIT=scopes.unit,
            Q_UNIT=q_unit,
            OPERAND=tl.float32 if arch.interpret else tl.bfloat16,
            PDL=pdl,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    if splits > 1:
        at_once = pow2(splits, 2) if splits <= 8 else 4 * cdiv(splits, 4)
        o_unit = min(q_unit, 4)
        launch(
            _combine_kernel,
            (rows * heads,),
            part,
            part_lse,
            sink,
            out,
            lse,
            int(attn_sink is not None),
            heads,
            s_q,
            splits,
            *(x // o_unit for x in out.stride()[:3]),
            BS=at_once,
            O_UNIT=o_unit,
            PDL=pdl,
            num_warps=2 if at_once <= 8 else 4,
            num_stages=1,
            **({"launch_pdl": True} if pdl else {}),
        )


def _q_unit(q: torch.Tensor, out: torch.Tensor) -> int:
    """8 if queries and output can be read and written 16 bytes at a time, else 1; strides are passed in
    this unit.
    """
    return 8 if _unit(q.data_ptr(), out.data_ptr(), *(2 * x for t in (q, out) for x in t.stride()[:3])) == 16 else 1


def sparse_mla_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    *,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    extra_k_cache: torch.Tensor | None = None,
    extra_indices: torch.Tensor | None = None,
    extra_topk_length: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of ``q`` [b, s_q, h, 512] bf16 over chosen rows of one or two paged FP8 caches, softmax
    joint.

    Caches are [pages, page, 584] or [pages, page, 1, 584] bytes, page-split; ``indices`` [b, s_q, topk] int32
    are page * page_size + offset, anything outside the cache is masked; lengths [b] int32; ``attn_sink`` [h]
    fp32. Returns ``out`` [b, s_q, h, 512] bf16 and ``lse`` [b, s_q, h] fp32 (natural log, without the sink;
    +inf and zero output where a row has no key). A NaN in a key that is attended to makes the row NaN. E8M0
    codes are exact up to 194 (2^67).

    Workspace (``dsv4_backends.workspace_bytes`` has the number): where the keys are split, 513 fp32 per row, split and
    head; where the rows are decoded to bf16 first, 1 KiB + 4 bytes per index and 4 bytes per row and per (row, head).
    """
    return _sparse_mla_decode(
        q,
        k_cache,
        indices,
        sm_scale,
        attn_sink,
        topk_length,
        extra_k_cache,
        extra_indices,
        extra_topk_length,
        out,
    )


def _sparse_mla_decode(
    q,
    k_cache,
    indices,
    sm_scale,
    attn_sink=None,
    topk_length=None,
    extra_k_cache=None,
    extra_indices=None,
    extra_topk_length=None,
    out=None,
    batch_invariant=False,
):
    b, s_q, heads, _ = q.shape
    if out is None:
        out = torch.empty((b, s_q, heads, 512), dtype=torch.bfloat16, device=q.device)
    lse = torch.empty((b, s_q, heads), dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return out, lse
    arch = arch_of(q.device)
    scopes = _scopes(k_cache, indices, topk_length, extra_k_cache, extra_indices, extra_topk_length)
    gluon = scopes.unit == 16 and scopes.pow2 and _q_unit(q, out) == 8
    chosen = plan(
        arch,
        b * s_q,
        heads,
        scopes.topk1,
        scopes.topk2,
        gluon=gluon,
        rough=scopes.unit == 1,
        batch_invariant=batch_invariant,
    )
    _launch(q, scopes, sm_scale, attn_sink, out, lse, arch, chosen)
    return out, lse
