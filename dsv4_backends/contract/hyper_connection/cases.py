"""Seeded cases of the prenorm GEMM, the tolerances of its results, and the cost of a call."""

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
    m: int,
    k: int,
    n: int = 24,
    num_splits: int | None = None,
    layout: str = "plain",
) -> dict[str, Any]:
    x = draw.normal(generator, m, k).bfloat16()
    fn = draw.normal(generator, n, k, scale=max(k, 1) ** -0.5)
    if layout == "strided":
        x = draw.spread(x)
    moved: dict[str, Any] = {"x": draw.move(x, device), "fn": draw.move(fn, device)}
    if layout == "repeated":  # one row in the memory
        moved = {name: value[:1].clone().expand_as(value) for name, value in moved.items()}
    return moved | ({"num_splits": num_splits} if num_splits is not None else {})


def cost(x: Tensor, fn: Tensor, *, num_splits: int | None = None, **optional: Any) -> Cost:
    m, k = x.shape
    n = fn.shape[0]
    return Cost(
        flops=2.0 * m * n * k,
        bytes=float(2 * m * k + 4 * n * k + 4 * (num_splits or 1) * m * (n + 1)),
        math="tf32",
    )


def _cases() -> tuple[Case, ...]:
    def case(name: str, level: str, **params: Any) -> Case:
        return Case(name, level, params)

    cases = [
        case("small", "smoke", m=3, k=256),
        case("no tokens", "smoke", m=0, k=256),
        case("one of each", "smoke", m=1, k=1, n=1),
        case("ragged", "smoke", m=7, k=333, n=5),
        case("head", "smoke", m=5, k=512, n=4),
        case("one split", "smoke", m=5, k=512, num_splits=1),
        case("splits", "smoke", m=5, k=1024, num_splits=5),
        case("more splits than blocks", "smoke", m=3, k=192, num_splits=7),
        case("strided", "smoke", m=6, k=320, layout="strided"),
        case("repeated row", "smoke", m=5, k=320, layout="repeated"),
        case("many repeated rows", "default", m=300, k=1024, layout="repeated"),
        case("many rows, more splits than blocks", "default", m=300, k=192, num_splits=7),
        case("many rows, few columns", "default", m=261, k=448, n=5, layout="strided"),
    ]
    for model in (FLASH, PRO):
        short = model.name.rpartition("-")[2].lower()
        k = model.rank(1).hc_k
        cases += [
            case(f"{short} m={m}{f' splits={s}' if s else ''}", "default", m=m, k=k, num_splits=s)
            for m, s in ((1, None), (1, 16), (13, None), (137, 4))
        ]
        cases.append(case(f"{short} broadcast", "default", m=9, k=model.hidden))
        cases.append(case(f"{short} m=4096", "full", m=4096, k=k))
        cases.append(case(f"{short} m=1024 splits=8", "full", m=1024, k=k, num_splits=8))
    return tuple(cases)


CASES = _cases()
TOLERANCES = {
    "out": Tolerance(
        atol_rms=5e-3,
        calc_diff=5e-7,
        why="fn truncated to TF32 (2^-10): calc_diff 8.5e-8 and a standard error of 3e-4 of the rms over many "
        "elements, at most 4.8e-7 and 9.8e-4 over one.",
    ),
    "sqr_sum": Tolerance(rtol=1e-5, calc_diff=1e-9, why="an fp32 sum of up to 28672 positive terms."),
}
