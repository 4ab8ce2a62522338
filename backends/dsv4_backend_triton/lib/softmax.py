"""An online softmax in base 2, as every attention kernel here computes it: constants, and its step in plain Triton."""

from __future__ import annotations

import triton
import triton.language as tl

NEGATIVE = tl.constexpr(-1.0e30)
"""A running maximum before the first key: finite, so that -inf - -inf, which is NaN, cannot arise."""
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend(q, acc, m_i, l_i, k, valid, scale_log2, OPERAND: tl.constexpr, FIRST: tl.constexpr):
    """One tile of keys into the running (accumulator, maximum, sum) of an online softmax in base 2."""
    logits = tl.dot(q, tl.trans(k))
    logits = tl.where(valid[None, :], logits * scale_log2, NEGATIVE)
    if FIRST:
        m_new = tl.max(logits, 1)
    else:
        m_new = tl.maximum(m_i, tl.max(logits, 1))
    p = tl.where(valid[None, :], tl.exp2(logits - m_new[:, None]), 0.0)
    if FIRST:
        l_i = tl.sum(p, 1)
        acc = tl.dot(p.to(OPERAND), k)
    else:
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(OPERAND), k, acc * alpha[:, None])
    return acc, m_new, l_i
