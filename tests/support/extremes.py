"""Inputs at the ends of the formats, for every provider that a test can run."""

from __future__ import annotations

from typing import Any

import torch

from dsv4_backends import CONTRACTS, use_providers
from dsv4_backends.contract import Case, layouts
from dsv4_backends.testing import numerics, oracle
from dsv4_backends.testing.checks import Subject


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
        (want,) = oracle.of("fp8_einsum")(**made)
        assert want.isnan().sum() == d
        assert want[0].abs().max() > 0
        error = numerics.compare(result, want, CONTRACTS["fp8_einsum"].tolerances["out"])
        assert error.ok, error


def _right(target: Subject, made: dict[str, Any]) -> bool:
    contract = target.contract
    return all(
        numerics.compare(result, want, contract.tolerances[name]).ok
        for name, result, want in zip(
            contract.returns, target.run(made), oracle.expected(contract.name, made), strict=True
        )
    )


def check_bounds(target: Subject, compressed: int | None) -> None:
    """Row bounds of ``mqa_logits``: negative starts, ends far below or beyond, more keys than columns."""
    generator = torch.Generator().manual_seed(0)
    made = target.contract.make(target.device, generator, m=50, n=300, h=32, compressed=compressed)
    rows, low, high = 50, -(2**31), 2**31 - 1
    for name, bounds in (
        ("row_starts", [-5, 40, 0, low, 299, 300, high, 10]),
        ("row_ends", [20, 3, high, high, 300, 300, low, 200]),
    ):
        made[name] = torch.tensor(bounds).repeat(-(-rows // 8))[:rows].int().to(target.device)
    made["k_scale"] = torch.ones(300, device=target.device)
    made["k"] = torch.randn(300, 128, generator=generator).to(torch.float8_e4m3fn).to(target.device)
    assert _right(target, made)


def check_lengths(target: Subject, next_n: int) -> None:
    """Lengths of ``paged_mqa_logits``: the last token's need not be the longest, and both ends are clamped."""
    case = Case("any order", "smoke", {"b": 3, "context": 200, "next_n": next_n, "h": 32, "lens": "full"})
    made = target.contract.inputs(case, target.device)
    lengths = torch.tensor([[200, 3, 7, 0, 90], [-4, 199, 250, 0, 1], [0, 0, 0, 0, 0]])
    made["context_lens"] = lengths[:, :next_n].int().contiguous().to(target.device)
    assert target.refusal(made) is None
    assert _right(target, made)
