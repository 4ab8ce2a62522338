"""The values of FP8 codes, by tables computed from their definitions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

F64 = torch.float64


def _e4m3_value(code: int) -> float:
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 0xF, code & 0x7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


_E4M3 = torch.tensor([_e4m3_value(code) for code in range(256)], dtype=F64, device="cpu")


_E8M0 = torch.tensor([2.0 ** (code - 127) for code in range(255)] + [math.nan], dtype=F64, device="cpu")


def e4m3(x: Tensor) -> Tensor:
    """fp64 values of e4m3 codes, given as bytes or as e4m3."""
    return _E4M3.to(x.device)[x.contiguous().view(torch.uint8).int()]


def e8m0(codes: Tensor) -> Tensor:
    """fp64 values of E8M0 codes (uint8)."""
    return _E8M0.to(codes.device)[codes.int()]
