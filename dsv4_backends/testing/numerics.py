"""Compare a result with the oracle under a tolerance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..contract import Tolerance


@dataclass(frozen=True)
class Error:
    """The comparison of a result with the oracle.

    Attributes:
        ratio: Worst error as a share of the tolerance, over elements and ``calc_diff``; above 1 fails.
        calc_diff: ``1 - 2<x, y> / (<x, x> + <y, y>)`` over the finite elements.
        worst: Largest absolute error over the finite elements.
        note: An error that is not a matter of size, e.g. "NaN at [0, 3]"; the ratio is then infinite.
    """

    ratio: float
    calc_diff: float
    worst: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.ratio <= 1.0


INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype hold the same bits, NaN included."""
    integer = INTEGERS[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(integer), b.view(integer))


def calc_diff(x: Tensor, y: Tensor) -> float:
    """DeepSeek's similarity distance in fp64; 0 for two zeros."""
    x, y = x.double(), y.double()
    norm = float((x * x + y * y).sum())
    # Computed from the difference: 1 - 2<x, y>/norm cancels, which leaves noise of 1e-16.
    return float(((x - y) ** 2).sum()) / norm if norm else 0.0


PIECE = 1 << 24
"""Elements compared at a time: about ten temporaries of the largest results would not fit in memory."""


def compare(result: Tensor, reference: Tensor, tolerance: Tolerance) -> Error:
    """Judge ``result`` against an fp64 ``reference``."""
    if result.shape != reference.shape:
        note = f"shape {list(result.shape)} instead of {list(reference.shape)}"
        return Error(math.inf, math.inf, math.inf, note)
    if result.numel() == 0:
        return Error(0.0, 0.0, 0.0)
    pairs = list(zip(result.reshape(-1).split(PIECE), reference.reshape(-1).split(PIECE), strict=True))
    wrong, first, count, result_squares, reference_squares, difference_squares = 0, -1, 0, 0.0, 0.0, 0.0
    for index, (found, want) in enumerate(pairs):
        found = found.double()
        finite = torch.isfinite(want)
        # Infinities and NaN must be in the same places.
        same_special = (found == want) | (found.isnan() & want.isnan())
        bad = ~torch.where(finite, torch.isfinite(found), same_special)
        if bad.any():
            first = first if wrong else index * PIECE + int(bad.nonzero()[0])
            wrong += int(bad.sum())
            continue
        x, y = found[finite], want[finite]
        count += len(y)
        result_squares += float(x.square().sum())
        reference_squares += float(y.square().sum())
        difference_squares += float((x - y).square().sum())
    if wrong:
        at = [int(i) for i in torch.unravel_index(torch.tensor(first), result.shape)]
        got, expected = float(result[tuple(at)]), float(reference[tuple(at)])
        return Error(math.inf, math.inf, math.inf, f"{got} instead of {expected} at {at}, {wrong} such elements")
    if not count:
        return Error(0.0, 0.0, 0.0)
    norm = result_squares + reference_squares
    # As in calc_diff.
    difference = difference_squares / norm if norm else 0.0
    floor = tolerance.atol + tolerance.atol_rms * math.sqrt(reference_squares / count)
    ratio, worst = difference / tolerance.calc_diff, 0.0
    for found, want in pairs:
        finite = torch.isfinite(want)
        y = want[finite]
        if len(y) == 0:
            continue
        error = (found[finite].double() - y).abs()
        # An error of 0 passes a tolerance of 0.
        shares = torch.where(error == 0, 0.0, error / (floor + tolerance.rtol * y.abs()))
        ratio, worst = max(ratio, float(shares.max())), max(worst, float(error.max()))
    return Error(ratio, difference, worst)
