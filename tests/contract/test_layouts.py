"""The bytes, against definitions in plain Python and against every value."""

from __future__ import annotations

import math

import pytest
import torch

from dsv4_backends.contract import layouts
from dsv4_backends.testing.oracle.codes import e4m3, e8m0
from dsv4_backends.testing.oracle.sparse_mla import _cache_keys

BF16 = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
FINITE = BF16[torch.isfinite(BF16)]


def exact_scale(amax: float) -> float:
    """The least power of two not below max(amax, 1e-4) / 448, in exact arithmetic on the fp32 quotient."""
    quotient = float(torch.tensor(max(amax, float(torch.tensor(1e-4)))) * torch.tensor(1 / 448.0))
    mantissa, exponent = math.frexp(quotient)
    return 2.0 ** (exponent - 1) if mantissa == 0.5 else 2.0**exponent


def test_scale_rule_for_every_bf16_amax() -> None:
    positive = FINITE[FINITE > 0].float()
    _, scale = layouts.quantize_e4m3(positive.unsqueeze(-1), 1)
    expected = torch.tensor([exact_scale(float(x)) for x in positive])
    assert torch.equal(scale.squeeze(-1), expected)
    assert scale.min() == 2.0**-22  # the floor is on amax, not on the scale


def test_nothing_is_clipped_and_rounding_is_to_even() -> None:
    values, scale = layouts.quantize_e4m3(FINITE.float().unsqueeze(-1), 1)
    decoded = e4m3(values).squeeze(-1) * scale.double().squeeze(-1)
    error = (decoded - FINITE.double()).abs()
    # Half a unit of e4m3's last place: 2^-4 relative for normal codes, 2^-10 of the scale for subnormal ones.
    assert (error <= torch.maximum(FINITE.double().abs() * 2**-4, scale.double().squeeze(-1) * 2**-10)).all()
    # Ties: 17/16 lies between the codes of 1 and 9/8 and goes to the even mantissa of 1.
    tie, _ = layouts.quantize_e4m3(torch.tensor([[448.0, 17 / 16, 19 / 16]]), 3)
    assert e4m3(tie).tolist() == [[448.0, 1.0, 1.25]]


def test_e4m3_against_torch_for_every_code() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    torch.testing.assert_close(e4m3(codes), codes.view(torch.float8_e4m3fn).double(), rtol=0, atol=0, equal_nan=True)


def test_e8m0_for_every_code() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    decoded = layouts.e8m0_decode(codes)
    assert decoded[:255].double().tolist() == [2.0 ** (code - 127) for code in range(255)]
    assert decoded[255].isnan()
    assert torch.equal(layouts.e8m0_encode(decoded[:255]), codes[:255])
    torch.testing.assert_close(e8m0(codes), decoded.double(), rtol=0, atol=0, equal_nan=True)


def test_e8m0_pack_and_unpack() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128)
    packed = layouts.e8m0_pack(codes)
    assert packed.shape == (2, 32)
    assert packed[0, 0] == 0x03020100
    assert torch.equal(layouts.e8m0_unpack(packed), codes)
    assert layouts.e8m0_unpack(layouts.e8m0_pack(codes[:, :5]))[0].tolist() == [0, 1, 2, 3, 4, 127, 127, 127]


@pytest.mark.parametrize("page_size", [1, 2, 7, 64])
@pytest.mark.parametrize("pad", [0, 576])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_kv_page_bytes(page_size: int, pad: int, dtype: torch.dtype) -> None:
    """Every byte where section 4.1 of the layout puts it, computed by hand."""
    pages = 3
    stride = page_size * 584 + pad
    raw = torch.full((pages * stride + 5,), 0xEE, dtype=torch.uint8)
    cache = raw[5:].as_strided((pages, page_size, 584), (stride, 584, 1), 5).view(dtype)
    slot = pages * page_size - 1
    kv = torch.randn(1, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    layouts.write_kv(cache, torch.tensor([slot, -1, slot + 1, 10**9]), torch.cat([kv] * 4))  # one of these is there

    start = 5 + (slot // page_size) * stride
    offset = slot % page_size
    want = raw.clone().fill_(0xEE)
    for block in range(7):
        part = kv[0, block * 64 : block * 64 + 64].float()
        scale = exact_scale(float(part.abs().max()))
        codes = (part / scale).to(torch.float8_e4m3fn).view(torch.uint8)
        want[start + offset * 576 + block * 64 : start + offset * 576 + block * 64 + 64] = codes
        want[start + page_size * 576 + offset * 8 + block] = int(math.log2(scale)) + 127
    want[start + page_size * 576 + offset * 8 + 7] = 0
    rope = kv[0, 448:].view(torch.int16).tolist()
    for i, value in enumerate(rope):
        low, high = value & 0xFF, (value >> 8) & 0xFF
        at = start + offset * 576 + 448 + 2 * i
        want[at], want[at + 1] = low, high
    assert torch.equal(raw, want)

    back = layouts.read_kv(cache, torch.tensor([slot]))
    assert torch.equal(back[0, 448:], kv[0, 448:])
    assert torch.equal(back.double(), _cache_keys(cache, torch.tensor([slot])))
    assert torch.equal(layouts.read_kv(cache.unsqueeze(2), torch.tensor([slot])), back)


@pytest.mark.parametrize("page_size", [1, 3, 64])
def test_indexer_page_bytes(page_size: int) -> None:
    pages, d = 2, 128
    stride = page_size * (d + 4) + 12
    raw = torch.full((pages * stride,), 0xEE, dtype=torch.uint8)
    cache = raw.as_strided((pages, page_size, d + 4), (stride, d + 4, 1))
    key = torch.randn(1, d, generator=torch.Generator().manual_seed(1))
    slot = pages * page_size - 1
    layouts.write_indexer_keys(cache, torch.tensor([slot, -1, slot + 1, 10**9]), torch.cat([key] * 4))
    scale = exact_scale(float(key.abs().max()))
    want = raw.clone().fill_(0xEE)
    start, offset = stride, slot % page_size
    want[start + offset * d : start + offset * d + d] = (key[0] / scale).to(torch.float8_e4m3fn).view(torch.uint8)
    at = start + page_size * d + offset * 4
    want[at : at + 4] = torch.tensor([scale]).view(torch.uint8)
    assert torch.equal(raw, want)
    keys, scales = layouts.read_indexer_keys(cache, torch.tensor([slot]))
    assert scales.tolist() == [scale]
    assert torch.equal(keys.view(torch.uint8)[0], want[start + offset * d : start + offset * d + d])


def test_unpack_is_exact_for_every_code_and_scale() -> None:
    """e4m3 x 2^k fits bf16 wherever the product is in bf16's range."""
    codes = torch.arange(256, dtype=torch.uint8)
    data = torch.zeros(256, 576, dtype=torch.uint8)
    data[:, :448] = codes.repeat(2)[:448]
    scales = codes.unsqueeze(-1).repeat(1, 8)
    got = layouts.unpack_kv(data, scales)[:, :448].double()
    want = e4m3(data[:, :448]) * e8m0(scales[:, :1])
    # Below 2^-126 bf16 keeps ever fewer bits.
    largest = float(torch.finfo(torch.bfloat16).max)
    fits = (want == 0) | ((want.abs() >= 2.0**-126) & (want.abs() <= largest))
    assert torch.equal(got[fits], want[fits])
    assert torch.equal(got.isnan(), want.isnan())


def test_empty() -> None:
    cache = torch.zeros(1, 4, 584, dtype=torch.uint8)
    nothing = torch.empty(0, dtype=torch.long)
    layouts.write_kv(cache, nothing, torch.empty(0, 512, dtype=torch.bfloat16))
    assert layouts.read_kv(cache, nothing).shape == (0, 512)


@pytest.mark.parametrize("block", [1, 64])
def test_bf16_is_quantised_as_fp32_is(block: int) -> None:
    """Every finite bf16, among neighbours of all magnitudes, by the path that makes no fp32 copy."""
    shuffled = FINITE[torch.randperm(len(FINITE), generator=torch.Generator().manual_seed(0))]
    quiet = shuffled * 2.0 ** torch.randint(-120, 0, shuffled.shape, generator=torch.Generator().manual_seed(1))
    for values in (shuffled, quiet.bfloat16(), FINITE):  # FINITE is in order: blocks of one magnitude
        values = values[: len(values) // block * block].view(-1, block)
        fast, fast_scale = layouts.quantize_e4m3(values, block)
        slow, slow_scale = layouts.quantize_e4m3(values.float(), block)
        assert torch.equal(fast.view(torch.uint8), slow.view(torch.uint8))
        assert torch.equal(fast_scale, slow_scale)
