"""Rows of the paged FP8 cache in plain Triton: gathered as bytes, decoded to keys in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from ...lib.bits import BF16_TIMES_2_60TH, scaled_e4m3

_TOKEN_BYTES = tl.constexpr(576)  # 448 e4m3, then 64 bf16
# Decoded keys are kept as value * 2^-60. The bits of an e4m3 byte, moved into bf16, read as value * 2^-120. One bf16
# multiplication has to undo this and to apply the E8M0 scale. Its factor 2^120 * 2^(code - 127) would overflow from
# code 135 on; without 2^60 it is a normal number up to code 194 (2^67). The scale of the logits and the normaliser of
# the output apply the 2^60, which costs nothing.
BIAS = tl.constexpr(60)
UNBIAS = tl.constexpr(2.0**60)

_ASM4, _CON4 = map(tl.constexpr, scaled_e4m3(1, shared=False))
_ASM8, _CON8 = map(tl.constexpr, scaled_e4m3(2, shared=False))
_ASM16, _CON16 = map(tl.constexpr, scaled_e4m3(4, shared=False))


@triton.jit
def _scale_factor(code, OPERAND: tl.constexpr):
    """E8M0 bytes to the factor 2^(code - 127 + 120 - 60); code 0 is 2^-127 and needs no special case, 255
    is NaN.
    """
    exponent = tl.minimum(code.to(tl.int32) + (120 - BIAS), 254)
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
        # at most as many at once as a thread has, since undefined ones could look like a NaN
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
        return tl.inline_asm_elementwise(BF16_TIMES_2_60TH, "=r,r", [rope], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        return rope.to(tl.float32) * (1.0 / UNBIAS)


@triton.jit
def gather(one, scopes, index, valid, UNIT: tl.constexpr, POW2: tl.constexpr):
    """The raw bytes of the rows ``index`` of a cache, the first scope's if ``one``: nope groups 0-3, 4-5, 6, the rope
    part, and their scales.
    """
    cache1, cache2, stride1, stride2, page1, page2, shift1, shift2 = scopes
    cache = tl.where(one, cache1, cache2)
    page_stride = tl.where(one, stride1, stride2)
    page_size = tl.where(one, page1, page2)
    page_shift = tl.where(one, shift1, shift2)
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
    if UNIT == 1:  # perhaps at an odd address
        low = tl.load(row[:, None] + (2 * lane + 448)[None, :], mask=valid[:, None], other=0).to(tl.int16)
        high = tl.load(row[:, None] + (2 * lane + 449)[None, :], mask=valid[:, None], other=0).to(tl.int16)
        rope = (high << 8 | low).to(tl.bfloat16, bitcast=True)
        byte = tl.arange(0, 8)
        codes = tl.load(scale[:, None] + byte[None, :], mask=valid[:, None], other=127).to(tl.int64)
        word = tl.sum(codes << (byte * 8)[None, :].to(tl.int64), 1)
    else:
        rope = tl.load(
            (row + 448).to(tl.pointer_type(tl.bfloat16))[:, None] + lane[None, :], mask=valid[:, None], other=0.0
        )
        word = tl.load(scale.to(tl.pointer_type(tl.int64)), mask=valid, other=0)
    return raw_a, raw_b, raw_c, rope, word


@triton.jit
def _concat(left, right):
    """[N, D] and [N, D] to [N, 2 D]; no data moves between threads."""
    return tl.join(left, right).permute(0, 2, 1).reshape(left.shape[0], 2 * left.shape[1])


@triton.jit
def keys_of(raw, OPERAND: tl.constexpr, THREADS: tl.constexpr):
    """The gathered bytes as keys [N, 512], times 2^-60. One NaN key element makes the logit NaN and with it every
    output of the row, so it is enough that all elements decoded together are NaN."""
    raw_a, raw_b, raw_c, rope, word = raw
    tail = _concat(_decode_nope(raw_c, word, 6, OPERAND, THREADS), _bias_rope(rope, OPERAND))
    tail = _concat(_decode_nope(raw_b, word, 4, OPERAND, THREADS), tail)
    return _concat(_decode_nope(raw_a, word, 0, OPERAND, THREADS), tail)
