"""Inputs at the ends of the formats, for every provider that a test can run."""

from __future__ import annotations

from typing import Any

import torch

from dsv4_backends import CONTRACTS, use_providers
from dsv4_backends.contract import layouts
from dsv4_backends.testing import numerics, oracle


def check_extreme_scale_codes(provider: str, device: torch.device) -> None:
    """E8M0 code 0 is 2^-127 (not 0) and 255 is NaN (not infinity), in both dtypes that carry codes.

    The weights' scales of 2^100 bring the products back to numbers that can be compared.
    """
    from dsv4_backends import ops

    b, h, r, d = 5, 2, 512, 128
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(b, h, r, generator=generator).to(torch.float8_e4m3fn)
    w = torch.randn(h, d, r, generator=generator).to(torch.float8_e4m3fn)
    x_codes = torch.zeros(b, h, r // 128, dtype=torch.uint8)
    x_codes[2, 1, 3] = 255
    w_codes = torch.full((h, 1, r // 128), 227, dtype=torch.uint8)
    for pack in (lambda codes: codes.view(torch.float8_e8m0fnu), layouts.e8m0_pack):
        made: dict[str, Any] = {"x": x, "x_scale": pack(x_codes), "w": w, "w_scale": pack(w_codes)}
        made = {name: value.to(device) for name, value in made.items()}
        with use_providers({"fp8_einsum": provider}):
            result = ops.fp8_einsum(**made)
        (want,) = oracle.fp8_einsum(**made)
        assert want.isnan().sum() == d
        assert want[0].abs().max() > 0
        error = numerics.compare(result, want, CONTRACTS["fp8_einsum"].tolerances["out"])
        assert error.ok, error
