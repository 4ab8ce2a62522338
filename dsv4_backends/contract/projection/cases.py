"""Seeded cases of the output projection, how far results may be from the oracle, and the least work of a call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import inputs as draw
from ..models import FLASH, PRO
from ..spec import Case, Cost, Tolerance

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def make(
    device: torch.device,
    generator: torch.Generator,
    *,
    b: int,
    h: int,
    r: int,
    d: int,
    scales: str = "fp32",
    per_row: bool = False,
    layout: str = "engine",
) -> dict[str, Any]:
    import torch

    from .. import layouts

    blocks = -(-r // 128)
    x_scale = draw.powers(generator, -3, 4, b, h, blocks)
    rows = d if per_row else -(-d // 128)
    w_scale = draw.powers(generator, -3, 4, h, rows, blocks)
    x = draw.e4m3(generator, device, b, h, r)
    # Weights of a real case are drawn a group at a time to bound the memory of the draw.
    groups = [draw.e4m3(generator, device, d, r) for _ in range(h)]
    w = torch.stack(groups) if groups else torch.empty(0, d, r, dtype=torch.float8_e4m3fn, device=device)
    if scales == "any fp32":
        x_scale *= 1 + draw.uniform(generator, *x_scale.shape)
        w_scale *= 1 + draw.uniform(generator, *w_scale.shape)
    elif scales != "fp32":
        codes = layouts.e8m0_encode(x_scale), layouts.e8m0_encode(w_scale)
        if scales == "e8m0":
            x_scale, w_scale = (code.view(torch.float8_e8m0fnu) for code in codes)
        else:
            x_scale, w_scale = (layouts.e8m0_pack(code) for code in codes)
    if layout == "engine":  # vLLM: values group-major, scales with the tokens contiguous and padded to 4
        x = x.view(torch.uint8).transpose(0, 1).contiguous().view(torch.float8_e4m3fn).transpose(0, 1)
        raw = torch.empty((h, x_scale.shape[2], b + -b % 4), dtype=x_scale.dtype)
        raw.view(torch.uint8).fill_(draw.POISON)
        x_scale = raw[..., :b].copy_(x_scale.permute(1, 2, 0)).permute(2, 0, 1)
    made = {"x": x, "x_scale": x_scale, "w": w, "w_scale": w_scale}
    return {name: draw.move(value, device) for name, value in made.items()}


def cost(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, **optional: Any) -> Cost:
    b, h, r = x.shape
    d = w.shape[1]
    scale_bytes = x_scale.numel() * x_scale.element_size() + w_scale.numel() * w_scale.element_size()
    return Cost(
        flops=2.0 * b * h * d * r,
        bytes=float(b * h * r + h * d * r + 2 * b * h * d + scale_bytes),
        math="fp8",
    )


def _cases() -> tuple[Case, ...]:
    def case(name: str, level: str, **params: Any) -> Case:
        return Case(name, level, params)

    cases = [
        case("small", "smoke", b=3, h=2, r=256, d=128),
        case("no tokens", "smoke", b=0, h=2, r=256, d=128),
        case("no input", "smoke", b=3, h=2, r=0, d=16),
        case("one of each", "smoke", b=1, h=1, r=1, d=1),
        case("ragged", "smoke", b=5, h=3, r=300, d=200),
        case("e8m0", "smoke", b=4, h=2, r=384, d=256, scales="e8m0"),
        case("packed", "smoke", b=5, h=2, r=640, d=256, scales="packed"),
        case("packed rows", "smoke", b=5, h=2, r=700, d=130, scales="packed", per_row=True),
        case("rows", "smoke", b=2, h=2, r=256, d=130, per_row=True),
        case("any fp32", "smoke", b=6, h=2, r=384, d=256, scales="any fp32"),
        case("contiguous", "smoke", b=6, h=2, r=384, d=256, layout="contiguous"),
    ]
    for model in (FLASH, PRO):
        short = model.name.rpartition("-")[2].lower()
        for tp in (1, 2, 4, 8):
            rank = model.rank(tp)
            common = {"h": rank.o_groups, "r": rank.o_in, "d": model.o_lora_rank}
            cases.append(case(f"{short} tp{tp}", "default", b=3, **common))
            cases.append(case(f"{short} tp{tp} chunk", "full", b=1030, **common))
        cases.append(case(f"{short} prefill", "full", b=4096, h=model.o_groups, r=rank.o_in, d=model.o_lora_rank))
    cases += [
        case("flash packed", "default", b=33, h=2, r=4096, d=1024, scales="packed", per_row=True),
        case("flash e8m0", "default", b=130, h=1, r=4096, d=1024, scales="e8m0"),
    ]
    return tuple(cases)


CASES = _cases()
TOLERANCES = {
    "out": Tolerance(
        rtol=2**-8,
        atol_rms=1e-2,
        calc_diff=1e-5,
        why="bf16 rounds the output (2^-9, calc_diff 1e-6); FP8 tensor cores keep about 14 bits within a block "
        "of 128 before it is added in fp32.",
    )
}
