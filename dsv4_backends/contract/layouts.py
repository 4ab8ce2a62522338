"""The bytes of DeepSeek V4's caches and scales: views, pack, unpack.

Two page formats, both *page-split*: a page of ``page_size`` tokens holds first the data of all tokens, then the scales
of all tokens. A page tensor is declared ``[pages, page_size, bytes]`` (engines also use ``[pages, page_size, 1,
bytes]``), but the declared last dimension is nominal: one token's bytes are not contiguous, and the stride between
pages is free (engines pad pages, e.g. to a multiple of 576).

KV page, 584 bytes a token (FlashMLA's ``MODEL1``, vLLM's ``fp8_ds_mla``)::

    [0, page_size * 576)                  token t at t * 576: 448 x e4m3, then 64 x bf16 (little endian), RoPE last
    [page_size * 576, page_size * 584)    token t at + t * 8: 7 x E8M0, one per 64 e4m3, then a zero byte

Indexer key page, ``d + 4`` bytes a token (132 for d = 128)::

    [0, page_size * d)                    token t at t * d: d x e4m3
    [page_size * d, page_size * (d + 4))  token t at + t * 4: fp32 scale, a power of two

A *slot* is ``page * page_size + offset``. E8M0 code ``c`` means 2^(c - 127); 0 means 2^-127 and 255 means NaN.
Scale rule, for a block with largest magnitude ``amax``: the least power of two not below ``max(amax, 1e-4) / 448``.
Source: DeepSeek's ``inference/kernel.py`` (``act_quant``) and FlashMLA's test quantiser.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .settings import without_autocast

HEAD_DIM = 512
NOPE_DIM = 448
ROPE_DIM = 64
KV_BLOCK = 64
KV_DATA_BYTES = NOPE_DIM + 2 * ROPE_DIM
KV_SCALE_BYTES = 8
KV_BYTES = KV_DATA_BYTES + KV_SCALE_BYTES
INDEXER_SCALE_BYTES = 4
PAGE_ALIGNMENT = 576
"""Engines pad pages to a multiple of this many bytes; some libraries need it. The contract does not."""
E4M3_MAX = 448.0
AMAX_FLOOR = 1e-4


def ceil_pow2(x: Tensor) -> Tensor:
    """The least power of two that is not below x, for positive normal fp32 x. Computed from the bits, so exact."""
    bits = x.float().contiguous().view(torch.int32)
    return ((bits + 0x7FFFFF) & -0x800000).view(torch.float32)  # a mantissa above 0 carries into the exponent


def e8m0_decode(codes: Tensor) -> Tensor:
    """E8M0 codes (uint8, any shape) as fp32. 0 is the subnormal 2^-127, 255 is NaN."""
    codes = codes.view(torch.uint8).int()
    bits = codes << 23
    bits = torch.where(codes == 0, 1 << 22, bits)
    bits = torch.where(codes == 255, 0x7FC00000, bits)
    return bits.view(torch.float32)


def e8m0_encode(scales: Tensor) -> Tensor:
    """Powers of two between 2^-127 and 2^127 (fp32) as E8M0 codes (uint8)."""
    return (scales.float().contiguous().view(torch.int32) >> 23).to(torch.uint8)


def e8m0_unpack(packed: Tensor) -> Tensor:
    """int32 ``[..., n]`` as the uint8 codes ``[..., 4 n]`` it packs, the first in the lowest byte."""
    return torch.stack([(packed >> shift) & 0xFF for shift in (0, 8, 16, 24)], -1).flatten(-2).to(torch.uint8)


def e8m0_pack(codes: Tensor) -> Tensor:
    """uint8 codes ``[..., n]`` as int32 ``[..., ceil(n / 4)]``; missing codes are filled with 127 (1.0)."""
    short = -codes.shape[-1] % 4
    padded = torch.nn.functional.pad(codes.view(torch.uint8), (0, short), value=127)
    return padded.contiguous().view(torch.int32)


def quantize_e4m3(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Quantise blocks of the last dimension by the scale rule.

    Args:
        x: ``[..., n]``, any float dtype. The last block may be short.
        block: Elements per scale.

    Returns:
        e4m3 ``[..., n]`` and fp32 powers of two ``[..., ceil(n / block)]``.
    """
    with without_autocast():
        return _quantized(x, block)


def _quantized(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    n = x.shape[-1]
    if x.dtype is torch.bfloat16 and n % block == 0:
        # The same values without an fp32 copy: scaling bf16 by a power of two rounds nothing above e4m3's least
        # code, and the scale of a bf16 amax never leaves anything to clip.
        blocks = x.unflatten(-1, (-1, block))
        amax = torch.linalg.vector_norm(blocks, torch.inf, -1).float()
        scale = ceil_pow2(amax.clamp(min=AMAX_FLOOR) * (1.0 / E4M3_MAX))
        values = blocks * scale.reciprocal().to(torch.bfloat16).unsqueeze(-1)
        return values.flatten(-2).to(torch.float8_e4m3fn), scale
    blocks = torch.nn.functional.pad(x.float(), (0, -n % block)).unflatten(-1, (-1, block))
    scale = ceil_pow2(blocks.abs().amax(-1).clamp(min=AMAX_FLOOR) * (1.0 / E4M3_MAX))
    values = (blocks / scale.unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX).flatten(-2)[..., :n]
    return values.to(torch.float8_e4m3fn), scale


def _page_bytes(cache: Tensor) -> tuple[Tensor, int, int, int]:
    """A cache as bytes with its page count, page size and page stride."""
    if cache.dim() == 4:
        cache = cache.squeeze(2)
    pages, page_size, _ = cache.shape
    return cache.view(torch.uint8), pages, page_size, cache.stride(0)


def kv_page_views(cache: Tensor) -> tuple[Tensor, Tensor]:
    """Views of a KV cache.

    Args:
        cache: uint8, int8 or e4m3 ``[pages, page_size, 584]`` or ``[pages, page_size, 1, 584]``, page stride free.

    Returns:
        uint8 data ``[pages, page_size, 576]`` and uint8 scales ``[pages, page_size, 8]``, sharing its memory.
    """
    raw, pages, page_size, stride = _page_bytes(cache)
    start = raw.storage_offset()
    data = raw.as_strided((pages, page_size, KV_DATA_BYTES), (stride, KV_DATA_BYTES, 1), start)
    scales = raw.as_strided(
        (pages, page_size, KV_SCALE_BYTES),
        (stride, KV_SCALE_BYTES, 1),
        start + page_size * KV_DATA_BYTES,
    )
    return data, scales


def pack_kv(kv: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise tokens to the KV format.

    Args:
        kv: bf16 ``[n, 512]``, RoPE applied, RoPE dimensions last.

    Returns:
        uint8 data ``[n, 576]`` and uint8 scales ``[n, 8]``.
    """
    values, scale = quantize_e4m3(kv[:, :NOPE_DIM], KV_BLOCK)
    rope = kv[:, NOPE_DIM:].to(torch.bfloat16).contiguous().view(torch.uint8)
    scales = torch.nn.functional.pad(e8m0_encode(scale), (0, 1))
    return torch.cat([values.view(torch.uint8), rope], -1), scales


def unpack_kv(data: Tensor, scales: Tensor) -> Tensor:
    """The bf16 keys ``[n, 512]`` that data ``[n, 576]`` and scales ``[n, 8]`` mean; exact, as e4m3 x 2^k fits bf16."""
    nope = data[:, :NOPE_DIM].contiguous().view(torch.float8_e4m3fn).float().unflatten(-1, (-1, KV_BLOCK))
    nope = nope * e8m0_decode(scales[:, : NOPE_DIM // KV_BLOCK]).unsqueeze(-1)
    rope = data[:, NOPE_DIM:].contiguous().view(torch.bfloat16)
    with without_autocast():
        return torch.cat([nope.flatten(-2).to(torch.bfloat16), rope], -1)


def write_kv(cache: Tensor, slots: Tensor, kv: Tensor) -> None:
    """Quantise ``kv`` (bf16 ``[n, 512]``) into the slots (int ``[n]``) of a KV cache; slots outside it are skipped."""
    data, scales = kv_page_views(cache)
    keep = (slots >= 0) & (slots < cache.shape[0] * cache.shape[1])
    page, offset = slots[keep] // cache.shape[1], slots[keep] % cache.shape[1]
    data[page, offset], scales[page, offset] = pack_kv(kv[keep])


def read_kv(cache: Tensor, slots: Tensor) -> Tensor:
    """The bf16 keys ``[n, 512]`` at the slots (int ``[n]``, all valid) of a KV cache."""
    data, scales = kv_page_views(cache)
    page, offset = slots // cache.shape[1], slots % cache.shape[1]
    return unpack_kv(data[page, offset], scales[page, offset])


def indexer_page_views(cache: Tensor) -> tuple[Tensor, Tensor]:
    """Views of an indexer key cache.

    Args:
        cache: uint8 ``[pages, page_size, d + 4]`` or ``[pages, page_size, 1, d + 4]``, page stride free.

    Returns:
        uint8 keys ``[pages, page_size, d]`` and uint8 scales ``[pages, page_size, 4]`` (the bytes of an fp32),
        sharing its memory.
    """
    raw, pages, page_size, stride = _page_bytes(cache)
    d = raw.shape[-1] - INDEXER_SCALE_BYTES
    start = raw.storage_offset()
    keys = raw.as_strided((pages, page_size, d), (stride, d, 1), start)
    scales = raw.as_strided(
        (pages, page_size, INDEXER_SCALE_BYTES), (stride, INDEXER_SCALE_BYTES, 1), start + page_size * d
    )
    return keys, scales


def write_indexer_keys(cache: Tensor, slots: Tensor, keys: Tensor) -> None:
    """Quantise ``keys`` (``[n, d]``, one scale each) into slots of an indexer cache; slots outside it are skipped."""
    key_view, scale_view = indexer_page_views(cache)
    keep = (slots >= 0) & (slots < cache.shape[0] * cache.shape[1])
    page, offset = slots[keep] // cache.shape[1], slots[keep] % cache.shape[1]
    values, scale = quantize_e4m3(keys[keep], keys.shape[-1])
    key_view[page, offset] = values.view(torch.uint8)
    scale_view[page, offset] = scale.flatten().view(torch.uint8).view(-1, INDEXER_SCALE_BYTES)


def read_indexer_keys(cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """The e4m3 keys ``[n, d]`` and fp32 scales ``[n]`` at the slots (all valid) of an indexer cache."""
    key_view, scale_view = indexer_page_views(cache)
    page, offset = slots // cache.shape[1], slots % cache.shape[1]
    keys = key_view[page, offset].view(torch.float8_e4m3fn)
    return keys, scale_view[page, offset].contiguous().view(torch.float32).squeeze(-1)
