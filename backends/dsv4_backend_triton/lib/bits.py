"""e4m3 and E8M0 inside kernels, decoded and encoded exactly, for machines without the types too.

SM80 and SM86 have no e4m3 in hardware or in Triton, so kernels read and write bytes there. Every one of the 256 codes
is decoded exactly, subnormals and NaN (0x7f, 0xff) included; bf16 holds every e4m3 value. Values are encoded to the
nearest code, ties to the even one, and to 448 beyond it.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Four e4m3 bytes to four bf16. A byte and its sign spread over 16 bits, its magnitude moved to where bf16 has its own,
# read as value * 2^-120 (the biases are 7 and 127), subnormals included, and one multiplication by 2^120 corrects this.
# Only the NaN code reads as 480. Times 1.11 * 2^119 it is infinite, and 448 is not. Adding 0 times that makes it a NaN
# and leaves the others. Two values take three integer instructions: GPUs without e4m3 issue fewest of those. fma with
# -0 rather than mul: mul.bf16x2 needs SM90.
E4M3X4_TO_BF16X4 = """{
    .reg .b32 t, k, b, o, z;
    mov.b32 k, 0x7b807b80;
    mov.b32 b, 0x7b0e7b0e;
    mov.b32 o, 0;
    mov.b32 z, 0x80008000;
    prmt.b32 t, $2, 0, 0x9180;
    shl.b32 t, t, 4;
    and.b32 t, t, 0x87f087f0;
    fma.rn.bf16x2 $0, t, k, z;
    fma.rn.bf16x2 t, $0, b, z;
    fma.rn.bf16x2 $0, t, o, $0;
    prmt.b32 t, $2, 0, 0xb3a2;
    shl.b32 t, t, 4;
    and.b32 t, t, 0x87f087f0;
    fma.rn.bf16x2 $1, t, k, z;
    fma.rn.bf16x2 t, $1, b, z;
    fma.rn.bf16x2 $1, t, o, $1;
}"""
_E4M3X4_TO_BF16X4 = tl.constexpr(E4M3X4_TO_BF16X4)
# Four e4m3 bytes to four fp16, each times 144, exactly: its bits are read as value * 2^-8 (the biases are 7 and 15),
# and times 36864 the NaN code alone, which reads as 480, is infinite.
E4M3X4_TIMES_144 = """{
    .reg .b32 t, k;
    mov.b32 k, 0x78807880;
    prmt.b32 t, $2, 0, 0x9180;
    shl.b32 t, t, 7;
    and.b32 t, t, 0xbf80bf80;
    mul.rn.f16x2 $0, t, k;
    prmt.b32 t, $2, 0, 0xb3a2;
    shl.b32 t, t, 7;
    and.b32 t, t, 0xbf80bf80;
    mul.rn.f16x2 $1, t, k;
}"""
# The same as bf16, each times a bf16, rounded once.
E4M3X4_TIMES_BF16X4 = (
    E4M3X4_TO_BF16X4.removesuffix("}")
    + """    fma.rn.bf16x2 $0, $0, $3, z;
    fma.rn.bf16x2 $1, $1, $4, z;
}"""
)
# The same, each times an fp16, rounded once more.
E4M3X4_TIMES_144_AND = (
    E4M3X4_TIMES_144.removesuffix("}")
    + """    mul.rn.f16x2 $0, $0, $3;
    mul.rn.f16x2 $1, $1, $4;
}"""
)
_E4M3X4_TIMES_144 = tl.constexpr(E4M3X4_TIMES_144)
_E4M3X4_TIMES_BF16X4 = tl.constexpr(E4M3X4_TIMES_BF16X4)


def scaled_e4m3(words: int, *, shared: bool) -> tuple[str, str]:
    """PTX, and its constraints, for words of four e4m3 bytes to bf16, each times a bf16 factor and 2^-120.

    A byte and its sign are spread over 16 bits (prmt with sign replication), the magnitude shifted to bf16's place, the
    surplus sign bits dropped, and the whole multiplied; by fma, since mul.bf16x2 needs SM90. (byte & 0x7f) + 1 reaches
    0x80 for the NaN codes alone: then all elements decoded together become NaN, through the addend.

    Args:
        shared: A word has one factor, a pair of the same, and results are the low pairs of all words, then the high
            ones. Else each pair of elements has its own: the layout may put other rows beside each other.
    """
    raw, factor = 2 * words, 3 * words
    lines = ["{", ".reg .b32 n, t, z;", ".reg .pred p;"]
    for i in range(words):
        lines += [f"and.b32 t, ${raw + i}, 0x7f7f7f7f;", "add.u32 t, t, 0x01010101;"]
        lines.append("mov.b32 n, t;" if i == 0 else "or.b32 n, n, t;")
    lines += ["and.b32 n, n, 0x80808080;", "setp.ne.u32 p, n, 0;", "selp.b32 z, 0x7fc07fc0, 0x80008000, p;"]
    for i in range(words):
        for half, selector in ((0, "0x9180"), (1, "0xb3a2")):
            out, by = (words * half + i, factor + i) if shared else (2 * i + half, factor + 2 * i + half)
            lines += [f"prmt.b32 t, ${raw + i}, 0, {selector};", "shl.b32 t, t, 4;", "and.b32 t, t, 0x87f087f0;"]
            lines.append(f"fma.rn.bf16x2 ${out}, t, ${by}, z;")
    inputs = words + (words if shared else 2 * words)
    return "\n".join([*lines, "}"]), ",".join(["=&r"] * 2 * words + ["r"] * inputs)


BF16_TIMES_2_60TH = tl.constexpr(
    "{ .reg .b32 f, z; mov.b32 f, 0x21802180; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, f, z; }"
)
"""PTX for a pair of bf16 times 2^-60."""


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
    return tl.inline_asm_elementwise(_E4M3X4_TO_BF16X4, "=&r,=&r,r", [byte], dtype=tl.bfloat16, is_pure=True, pack=4)


@triton.jit
def e4m3_times_144(byte):
    """e4m3 bytes (uint8) to fp16, times 144, exactly; a NaN to an infinity. A third fewer instructions than
    ``e4m3_to_bf16``. Products of finite ones are finite in fp32. Not for the interpreter (PTX)."""
    return tl.inline_asm_elementwise(_E4M3X4_TIMES_144, "=&r,=&r,r", [byte], dtype=tl.float16, is_pure=True, pack=4)


@triton.jit
def e8m0_to_fp32(byte):
    """E8M0 scale bytes to fp32: code b is 2^(b-127), 0 is the subnormal 2^-127, 255 is NaN."""
    bits = byte.to(tl.int32) & 0xFF
    bits = tl.where(bits == 0, 0x00400000, tl.where(bits == 255, 0x7FC00000, bits << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def e4m3_times_e8m0(byte, code):
    """e4m3 bytes times their E8M0 scales (both uint8), rounded once to bf16. Not for the interpreter (PTX)."""
    bits = code.to(tl.int32)
    bits = tl.where(bits == 0, 0x0040, tl.where(bits == 255, 0x7FC0, bits << 7))
    factor = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.inline_asm_elementwise(
        _E4M3X4_TIMES_BF16X4, "=&r,=&r,r,r,r", [byte, factor], dtype=tl.bfloat16, is_pure=True, pack=4
    )


@triton.jit
def fp32_to_e4m3(x, NATIVE: tl.constexpr, BOUNDED: tl.constexpr = False):
    """fp32 to e4m3 bytes (uint8): to the nearest, ties to even, at most 448 in magnitude (infinities too); a NaN to a
    NaN. ``NATIVE``: by the conversion of SM89 and newer; the bytes are the same, but it drops a NaN's sign.
    ``BOUNDED``: x is below 464 in magnitude and no NaN; this saves three of thirteen instructions.
    """
    if NATIVE:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    # The power of two below |x|, or 2^-6, below which the codes are as far apart as above it. |x| + 2^20 of those is
    # rounded by the hardware to eighths of it, which is the distance between two codes, so the low bits count eighths.
    # Seven more of them are 56 eighths, which is what the codes of the exponent, 8 * (e - 121), lack modulo 256.
    size = tl.abs(x)
    if not BOUNDED:
        size = tl.minimum(size, 448.0)
    power = tl.maximum(size, 0.015625).to(tl.int32, bitcast=True) & 0x7F800000
    counted = size + power.to(tl.float32, bitcast=True) * 1048583.0
    code = (counted.to(tl.int32, bitcast=True) + (power >> 20)) & 0x7F
    if not BOUNDED:
        code = tl.where(x == x, code, 0x7F)
    return (code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def scale_pow2(amax):
    """The scale of a block with largest magnitude ``amax`` (fp32), and its E8M0 code (int32): the least power of two
    not below max(amax, 1e-4) / 448, the quotient rounded to fp32 (``layouts.py``).
    """
    bits = (tl.maximum(amax, 1e-4) * (1.0 / 448.0)).to(tl.int32, bitcast=True)
    code = (bits + 0x7FFFFF) >> 23  # any mantissa carries into the exponent
    return (code << 23).to(tl.float32, bitcast=True), code


@triton.jit
def quantize(x, NATIVE: tl.constexpr):
    """fp32 rows [N, K], one scale for each, as e4m3 bytes with the scales and their E8M0 codes [N]."""
    scale, code = scale_pow2(tl.max(tl.abs(x), 1))
    inverse = ((254 - code) << 23).to(tl.float32, bitcast=True)  # exact: scales are from 2^-22 to 2^120
    return fp32_to_e4m3(x * inverse[:, None], NATIVE, True), scale, code


@triton.jit
def fp8_operand(raw, OPERAND: tl.constexpr):
    """A loaded e4m3 tile as a dot operand: untouched where the type exists, decoded from bytes elsewhere, with fp16
    times 144."""
    if OPERAND == tl.float8e4nv:
        return raw
    elif OPERAND == tl.float16:
        return e4m3_times_144(raw)
    elif OPERAND == tl.bfloat16:
        return e4m3_to_bf16(raw)
    else:
        return e4m3_to_fp32(raw)


@triton.jit
def round_to(x, DTYPE: tl.constexpr, OPERAND: tl.constexpr):
    """fp32 to ``DTYPE``, to the nearest. The interpreter (operands in fp32) truncates where it casts to bf16, and loses
    subnormals.
    """
    if OPERAND == tl.float32 and DTYPE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


# Twice relu(x) * w, added to a sum: (x + |x|) * w.
RELU_TERM = "{ .reg .f32 a; abs.f32 a, $1; add.f32 a, a, $1; fma.rn.f32 $0, a, $2, $3; }"
# Two at once: a conversion of one value has a quarter of the speed.
ROUND_BF16X2 = """{
    .reg .b32 t;
    cvt.rn.bf16x2.f32 t, $3, $2;
    shl.b32 $0, t, 16;
    and.b32 $1, t, 0xffff0000;
}"""
_ROUND_BF16X2 = tl.constexpr(ROUND_BF16X2)


@triton.jit
def rounded_to_bf16(x, OPERAND: tl.constexpr):
    """fp32 to the nearest bf16, as fp32."""
    if OPERAND == tl.float32:
        return round_to(x, tl.bfloat16, OPERAND).to(tl.float32)
    return tl.inline_asm_elementwise(_ROUND_BF16X2, "=&r,=&r,r,r", [x], dtype=tl.float32, is_pure=True, pack=2)
