"""The head sum of both logits ops on wgmma: 64 keys and one or two queries of 64 heads."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

HALF = gl.constexpr(64)  # keys of a product: the M of one wgmma
COLUMNS = gl.constexpr(128)  # its N, of two queries


@gluon.constexpr_function
def products(queries):
    """The layout of products, [HALF, queries * 64]."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, queries * 64, 32])


@gluon.constexpr_function
def _parts(queries):
    """The layout of sums over some heads, [HALF, queries, 4]: the 4 in registers of one thread. With one query two
    threads have the same."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 0, 2]],
        lane_bases=[[0, queries - 1, 0], [8, 0, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        warp_bases=[[16, 0, 0], [32, 0, 0]],
        block_bases=[],
        shape=[64, queries, 4],
    )


@gluon.constexpr_function
def logits(queries):
    """The layout of logits, [HALF, queries]: one of each thread."""
    return gl.SliceLayout(2, _parts(queries))


@gluon.jit
def product(keys, q_t):
    """The products of 64 keys and one or two queries, not waited for."""
    columns: gl.constexpr = q_t.shape[1]
    zeros = gl.zeros([HALF, columns], gl.float32, layout=products(columns // 64))
    return warpgroup_mma(keys, q_t, zeros, use_acc=False, is_async=True)


@gluon.jit
def _terms(x, QUERIES: gl.constexpr):
    """[HALF, QUERIES * 64] as 16 tensors [HALF, QUERIES, 4]: of each thread, the terms of its sum for each query and
    key."""
    x = gl.permute(gl.reshape(x, [HALF, QUERIES, 8, 4, 2]), (0, 1, 3, 2, 4))
    terms = (gl.reshape(x, [HALF, QUERIES, 4, 16]),)
    for level in gl.static_range(4):
        halves = ()
        for i in gl.static_range(1 << level):
            halves += gl.split(gl.reshape(terms[i], [HALF, QUERIES, 4, 8 >> level, 2]))
        terms = halves  # type: ignore[assignment]
    return terms


@gluon.jit
def relu_head_sum(s, w):
    """Twice the sum of relu(s) * w over the heads of each query. One addition each, x + |x|, and one multiply-add: the
    terms are listed, since ``gl.sum`` adds them by pairs from Triton 3.8 on, which takes half an instruction more."""
    QUERIES: gl.constexpr = s.shape[1] // 64
    layout: gl.constexpr = _parts(QUERIES)
    s, w = gl.broadcast(s, w[None, :])
    s = _terms(s + gl.abs(s), QUERIES)
    w = _terms(w, QUERIES)
    parts = s[0] * w[0]
    for i in gl.static_range(1, 16):
        parts = gl.fma(s[i], w[i], parts)
    return gl.sum(gl.convert_layout(gl.reshape(parts, [HALF, QUERIES, 4]), layout), axis=2)
