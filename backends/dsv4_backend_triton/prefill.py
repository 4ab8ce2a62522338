"""Sparse MLA prefill: every query row attends to its own list of rows of one bf16 KV array.

One program serves one query row and one block of heads. It gathers each KV row once, 512 wide, and uses it as
key and as value; the next tile's rows are on their way while this one is computed, and the indices one tile
further ahead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ._arch import Arch, arch_of
from ._launch import launch
from ._numeric import LN2 as _LN2
from ._numeric import NEGATIVE as _NEGATIVE
from ._numeric import round_to
from ._variants import variant


@triton.jit
def _load_index(idx, tile, length, BN: tl.constexpr):
    k = tile * BN + tl.arange(0, BN)
    return tl.load(idx + k, mask=k < length, other=-1)


_NO_SPECIALIZE = [
    "has_sink",
    "has_length",
    "scale_log2",
    "heads",
    "head_blocks",
    "topk",
    "s_kv",
    "q_ss",
    "q_sh",
    "kv_ss",
    "o_ss",
    "o_sh",
    "i_ss",
]
_NO_ALIGN = ["sink", "idx", "lengths", "lse", "max_logits"]


@triton.jit(do_not_specialize=_NO_SPECIALIZE, do_not_specialize_on_alignment=_NO_ALIGN)
def _prefill_kernel(
    q,
    kv,
    idx,
    lengths,
    sink,
    out,
    max_logits,
    lse,
    has_sink: tl.int32,
    has_length: tl.int32,
    scale_log2: tl.float32,
    heads: tl.int32,
    head_blocks: tl.int32,
    topk: tl.int32,
    s_kv: tl.int32,
    q_ss: tl.int64,
    q_sh: tl.int64,
    kv_ss: tl.int64,
    o_ss: tl.int64,
    o_sh: tl.int64,
    i_ss: tl.int64,
    BH: tl.constexpr,
    BN: tl.constexpr,
    UNIT: tl.constexpr,
    OPERAND: tl.constexpr,
):
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

    peak = tl.full([BH], _NEGATIVE, tl.float32)
    total = tl.zeros([BH], tl.float32)
    acc = tl.zeros([BH, 512], tl.float32)
    index = _load_index(idx, 0, length, BN)
    for tile in range(tl.cdiv(length, BN)):
        valid = (index >= 0) & (index < s_kv)
        kv_row = kv + index.to(tl.int64) * (kv_ss * UNIT)
        k = tl.load(kv_row[:, None] + d[None, :], mask=valid[:, None], other=0.0).to(OPERAND)
        # read again rather than kept: the mask is wanted in the layout of the logits, where it costs 16
        # registers
        again = _load_index(idx, tile, length, BN)
        valid = (again >= 0) & (again < s_kv)
        index = _load_index(idx, tile + 1, length, BN)
        logits = tl.dot(query, tl.trans(k))
        logits = tl.where(valid[None, :], logits * scale_log2, _NEGATIVE)
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        weight = tl.where(valid[None, :], tl.exp2(logits - new_peak[:, None]), 0.0)
        alpha = tl.exp2(peak - new_peak)
        total = total * alpha + tl.sum(weight, 1)
        acc = tl.dot(weight.to(OPERAND), k, acc * alpha[:, None])
        peak = new_peak

    some = total != 0.0  # true for NaN too: a NaN key must show
    total = tl.where(some, total, 1.0)
    row_lse = tl.where(some, (peak + tl.log2(total)) * _LN2, float("inf"))
    at = row64 * heads + head
    tl.store(lse + at, row_lse, mask=head_ok)
    tl.store(max_logits + at, tl.where(some, peak * _LN2, float("-inf")), mask=head_ok)
    sink_value = tl.load(sink + head, mask=head < tl.where(has_sink != 0, heads, 0), other=float("-inf"))
    inverse = tl.where(some, 1.0 / (total * (1.0 + tl.exp(sink_value - row_lse))), 0.0)
    o_row = (out + row64 * (o_ss * UNIT)) + head.to(tl.int64)[:, None] * (o_sh * UNIT)
    tl.store(o_row + d[None, :], round_to(acc * inverse[:, None], tl.bfloat16, OPERAND), mask=head_ok[:, None])


# ---------------------------------------------------------------------------------------------------------------------
# launch


@dataclass(frozen=True)
class Tile:
    """How one program is shaped; everything the compiler sees besides the data types."""

    heads: int
    keys: int
    warps: int
    stages: int
    ampere: bool = False  # the Gluon kernel of prefill_ampere.py in place of the plain one


# Measured on the H200, Triton 3.6, 2026-11-22: of the tiles that spill at most 32 bytes with Triton 3.6 and 3.9, the
# fastest.
_MEASURED = {16: Tile(16, 32, 4, 2), 32: Tile(32, 32, 4, 2)}
# Derived for SM86 and SM89, where (32, 32, 4, 2) spills 56 to 72: same registers, half the keys. Not timed.
_SM8X = {16: Tile(16, 32, 4, 2), 32: Tile(32, 16, 4, 3)}
# The Gluon kernel's: 137 KiB, and 67 KiB for architectures with 99. Timed on the H200 under SM80's and SM89's names,
# with as much shared memory as they have, 2026-11-27.
_AMPERE, _AMPERE_SMALL = Tile(64, 64, 8, 1, ampere=True), Tile(32, 32, 4, 1, ampere=True)
_AMPERE_FEW = Tile(16, 64, 4, 1, ampere=True)  # for up to 16 heads: 81 KiB, two programs fit a multiprocessor of SM80
AMPERE_SHARED = 138 * 1024
"""What the larger tile of either Gluon kernel for mma.sync fits."""


def plan(arch: Arch, heads: int, *, gluon: bool) -> Tile:
    """The tile for a head count on a machine. All but the largest take 81 KiB or less, so that two programs fit a
    multiprocessor of SM80.

    ``gluon=False`` rules out the Gluon kernel (strides it cannot take).
    """
    if gluon and arch.major in (8, 12) and not arch.interpret and variant("prefill_ampere") is not None:
        if heads <= 16:
            return _AMPERE_FEW
        return _AMPERE if heads > 32 and arch.smem >= AMPERE_SHARED else _AMPERE_SMALL
    table = _SM8X if arch.cc in (86, 89) else _MEASURED
    return table[16 if heads <= 16 else 32]


def _unit(*sizes: int) -> int:
    """8 if 8 divides every element stride and address given, else 1."""
    together = 0
    for size in sizes:
        together |= size
    return 8 if together % 8 == 0 else 1


def _launch(
    q, kv, indices, sm_scale, attn_sink, topk_length, out, max_logits, lse, arch: Arch, tile: Tile | None = None
) -> None:
    s_q, heads, _ = q.shape
    kv = kv.view(kv.shape[0], 512) if kv.ndim == 2 else kv[:, 0]
    indices = indices if indices.ndim == 2 else indices[:, 0]
    strides = (q.stride(0), q.stride(1), kv.stride(0), out.stride(0), out.stride(1))
    unit = _unit(*(t.data_ptr() // 2 for t in (q, kv, out)), *strides)
    tile = tile or plan(arch, heads, gluon=unit == 8)
    blocks = -(-heads // tile.heads)
    grid = (s_q * blocks,)
    arguments = (
        q,
        kv,
        indices,
        indices if topk_length is None else topk_length,
        lse if attn_sink is None else attn_sink,
        out,
        max_logits,
        lse,
        int(attn_sink is not None),
        int(topk_length is not None),
        sm_scale * 1.4426950408889634,
        heads,
        blocks,
        indices.shape[1],
        kv.shape[0],
        *(x // unit for x in strides),
        indices.stride(0),
    )
    if tile.ampere:
        kernel = variant("prefill_ampere")._prefill_ampere_kernel
        launch(kernel, grid, *arguments, HEADS=tile.heads, KEYS=tile.keys, num_warps=tile.warps)
        return
    launch(
        _prefill_kernel,
        grid,
        *arguments,
        BH=tile.heads,
        BN=tile.keys,
        UNIT=unit,
        OPERAND=tl.float32 if arch.interpret else tl.bfloat16,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def sparse_mla_prefill(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    *,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of ``q`` [s_q, h, 512] bf16, each row over the rows of ``kv`` [s_kv, (1,) 512] it names.

    ``indices`` [s_q, (1,) topk] int32, anything outside [0, s_kv) masked; ``topk_length`` [s_q] int32;
    ``attn_sink`` [h] fp32. Returns ``out`` [s_q, h, 512] bf16, ``max_logits`` and ``lse`` [s_q, h] fp32
    (natural log, with the scale, without the sink; 0, -inf and +inf where a row has no key). No workspace.
    """
    s_q, heads, _ = q.shape
    arch = arch_of(q.device)
    hopper = variant("prefill_hopper") if arch.cc == 90 and not arch.interpret else None
    # At 8 heads its 64-row tile still takes no longer than the plain kernel does.
    if hopper is not None and hopper.supports(q, kv, out):
        return hopper.sparse_mla_prefill(
            q, kv, indices, sm_scale, attn_sink=attn_sink, topk_length=topk_length, out=out
        )
    if out is None:
        out = torch.empty(q.shape, dtype=torch.bfloat16, device=q.device)
    max_logits = torch.empty((s_q, heads), dtype=torch.float32, device=q.device)
    lse = torch.empty_like(max_logits)
    if q.numel():
        _launch(q, kv, indices, sm_scale, attn_sink, topk_length, out, max_logits, lse, arch)
    return out, max_logits, lse
