"""Sparse MLA decode: what the Gluon kernels store after a split's loop."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ...lib.gluon import block_index
from ...lib.softmax import LN2, LOG2E
from .gather import UNBIAS, place

# The layout of the wgmma kernels' accumulators with the column bits inside a quad exchanged: a thread holds 8
# neighbouring columns, so a few shuffles turn 4-byte stores into 16-byte ones.
WGMMA_STORE = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64], [0, 256]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0], [0, 128]],
        block_bases=[],
        shape=[64, 512],
    )
)


@gluon.jit
def finish(
    acc, m_i, l_i, here, results, sizes, has_sink, SPLIT: gl.constexpr, STORE: gl.constexpr, BOUND_FIRST: gl.constexpr
):  # fmt: skip
    """The result of a row, with the sink, in the layout ``STORE``; or with ``SPLIT`` the split's partial result and
    LSE. A split without tiles (``here`` is 0) stores only its LSE of -inf.

    ``BOUND_FIRST``: compute the end of the heads before the addresses. Both orders are right; each kernel keeps the one
    that it was measured with.
    """
    out, o_sb, o_ss, o_sh, lse, part, part_lse, sink = results
    heads, block_heads, head_blocks, s_q, splits = sizes
    has_keys = l_i != 0.0  # true for NaN too: a NaN key must show
    l_i = gl.where(has_keys, l_i, 1.0)
    inverse = gl.where(has_keys, UNBIAS / l_i, 0.0)
    row, b, s, head0 = place(block_index("x"), block_heads, head_blocks, s_q)
    split = block_index("y")
    if BOUND_FIRST:
        heads_end = gl.minimum(heads, head0 + block_heads)
    row64, split_row = row.to(gl.int64), (row.to(gl.int64) * splits + split) * heads
    out += (b.to(gl.int64) * o_sb + s.to(gl.int64) * o_ss) * 8
    lse += row64 * heads
    part_lse += split_row
    part += split_row * 512
    head = head0 + gl.arange(0, acc.shape[0], gl.SliceLayout(1, acc.type.layout))
    if not BOUND_FIRST:
        heads_end = gl.minimum(heads, head0 + block_heads)
    head_ok = head < heads_end
    d = gl.arange(0, 512, gl.SliceLayout(0, acc.type.layout))
    if SPLIT:
        gl.store(part_lse + head, gl.where(has_keys, m_i + gl.log2(l_i), float("-inf")), mask=head_ok)
        if here > 0:
            gl.store((part + head * 512)[:, None] + d[None, :], acc * inverse[:, None], mask=head_ok[:, None])
    else:
        row_lse = gl.where(has_keys, (m_i + gl.log2(l_i)) * LN2, float("inf"))
        gl.store(lse + head, row_lse, mask=head_ok)
        sink_value = gl.load(sink + head, mask=head_ok & (has_sink != 0), other=float("-inf"))
        inverse = gl.where(has_keys, inverse / (1.0 + gl.exp2((sink_value - row_lse) * LOG2E)), 0.0)
        if STORE != acc.type.layout:
            head = head0 + gl.arange(0, acc.shape[0], gl.SliceLayout(1, STORE))
            d = gl.arange(0, 512, gl.SliceLayout(0, STORE))
        ptr = (out + head.to(gl.int64) * (o_sh * 8))[:, None] + d[None, :]
        result = gl.convert_layout((acc * inverse[:, None]).to(gl.bfloat16), STORE)
        gl.store(ptr, result, mask=(head < heads_end)[:, None])
