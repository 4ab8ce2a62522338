"""Constants of an online softmax in base 2, as every attention kernel here computes it."""

from __future__ import annotations

import triton.language as tl

NEGATIVE = tl.constexpr(-1.0e30)
"""A running maximum before the first key: finite, so that -inf - -inf, which is NaN, cannot arise."""
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
