"""Exact byte decoding inside kernels: e4m3 and E8M0, by integer arithmetic, for machines without the types.

SM80 and SM86 have no e4m3 in hardware or in Triton, so kernels read bytes there. Every one of the 256 codes
is decoded exactly, subnormals and NaN (0x7f, 0xff) included; bf16 holds every e4m3 value.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
NEGATIVE = tl.constexpr(-1.0e30)
"""Stands for -inf where -inf - -inf would be NaN."""

# Four e4m3 bytes to four bf16. The byte's magnitude, shifted so that its exponent field lies in bf16's,
# reads as value * 2^-120 (the biases are 7 and 127), subnormals included, and one multiplication by 2^120
# puts that right. The sum with 0x0100 carries into the sign bit for the NaN code 0x7f alone; from that bit
# the NaN is or-ed in. fma with -0 rather than mul: mul.bf16x2 needs SM90.
_E4M3X4_TO_BF16X4 = tl.constexpr("""{
    .reg .b32 h, s, n, t, k, z;
    mov.b32 k, 0x7b807b80;
    mov.b32 z, 0x80008000;
    prmt.b32 h, $2, 0, 0x1404;
    and.b32 s, h, 0x80008000;
    and.b32 h, h, 0x7f007f00;
    add.u32 n, h, 0x01000100;
    and.b32 n, n, 0x80008000;
    shr.u32 t, n, 15;
    sub.u32 n, n, t;
    shr.u32 h, h, 4;
    or.b32 h, h, s;
    fma.rn.bf16x2 h, h, k, z;
    or.b32 $0, h, n;
    prmt.b32 h, $2, 0, 0x3424;
    and.b32 s, h, 0x80008000;
    and.b32 h, h, 0x7f007f00;
    add.u32 n, h, 0x01000100;
    and.b32 n, n, 0x80008000;
    shr.u32 t, n, 15;
    sub.u32 n, n, t;
    shr.u32 h, h, 4;
    or.b32 h, h, s;
    fma.rn.bf16x2 h, h, k, z;
    or.b32 $1, h, n;
}""")


@triton.jit
def e4m3_to_fp32(byte):
    """e4m3 bytes (uint8) to fp32, exact for all 256 codes."""
    bits = byte.to(tl.int32)
    magnitude = bits & 0x7F
    # magnitude << 20 reads as value * 2^-120; its subnormals (codes 1..7) are exact: Triton does not flush
    # them
    value = ((magnitude << 20) | ((bits & 0x80) << 24)).to(tl.float32, bitcast=True)
    return tl.where(magnitude == 0x7F, float("nan"), value * 1.329227995784916e36)


@triton.jit
def e4m3_to_bf16(byte):
    """e4m3 bytes (uint8) to bf16, exact for all 256 codes. Not for the interpreter (PTX)."""
    return tl.inline_asm_elementwise(_E4M3X4_TO_BF16X4, "=r,=r,r", [byte], dtype=tl.bfloat16, is_pure=True, pack=4)


@triton.jit
def e8m0_to_fp32(byte):
    """E8M0 scale bytes to fp32: code b is 2^(b-127), 0 is the subnormal 2^-127, 255 is NaN."""
    bits = byte.to(tl.int32) & 0xFF
    bits = tl.where(bits == 0, 0x00400000, tl.where(bits == 255, 0x7FC00000, bits << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def fp8_operand(raw, OPERAND: tl.constexpr):
    """A loaded e4m3 tile as a dot operand: untouched where the type exists, decoded from bytes elsewhere."""
    if OPERAND == tl.float8e4nv:
        return raw
    elif OPERAND == tl.bfloat16:
        return e4m3_to_bf16(raw)
    else:
        return e4m3_to_fp32(raw)


@triton.jit
def round_to(x, DTYPE: tl.constexpr, OPERAND: tl.constexpr):
    """fp32 to ``DTYPE``, to the nearest. The interpreter (operands in fp32) truncates where it casts to bf16."""
    if OPERAND == tl.float32 and DTYPE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        x = tl.where(x == x, nearest, x)
    return x.to(DTYPE)
