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


def nearest_e4m3(x: Tensor) -> Tensor:
    """The e4m3 values nearest to fp64 x, ties to the even code, at most 448; in fp64."""
    size = x.abs()
    _, exponent = torch.frexp(size)  # size is in [2^(exponent - 1), 2^exponent)
    step = torch.ldexp(torch.ones_like(size), exponent.clamp(min=-5) - 4)
    return torch.copysign((torch.round(size / step) * step).clamp(max=448.0), x)


def block_scale(amax: Tensor) -> Tensor:
    """The scale of blocks by their largest magnitudes: the least power of two not below max(amax, 1e-4) / 448, the
    quotient rounded to fp32 as in the definition; in fp64.
    """
    largest = amax.to(torch.float32).clamp(min=1e-4)
    quotient = largest * torch.tensor(1 / 448, dtype=torch.float32, device=amax.device)
    mantissa, exponent = torch.frexp(quotient.to(F64))
    return torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).int())


def rotated(x: Tensor, positions: Tensor, cos_sin: Tensor, *, back: bool = False) -> Tensor:
    """fp64 ``[t, h, 64]``, pairs of neighbours rotated at the tokens' positions, clamped to the table."""
    at = positions.long().clamp(0, cos_sin.shape[0] - 1)
    turn = torch.complex(*cos_sin.to(F64)[at].unflatten(-1, (2, 32)).unbind(1)).unsqueeze(1)
    pairs = torch.view_as_complex(x.contiguous().unflatten(-1, (32, 2)))
    return torch.view_as_real(pairs * (turn.conj() if back else turn)).flatten(-2)
