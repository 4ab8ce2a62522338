"""What the kernels of both logits ops share: the head sum, the query tile, the fill, and the fit of a configuration.

``logits[m, n] = k_scale[n] * sum_h relu(q[m, h] . k[n]) * weights[m, h]``; positions outside a row's range
are exactly -inf. Every element of the output is written exactly once by the kernel itself: no fill pass, no
workspace.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..arch import Arch
from ..configurations import configured
from ..lib.bits import fp8_operand
from ..lib.sizes import cdiv, pow2


class Config(NamedTuple):
    """Launch configuration.

    Attributes:
        waves: Blocks for each multiprocessor. In the paged kernel, whose blocks share all work: as many as run at once.
            In the other: the number to reach by cutting along the keys.
        visit: In the paged kernel, the time to turn to another request, in tiles.
    """

    rows: int
    block_n: int
    warps: int
    stages: int
    tma: bool
    waves: int
    visit: int = 1


def padded(h: int, d: int) -> tuple[int, int]:
    """Heads and dimensions of a tile."""
    return pow2(h, 16), pow2(d, 32)


def fitted(op: str, arch: Arch, rows: int | None, h: int, d: int) -> Config:
    """The configuration of the portable kernel, fitted to a call: rows x heads are at most what the tile was made for
    (128 columns, 256 for the paged kernel's rows), and stages are dropped until the operands fit shared memory.
    ``rows``: the number of rows, which times the heads is the size in the paged kernel's table; None: as many as the
    tile takes."""
    block_h, block_d = padded(h, d)
    config = Config(**configured(op, "portable", arch, size=pow2(rows or 0) * block_h))
    size = 1 if arch.native_fp8 else 2
    most = config.rows * max(1, 64 // block_h)
    rows = max(1, min(most, pow2(most if rows is None else rows)))
    stages, keys = config.stages, config.block_n * block_d
    while stages > 1 and rows * block_h * block_d * size + (stages + size - 1) * keys > arch.smem - 8192:
        stages -= 1
    return config._replace(rows=rows, stages=stages)


def chunk_of(columns: int, other_blocks: int, config: Config, sms: int) -> int:
    """Columns per block: as many as keep ``waves`` blocks per multiprocessor, a multiple of the tile."""
    wanted = cdiv(config.waves * sms, max(other_blocks, 1))
    return max(1, cdiv(cdiv(columns, wanted), config.block_n)) * config.block_n


def constants(config: Config, arch: Arch, h: int, d: int) -> dict[str, Any]:
    """The constants that both kernels have."""
    block_h, block_d = padded(h, d)
    names = dict(H=h, D=d, BLOCK_H=block_h, BLOCK_D=block_d, ROWS=config.rows, BLOCK_N=config.block_n)
    return names | dict(OPERAND=arch.fp8, STAGES=config.stages)


@triton.jit
def relu_head_sum(k, q_t, w, ROWS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr):
    """Twice ``sum_h relu(k . q_h) * w_h``, as [BLOCK_N, ROWS].

    Keys are the M side of the product, so that the head sum runs along registers of one thread. ``x + |x|``
    is twice the relu in one full-rate instruction (max is half rate), and keeps NaN.
    """
    s = tl.dot(k, q_t, out_dtype=tl.float32)
    s = (s + tl.abs(s)) * w[None, :]
    return tl.sum(tl.reshape(s, (BLOCK_N, ROWS, BLOCK_H)), axis=2)


@triton.jit
def load_q(
    q_ptr, row, row_ok, head, stride_m, stride_h,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    dim = tl.arange(0, BLOCK_D)
    ptr = q_ptr + row.to(tl.int64)[:, None] * stride_m + (head * stride_h)[:, None] + dim[None, :]
    mask = (row_ok & (head < H))[:, None] & (dim < D)[None, :]
    return fp8_operand(tl.load(ptr, mask=mask, other=0.0), OPERAND)


@triton.jit
def fill(out_ptr, row, row_ok, out_stride, begin, end, FILL_N: tl.constexpr):
    """-inf to columns [begin, end) of some rows."""
    for j in range(begin, end, FILL_N):
        col = j + tl.arange(0, FILL_N)
        ptr = out_ptr + row.to(tl.int64)[:, None] * out_stride + col[None, :]
        value = tl.full((row.shape[0], FILL_N), float("-inf"), tl.float32)
        tl.store(ptr, value, mask=row_ok[:, None] & (col < end)[None, :], cache_modifier=".cs")
