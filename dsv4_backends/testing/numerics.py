"""Compare a result with the oracle under a tolerance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..contract import Tolerance


@dataclass(frozen=True)
class Error:
    """How a result compares with the oracle.

    Attributes:
        ratio: Worst error as a share of what is allowed, over elements and over ``calc_diff``; above 1 fails.
        calc_diff: ``1 - 2<x, y> / (<x, x> + <y, y>)`` over the finite elements.
        worst: Largest absolute error over the finite elements.
        note: What is wrong beyond size, e.g. "NaN at [0, 3]"; such a result has an infinite ratio.
    """

    ratio: float
    calc_diff: float
    worst: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.ratio <= 1.0


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype hold the same bits, NaN included."""
    integer = _INTEGERS[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(integer), b.view(integer))


def calc_diff(x: Tensor, y: Tensor) -> float:
    """DeepSeek's similarity distance in fp64; 0 for two zeros."""
    x, y = x.double(), y.double()
    norm = float((x * x + y * y).sum())
    # From the difference, since 1 - 2<x, y>/norm cancels to 1e-16 of noise.
    return float(((x - y) ** 2).sum()) / norm if norm else 0.0


def compare(result: Tensor, reference: Tensor, tolerance: Tolerance) -> Error:
    """Judge ``result`` against an fp64 ``reference`` of the same shape."""
    result = result.double()
    if result.numel() == 0:
        return Error(0.0, 0.0, 0.0)
    finite = torch.isfinite(reference)
    # Infinities and NaN must be the same in the same places.
    strange = (result == reference) | (result.isnan() & reference.isnan())
    bad = ~torch.where(finite, torch.isfinite(result), strange)
    if bad.any():
        at = bad.nonzero()[0].tolist()
        got, want = float(result[tuple(at)]), float(reference[tuple(at)])
        return Error(math.inf, math.inf, math.inf, f"{got} instead of {want} at {at}, {int(bad.sum())} such elements")
    if not finite.any():
        return Error(0.0, 0.0, 0.0)
    x, y = result[finite], reference[finite]
    error = (x - y).abs()
    rms = float(y.square().mean().sqrt())
    allowed = tolerance.atol + tolerance.atol_rms * rms + tolerance.rtol * y.abs()
    difference = calc_diff(x, y)
    # 0 allowed and 0 found is a pass.
    shares = torch.where(error == 0, 0.0, error / allowed)
    ratio = max(float(shares.max()), difference / tolerance.calc_diff)
    return Error(ratio, difference, float(error.max()))
