"""The calls that serving makes of the prenorm GEMM."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from ..inputs import Draw
from ..models import Rank
from ..traffic import Arguments, Classes, Deployment, Need, Row, Shape, Traffic, meta

TOKENS = (1, 32, 128, 256, 600, 1024, 8192)


def prenorm(tokens: int, k: int, n: int, num_splits: int | None = None) -> Arguments:
    made = {"x": meta("bfloat16", tokens, k), "fn": meta("float32", n, k)}
    return made if num_splits is None else made | {"num_splits": num_splits}


def connections(rank: Rank) -> tuple[tuple[str, int, int], ...]:
    """The parts of the model that call it, with k and n."""
    streams, hidden = rank.hc_k, rank.model.hidden
    return (
        ("hyper-connections", streams, rank.hc_n),
        ("first layer's streams", hidden, rank.hc_n),
        ("head's streams", streams, rank.model.hc_mult),
    )


def _calls(server: Deployment) -> Iterator[Arguments]:
    for _, k, n in connections(server.rank):
        for splits in (None, 2, 8, 32):
            for tokens in server.tokens:
                yield prenorm(tokens, k, n, splits)


def _needs(server: Deployment) -> Iterator[Need]:
    for step, tokens in server.steps:
        for role, k, n in connections(server.rank):
            make = functools.partial(prenorm, tokens, k, n)
            yield Need("hc_prenorm_gemm", f"{role}, {step}", {"m": tokens, "k": k, "n": n}, make)


def _class(x: Shape, fn: Shape) -> tuple[str, int]:
    return f"n={fn[0]} k={x[1]}", x[0]


def _shapes(row: Mapping[str, Any]) -> tuple[Shape, Shape]:
    return (row["m"], row["k"]), (row["n"], row["k"])


def _rows(label: str, rank: Rank) -> Iterator[Row]:
    for m in TOKENS:
        # As many partials as keep the 132 multiprocessors of a Hopper GPU busy with tiles of 64 tokens, 32 at most.
        splits = max(1, min(32, 132 // -(-m // 64)))
        params = {"m": m, "k": rank.hc_k, "n": rank.hc_n, "num_splits": splits}
        yield Row("hc_prenorm_gemm", f"{label} m={m} k={rank.hc_k} splits={splits}", params)


def _draw(draw: Draw, *, m: int, k: int, n: int, num_splits: int) -> Arguments:
    return {
        "x": draw.normal(m, k, dtype="bfloat16"),
        "fn": draw.normal(n, k, scale=k**-0.5),
        "num_splits": num_splits,
    }


PRENORM = Traffic(
    calls=_calls,
    needs=_needs,
    classes=Classes((0, 1), "m", _class, _shapes),
    rows=_rows,
    tiny=(Row("hc_prenorm_gemm", "tiny m=4 k=512 splits=2", {"m": 4, "k": 512, "n": 24, "num_splits": 2}),),
    draw=_draw,
    held=("fn",),
)
