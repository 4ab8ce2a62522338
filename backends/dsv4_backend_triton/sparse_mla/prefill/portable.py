"""Sparse MLA prefill in plain Triton: one program serves one query row and a block of heads.

It gathers each KV row once, 512 wide, and uses it as key and as value. While a tile is computed, the rows of the next
are loaded, and the indices of the one after it.

    role   does
    all    loads the rows of the next tile; S = Q K^T, the softmax, O += P V

             BN keys           512 columns
    BH heads [ S ]  K: 512    [     O     ]  K: BN

    shared memory: (BH + num_stages * BN) * 1024 bytes of queries and keys, and P
    barriers: of the whole block, placed by Triton
    strides: as the signature says
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...configurations import configured
from ...launch import entry, launch_kernel
from ...lib.bits import round_to
from ...lib.softmax import LN2, NEGATIVE, attend
from .op import ANY_ALIGNMENT, Call, Shape, Tile


def plan(shape: Shape) -> Tile:
    """The fastest of the tiles that spill at most 32 bytes with Triton 3.6 and 3.9. All take 81 KiB or less, so that
    two programs fit a multiprocessor of SM80."""
    return Tile(**configured("sparse_mla_prefill", "portable", shape.arch, size=shape.heads))


def launch(call: Call, tile: Tile) -> None:
    unit = 8 if call.shape.vectors else 1
    grid, arguments = call.arguments(tile.heads, unit)
    launch_kernel(
        _prefill_kernel, grid, *arguments, BH=tile.heads, BN=tile.keys, UNIT=unit, OPERAND=call.shape.arch.bf16,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


@triton.jit
def _load_index(idx, tile, length, BN: tl.constexpr):
    k = tile * BN + tl.arange(0, BN)
    return tl.load(idx + k, mask=k < length, other=-1)


@entry(triton.jit, "has_sink", any_alignment=ANY_ALIGNMENT)
def _prefill_kernel(
    q, kv, idx, lengths, sink, out, max_logits, lse,
    has_sink: tl.int32, has_length: tl.int32, scale_log2: tl.float32,
    heads: tl.int32, head_blocks: tl.int32, topk: tl.int32, s_kv: tl.int32,
    q_ss: tl.int64, q_sh: tl.int64, kv_ss: tl.int64, o_ss: tl.int64, o_sh: tl.int64,  # in UNIT elements
    i_ss: tl.int64,  # in indices
    BH: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row = pid // head_blocks
    row64 = row.to(tl.int64)
    head = (pid - row * head_blocks) * BH + tl.arange(0, BH)
    head_ok = head < heads
    idx += row64 * i_ss
    length = tl.minimum(tl.maximum(tl.load(lengths + row, mask=has_length != 0, other=topk), 0), topk)
    d = tl.arange(0, 512)
    q_row = (q + row64 * (q_ss * UNIT)) + head.to(tl.int64)[:, None] * (q_sh * UNIT)
    query = tl.load(q_row + d[None, :], mask=head_ok[:, None], other=0.0).to(OPERAND)

    m_i = tl.full([BH], NEGATIVE, tl.float32)
    l_i = tl.zeros([BH], tl.float32)
    acc = tl.zeros([BH, 512], tl.float32)
    index = _load_index(idx, 0, length, BN)
    for tile in range(tl.cdiv(length, BN)):
        valid = (index >= 0) & (index < s_kv)
        kv_row = kv + index.to(tl.int64) * (kv_ss * UNIT)
        k = tl.load(kv_row[:, None] + d[None, :], mask=valid[:, None], other=0.0).to(OPERAND)
        # loaded again, not kept: in the layout of the logits the mask would take 16 registers
        again = _load_index(idx, tile, length, BN)
        valid = (again >= 0) & (again < s_kv)
        index = _load_index(idx, tile + 1, length, BN)
        acc, m_i, l_i = attend(query, acc, m_i, l_i, k, valid, scale_log2, OPERAND, False)

    has_keys = l_i != 0.0  # true for NaN too: a NaN key must show
    l_i = tl.where(has_keys, l_i, 1.0)
    row_lse = tl.where(has_keys, (m_i + tl.log2(l_i)) * LN2, float("inf"))
    at = row64 * heads + head
    tl.store(lse + at, row_lse, mask=head_ok)
    tl.store(max_logits + at, tl.where(has_keys, m_i * LN2, float("-inf")), mask=head_ok)
    sink_value = tl.load(sink + head, mask=head < tl.where(has_sink != 0, heads, 0), other=float("-inf"))
    inverse = tl.where(has_keys, 1.0 / (l_i * (1.0 + tl.exp(sink_value - row_lse))), 0.0)
    o_row = (out + row64 * (o_ss * UNIT)) + head.to(tl.int64)[:, None] * (o_sh * UNIT)
    tl.store(o_row + d[None, :], round_to(acc * inverse[:, None], tl.bfloat16, OPERAND), mask=head_ok[:, None])
