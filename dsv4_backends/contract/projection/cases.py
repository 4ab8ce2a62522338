"""Seeded cases of the output projection and of the ops before it, the tolerances of results, and the cost of a call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import inputs as draw
from ..models import FLASH, PRO
from ..spec import Case, Cost, Tolerance
from .meaning import HEAD_DIM

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def make_einsum(
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
    made = {name: draw.move(value, device) for name, value in made.items()}
    if layout == "repeated":  # one token and one group of weights in the memory
        made |= {name: made[name][:1].clone().expand_as(made[name]) for name in ("x", "w")}
    return made


def make_inverse(
    device: torch.device,
    generator: torch.Generator,
    *,
    t: int,
    h: int,
    groups: int,
    max_positions: int = 64,
    positions: str = "within",
    dtype: str = "int64",
    values: str = "normal",
    layout: str = "plain",
) -> dict[str, Any]:
    import torch

    x = draw.normal(generator, t, h, HEAD_DIM)
    if values == "wide":  # from below the floor of the largest magnitude to near the end of bf16, a block at a time
        x *= draw.powers(generator, -40, 118, t, h, HEAD_DIM // 64).repeat_interleave(64, -1)
        x[:, ::3, 128:256] = 0.0
    x = x.bfloat16()
    if layout == "padded":  # the first heads of more, as attention with padded heads leaves them
        wide = torch.full((t, h + 3, HEAD_DIM), float("nan"), dtype=torch.bfloat16)
        x = wide[:, :h].copy_(x)
    elif layout == "strided":
        x = draw.spread(x)
    elif layout == "unaligned":
        wide = torch.full((t, h, HEAD_DIM + 7), float("nan"), dtype=torch.bfloat16)
        x = wide[..., 3 : 3 + HEAD_DIM].copy_(x)
    at = draw.positions(generator, t, max_positions, dtype, positions)
    table = draw.cos_sin(max_positions, at)
    if layout in ("strided", "unaligned"):
        table = draw.spread(table)
    made = {"x": x, "positions": at, "cos_sin": table}
    moved: dict[str, Any] = {name: draw.move(value, device) for name, value in made.items()}
    return moved | {"groups": groups}


def make_inverse_quant(
    device: torch.device, generator: torch.Generator, *, packed: bool | None = False, **params: Any
) -> dict[str, Any]:
    made = make_inverse(device, generator, **params)
    return made if packed is None else made | {"packed": packed}


def _table_bytes(positions: Tensor, cos_sin: Tensor) -> float:
    """Rows of the table that a call needs at least."""
    t, most = positions.shape[0], cos_sin.shape[0]
    return float(positions.element_size() * t + 256 * min(t, most))


def cost_inverse_quant(x: Tensor, positions: Tensor, cos_sin: Tensor, groups: int, *, packed: bool = False) -> Cost:
    t, h, _ = x.shape
    scales = t * h * (4 if packed else 16)
    moved = 3.0 * t * h * HEAD_DIM + scales + _table_bytes(positions, cos_sin)
    return Cost(flops=3.0 * t * h * HEAD_DIM, bytes=moved, math="bf16")


def cost_inverse(x: Tensor, positions: Tensor, cos_sin: Tensor, groups: int) -> Cost:
    t, h, _ = x.shape
    return Cost(flops=3.0 * t * h * 64, bytes=4.0 * t * h * HEAD_DIM + _table_bytes(positions, cos_sin), math="bf16")


def cost_einsum(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, **optional: Any) -> Cost:
    b, h, r = x.shape
    d = w.shape[1]
    scale_bytes = x_scale.numel() * x_scale.element_size() + w_scale.numel() * w_scale.element_size()
    return Cost(
        flops=2.0 * b * h * d * r,
        bytes=float(b * h * r + h * d * r + 2 * b * h * d + scale_bytes),
        math="fp8",
    )


def _einsum_cases() -> tuple[Case, ...]:
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
        case("repeated token", "smoke", b=5, h=3, r=256, d=128, layout="repeated"),
        case("many repeated tokens", "default", b=130, h=2, r=256, d=128, layout="repeated"),
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
        case("many tokens, any fp32", "full", b=300, h=8, r=512, d=1024, scales="any fp32"),
    ]
    return tuple(cases)


def _inverse_cases(*, quantised: bool) -> tuple[Case, ...]:
    def case(name: str, level: str, **params: Any) -> Case:
        return Case(name, level, params)

    cases = [
        case("small", "smoke", t=3, h=4, groups=2),
        case("no tokens", "smoke", t=0, h=4, groups=2),
        case("one of each", "smoke", t=1, h=1, groups=1, max_positions=1),
        case("odd", "smoke", t=13, h=9, groups=3),
        case("positions beyond the table", "smoke", t=9, h=2, groups=1, positions="any"),
        case("int32, beyond the table", "smoke", t=9, h=2, groups=2, dtype="int32", positions="any"),
        case("padded heads", "smoke", t=6, h=5, groups=5, layout="padded"),
        case("strided", "smoke", t=6, h=3, groups=1, layout="strided"),
        case("unaligned", "smoke", t=5, h=2, groups=1, layout="unaligned"),
        case("wide values", "smoke", t=11, h=6, groups=2, values="wide"),
    ]
    if quantised:
        cases += [
            case("packed", "smoke", t=6, h=4, groups=2, packed=True),
            case("packed is left out", "smoke", t=2, h=2, groups=2, packed=None),
            case("packed wide values", "smoke", t=9, h=3, groups=1, values="wide", packed=True),
        ]
    for model in (FLASH, PRO):
        short = model.name.rpartition("-")[2].lower()
        for tp in (1, 2, 4, 8):
            rank = model.rank(tp)
            common = {"h": rank.heads, "groups": rank.o_groups, "max_positions": 2000}
            cases.append(case(f"{short} tp{tp}", "default", t=33, layout="padded", **common))
            cases.append(case(f"{short} tp{tp} chunk", "full", t=1030, **common))
        common = {"h": model.heads, "groups": model.o_groups, "max_positions": 70000}
        cases.append(case(f"{short} prefill", "full", t=4096, **common))
        if quantised:
            cases.append(case(f"{short} packed", "default", t=130, packed=True, **common))
    cases.append(case("hostile values", "default", t=257, h=16, groups=2, positions="any", layout="strided"))
    return tuple(cases)


INVERSE_QUANT = _inverse_cases(quantised=True)
INVERSE = _inverse_cases(quantised=False)
INVERSE_QUANT_TOLERANCES = {
    "x_fp8": Tolerance(
        rtol=2**-3,
        atol=2**-9,
        calc_diff=1e-6,
        why="one code: the rotation in fp32 rounds one element in 2^20 to a neighbouring code. calc_diff bounds how "
        "often: rounding other than to the nearest has 1e-3.",
    ),
    "x_scale": Tolerance(why="powers of two, exact."),
}
INVERSE_TOLERANCES = {
    "out": Tolerance(
        rtol=2**-8,
        atol_rms=1e-6,
        calc_diff=3e-6,
        why="bf16 rounds a rotated element (2^-8, calc_diff 1e-6); where its two products cancel, fp32 rounded them.",
    )
}
EINSUM = _einsum_cases()
EINSUM_TOLERANCES = {
    "out": Tolerance(
        rtol=2**-8,
        atol_rms=1e-2,
        calc_diff=1e-5,
        why="bf16 rounds the output (2^-9, calc_diff 1e-6); FP8 tensor cores keep about 14 bits within a block "
        "of 128 before it is added in fp32.",
    )
}
