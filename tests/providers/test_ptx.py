"""The Triton provider's inline PTX that decodes e4m3 and rounds to bf16, executed in Python, without a GPU."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from dsv4_backend_triton.lib import bits


def _halves(word: int) -> torch.Tensor:
    return torch.tensor([word & 0xFFFF, word >> 16]).to(torch.uint16).view(torch.bfloat16)


def _fma(a: int, b: int, c: int) -> int:
    """``fma.rn.bf16x2``. Products of bf16 are exact in fp64, and so are the sums here."""
    exact = _halves(a).double() * _halves(b).double() + _halves(c).double()
    low, high = exact.bfloat16().view(torch.uint16).tolist()
    return int(low) | int(high) << 16


def _mul(a: int, b: int) -> int:
    """``mul.rn.f16x2``. Products of fp16 are exact in fp64."""
    one, two = (torch.tensor([w & 0xFFFF, w >> 16]).to(torch.uint16).view(torch.float16).double() for w in (a, b))
    low, high = (one * two).half().view(torch.uint16).tolist()
    return int(low) | int(high) << 16


def _prmt(a: int, b: int, selector: int) -> int:
    source, result = a | b << 32, 0
    for place in range(4):
        chosen = selector >> 4 * place & 0xF
        byte = source >> 8 * (chosen & 7) & 0xFF
        if chosen & 8:
            byte = 0xFF if byte & 0x80 else 0
        result |= byte << 8 * place
    return result


def _cvt(high: int, low: int) -> int:
    """``cvt.rn.bf16x2.f32``: the first operand goes into the upper half."""
    words = torch.tensor([low, high]).to(torch.uint32).view(torch.float32).bfloat16().view(torch.uint16).tolist()
    return int(words[0]) | int(words[1]) << 16


OPERATIONS = {
    "cvt.rn.bf16x2.f32": _cvt,
    "mov.b32": lambda a: a,
    "prmt.b32": _prmt,
    "shl.b32": lambda a, b: a << b & 0xFFFFFFFF,
    "and.b32": lambda a, b: a & b,
    "fma.rn.bf16x2": _fma,
    "mul.rn.f16x2": _mul,
}


def run(text: str, results: int, *inputs: int) -> list[int]:
    """What the block leaves in ``$0`` and on, given the registers after those."""
    registers = {f"${results + i}": value for i, value in enumerate(inputs)}
    for line in text.strip("{} \n").splitlines():
        name, *operands = re.split(r"[\s,]+", line.strip().rstrip(";"))
        if name != ".reg":
            target, *sources = operands
            values = [registers[s] if s in registers else int(s, 0) for s in sources]
            registers[target] = OPERATIONS[name](*values)
    return [registers[f"${i}"] for i in range(results)]


def test_every_code_beside_every_kind_of_neighbour() -> None:
    """Bit by bit but for the payload of a NaN, which stays its own."""
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).bfloat16()
    for code, neighbour in itertools.product(range(256), (0x00, 0x80, 0x7F, 0xFF, 0x7E, 0x01)):
        codes = [code, neighbour, neighbour ^ 0x80, code]
        words = run(bits.E4M3X4_TO_BF16X4, 2, sum(byte << 8 * i for i, byte in enumerate(codes)))
        got, want = torch.cat([_halves(word) for word in words]), table[codes]
        assert torch.equal(got.isnan(), want.isnan())
        kept = ~want.isnan()
        assert torch.equal(got.view(torch.int16)[kept], want.view(torch.int16)[kept])


def test_codes_times_144_are_exact_and_a_nan_is_infinite() -> None:
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double() * 144
    table = torch.where(table.isnan(), torch.tensor([torch.inf, -torch.inf]).repeat_interleave(128), table)
    for code, neighbour in itertools.product(range(256), (0x00, 0x80, 0x7F, 0xFF, 0x7E, 0x01)):
        codes = [code, neighbour, neighbour ^ 0x80, code]
        words = run(bits.E4M3X4_TIMES_144, 2, sum(byte << 8 * i for i, byte in enumerate(codes)))
        got = torch.tensor([half for word in words for half in (word & 0xFFFF, word >> 16)]).to(torch.uint16)
        assert torch.equal(got.view(torch.float16).double(), table[codes])


def test_codes_times_144_and_a_power_of_two_are_exact() -> None:
    """Down to 2^-16, which is how far apart ``fp8_einsum`` takes scales into an operand."""
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double() * 144
    table = torch.where(table.isnan(), torch.tensor([torch.inf, -torch.inf]).repeat_interleave(128), table)
    for power, first in itertools.product(range(-16, 1), range(0, 256, 4)):
        factors = torch.tensor([2.0**power, -(2.0**power)]).half()
        low, high = factors.view(torch.uint16).tolist()
        word = sum((first + i) << 8 * i for i in range(4))
        words = run(bits.E4M3X4_TIMES_144_AND, 2, word, *[low | high << 16] * 2)
        got = torch.tensor([half for word in words for half in (word & 0xFFFF, word >> 16)]).to(torch.uint16)
        assert torch.equal(got.view(torch.float16).double(), table[first : first + 4] * factors.double().repeat(2))


def test_codes_times_scales_are_rounded_once() -> None:
    """Every code times scales from the least, where products are subnormal or 0, to the largest and NaN."""
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    for scale in (0, 1, 2, 3, 6, 7, 8, 105, 127, 134, 135, 194, 245, 246, 247, 254, 255):
        factor = 0x40 if scale == 0 else 0x7FC0 if scale == 255 else scale << 7
        for first in range(0, 256, 4):
            word = sum((first + i) << 8 * i for i in range(4))
            words = run(bits.E4M3X4_TIMES_BF16X4, 2, word, *[factor | factor << 16] * 2)
            got = torch.cat([_halves(word) for word in words])
            want = table[first : first + 4] * (torch.nan if scale == 255 else 2.0 ** (scale - 127))
            torch.testing.assert_close(got, want.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_a_pair_of_roundings_stays_in_its_order() -> None:
    values = torch.tensor([1 + 2**-8, -3.0e38, 1e-40, 1 + 3 * 2**-8, 0.1, torch.inf])
    for low, high in itertools.permutations(values.view(torch.int32).tolist(), 2):
        given = [word & 0xFFFFFFFF for word in (low, high)]
        got = torch.tensor(run(bits.ROUND_BF16X2, 2, *given)).to(torch.uint32).view(torch.float32)
        want = torch.tensor([low, high], dtype=torch.int32).view(torch.float32).bfloat16().float()
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("word", "selector", "expected"), [(0x8301FF7F, 0x9180, 0xFFFF007F), (0x8301FF7F, 0xB3A2, 0xFF830001)]
)
def test_the_selectors_spread_bytes_and_their_signs(word: int, selector: int, expected: int) -> None:
    assert _prmt(word, 0, selector) == expected
