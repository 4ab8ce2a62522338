"""The Walsh-Hadamard transform inside kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _butterflies(x, HALF: tl.constexpr):
    """``x [N, K]`` with (a, b) -> (a + b, a - b) for elements that are ``HALF`` apart."""
    pairs: tl.constexpr = x.shape[1] // (2 * HALF)
    left, right = tl.split(x.reshape(x.shape[0], pairs, 2, HALF).permute(0, 1, 3, 2))
    return tl.join(left + right, left - right).permute(0, 1, 3, 2).reshape(x.shape[0], x.shape[1])


@triton.jit
def hadamard128(x):
    """fp32 ``x [N, 128]`` times the Walsh-Hadamard matrix in Sylvester order and 128^-0.5."""
    x = _butterflies(x, 1)
    x = _butterflies(x, 2)
    x = _butterflies(x, 4)
    # The other steps on the transposed rows, so that each thread again holds both elements of a pair.
    x = x.reshape(x.shape[0], 16, 8).permute(0, 2, 1).reshape(x.shape[0] * 8, 16)
    x = _butterflies(x, 1)
    x = _butterflies(x, 2)
    x = _butterflies(x, 4)
    x = _butterflies(x, 8)
    x = x.reshape(x.shape[0] // 8, 8, 16).permute(0, 2, 1).reshape(x.shape[0] // 8, 128)
    return x * 0.08838834764831845
