"""Sparse MLA decode in two steps: decode the selected keys to bf16 in a workspace, then attend to them as in prefill.

For calls with enough rows to keep all multiprocessors busy without splits. There decoding each key once saves more than
the workspace costs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ... import variants
from ...configurations import configured
from ...launch import entry, launch_kernel
from ...lib.sizes import cdiv
from ..prefill.op import Call as PrefillCall
from .cache_rows import UNBIAS, gather, keys_of
from .plan import Call, Shape, Tile


def plan(shape: Shape) -> Tile | None:
    programs = shape.planned_rows * cdiv(shape.heads, 32)
    if shape.heads <= 16 or programs * 10 < shape.arch.sms * 9:
        return None
    return Tile(heads=0, **configured("sparse_mla_decode", "staged", shape.arch))


def launch(call: Call, tile: Tile) -> None:
    scopes, q, out, arch = call.scopes, call.q, call.out, call.shape.arch
    b, s_q, heads, _ = q.shape
    rows, both = b * s_q, scopes.topk1 + scopes.topk2
    staged = torch.empty((rows * both, 512), dtype=torch.bfloat16, device=q.device)
    places = torch.empty((rows, both), dtype=torch.int32, device=q.device)
    lengths = torch.empty((rows,), dtype=torch.int32, device=q.device)
    launch_kernel(
        _stage_kernel, (rows, call.shape.tiles(tile.keys)), *(staged, places, lengths),
        *(scopes.cache1, scopes.idx1, scopes.len1, scopes.cache2, scopes.idx2, scopes.len2),
        *(scopes.has_len1, scopes.has_len2, s_q), *scopes.strides, *(scopes.topk1, scopes.topk2), *scopes.pages,
        BN=tile.keys, THREADS=32 * tile.warps, POW2=scopes.pow2, UNIT=scopes.unit, OPERAND=arch.bf16,
        num_warps=tile.warps, num_stages=1,
    )  # fmt: skip
    direct = out.is_contiguous()
    flat = (out if direct else torch.empty_like(q, memory_format=torch.contiguous_format)).view(rows, heads, 512)
    max_logits, lse = torch.empty_like(call.lse).view(rows, heads), call.lse.view(rows, heads)
    given = (q.reshape(rows, heads, 512), staged, places, call.sm_scale, call.sink, lengths)
    variants.run("sparse_mla_prefill", PrefillCall.of(arch, *given, flat, max_logits, lse))
    if not direct:
        out.copy_(flat.view(out.shape))


@entry(triton.jit, "has_len1", any_alignment=["places", "lengths", "idx1", "len1", "idx2", "len2"])
def _stage_kernel(
    staged, places, lengths,
    cache1, idx1, len1, cache2, idx2, len2,
    has_len1: tl.int32, has_len2: tl.int32, s_q: tl.int32,
    i1_sb: tl.int64, i1_ss: tl.int64, i2_sb: tl.int64, i2_ss: tl.int64,  # in indices
    topk1: tl.int32, topk2: tl.int32, slots1: tl.int32, slots2: tl.int32,
    stride1: tl.int64, stride2: tl.int64,  # of a page, in UNIT bytes
    page1: tl.int32, page2: tl.int32, shift1: tl.int32, shift2: tl.int32,
    BN: tl.constexpr, THREADS: tl.constexpr, POW2: tl.constexpr, UNIT: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Write one tile of a row's keys as bf16 into ``staged`` [rows, topk1 + topk2, 512], without a gap between scopes.

    Also write what prefill takes: the index of each key into ``places`` (-1: invalid), their number into ``lengths``.
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
    indices = tl.where(one, idx1 + b64 * i1_sb + s64 * i1_ss, idx2 + b64 * i2_sb + s64 * i2_ss)
    index = tl.load(indices + k, mask=inside, other=-1)
    valid = (index >= 0) & (index < tl.where(one, slots1, slots2))
    scopes = (cache1, cache2, stride1, stride2, page1, page2, shift1, shift2)
    raw = gather(one, scopes, index, valid, UNIT, POW2)
    keys = keys_of(raw, OPERAND, THREADS)
    place = row64 * (topk1 + topk2) + k + tl.where(one, 0, length1)
    keys = (keys.to(tl.float32) * UNBIAS).to(tl.bfloat16)
    tl.store(staged + place[:, None] * 512 + tl.arange(0, 512)[None, :], keys, mask=valid[:, None])
    tl.store(places + place, tl.where(valid, place.to(tl.int32), -1), mask=inside)
    if tile == 0:
        tl.store(lengths + row, length1 + length2)
