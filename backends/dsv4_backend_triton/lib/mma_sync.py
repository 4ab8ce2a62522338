"""What the Gluon kernels for mma.sync share: layouts, and sums that stay with their threads.

mma.sync is bound by what the warps read from shared memory. So in both products four warps lie side by side along the
columns (keys of S, columns of O), and eight warps in two such rows, along the heads.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

ROWS_LAYOUT = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
"""bf16 rows of 128 bytes or more, for ldmatrix."""


@gluon.constexpr_function
def mma_layout(warps: int) -> Any:
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps // 4, 4], instr_shape=[16, 8])


@gluon.constexpr_function
def sums_layout(heads: int, warps: int) -> Any:
    """[heads, 16]: 16 threads hold logits of a head; column t is thread t's sum."""
    high = warps // 4
    return gl.DistributedLinearLayout(
        reg_bases=[[8, 0]] + ([[16 * high, 0]] if heads > 16 * high else []),
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[0, 4], [0, 8]] + ([[16, 0]] if high == 2 else []),
        block_bases=[],
        shape=[heads, 16],
    )


@gluon.jit
def halves(p):
    """The two halves of the columns, 32 or fewer each; no data moves between threads."""
    return gl.split(gl.permute(gl.reshape(p, [p.shape[0], 2, p.shape[1] // 2]), (0, 2, 1)))


@gluon.jit
def add_to_sums(sums, alpha, p):
    """The running sums of exp, 16 a head: a thread adds what it holds, and no data moves between threads."""
    alpha = gl.convert_layout(alpha, gl.SliceLayout(1, sums.type.layout))
    parts = gl.reshape(p, [p.shape[0], p.shape[1] // 32, 16, 2])
    return sums * alpha[:, None] + gl.convert_layout(gl.sum(gl.sum(parts, 3), 1), sums.type.layout)
