"""The calls that serving makes of the output projection and of the ops before it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from ..inputs import Draw
from ..models import Rank
from ..traffic import (
    BENCH_CONTEXT,
    POSITIONS,
    Arguments,
    Classes,
    Deployment,
    Need,
    Row,
    Shape,
    Traffic,
    meta,
    round_up,
)
from .meaning import HEAD_DIM

TOKENS = (1, 8, 16, 32, 128, 200, 512, 4096)
INVERSE_TOKENS = (1, 8, 32, 128, 1024, 4096, 8192)
SCALES = ("token-minor", "token-major")
"""Layouts of the activation scales: tokens contiguous and padded to 4, as from vLLM's quantiser; or contiguous
``[tokens, groups, blocks]``, which DeepGEMM transposes in each call."""


def einsum(rank: Rank, tokens: int, *, packed: bool = False, token_minor: bool = True) -> Arguments:
    """fp32 scales, or packed E8M0 per row as engines keep them from compute capability 10 on."""
    groups, inner, width = rank.o_groups, rank.o_in, rank.model.o_lora_rank
    dtype, blocks = ("int32", -(-inner // 512)) if packed else ("float32", -(-inner // 128))
    if token_minor:
        x_scale = meta(dtype, groups, blocks, round_up(tokens, 4))[..., :tokens].permute(2, 0, 1)
    else:
        x_scale = meta(dtype, tokens, groups, blocks)
    return {
        "x": meta("float8_e4m3fn", groups, tokens, inner).transpose(0, 1),
        "x_scale": x_scale,
        "w": meta("float8_e4m3fn", groups, width, inner),
        "w_scale": meta(dtype, groups, width if packed else -(-width // 128), blocks),
    }


def inverse(rank: Rank, tokens: int, *, dtype: str = "int64", packed: bool | None = None) -> Arguments:
    """``packed`` is None for the form without quantisation."""
    made = {
        "x": meta("bfloat16", tokens, rank.heads, HEAD_DIM),
        "positions": meta(dtype, tokens),
        "cos_sin": meta("float32", rank.model.max_positions, 64),
        "groups": rank.o_groups,
    }
    return made if packed is None else made | {"packed": packed}


def _inverse_quant_calls(server: Deployment) -> Iterator[Arguments]:
    for packed in sorted({False, server.packed_scales}):
        for dtype in POSITIONS:
            for tokens in server.tokens:
                yield inverse(server.rank, tokens, dtype=dtype, packed=packed)


def _inverse_calls(server: Deployment) -> Iterator[Arguments]:
    for dtype in POSITIONS:
        for tokens in server.tokens:
            yield inverse(server.rank, tokens, dtype=dtype)


def _inverse_needs(server: Deployment, op: str, packed: bool | None) -> Iterator[Need]:
    rank = server.rank
    for step, tokens in server.steps:
        sizes = {"t": tokens, "h": rank.heads, "groups": rank.o_groups}
        yield Need(op, f"attention output, {step}", sizes, functools.partial(inverse, rank, tokens, packed=packed))


def _inverse_quant_needs(server: Deployment) -> Iterator[Need]:
    return _inverse_needs(server, "inverse_rope_quant", server.packed_scales)


def _inverse_plain_needs(server: Deployment) -> Iterator[Need]:
    return _inverse_needs(server, "inverse_rope", None)


def _inverse_class(x: Shape, positions: Shape) -> tuple[str, int]:
    return f"h={x[1]}", x[0]


def _inverse_shapes(row: Mapping[str, Any]) -> tuple[Shape, Shape]:
    return (row["t"], row["h"], HEAD_DIM), (row["t"],)


def _inverse_row(op: str, label: str, t: int, h: int, groups: int) -> Row:
    return Row(op, f"{label} t={t} h={h} groups={groups}", {"t": t, "h": h, "groups": groups})


def _inverse_rows(op: str, label: str, rank: Rank) -> Iterator[Row]:
    for t in INVERSE_TOKENS:
        yield _inverse_row(op, label, t, rank.heads, rank.o_groups)


def _draw_inverse(draw: Draw, *, t: int, h: int, groups: int) -> Arguments:
    """A chunk at the end of its context."""
    return {
        "x": draw.normal(t, h, HEAD_DIM, dtype="bfloat16"),
        "positions": BENCH_CONTEXT + draw.range(t),
        "cos_sin": draw.cos_sin(BENCH_CONTEXT + t),
        "groups": groups,
    }


def _calls(server: Deployment) -> Iterator[Arguments]:
    for packed in sorted({False, server.packed_scales}):
        for token_minor in (True, False):
            for tokens in server.tokens:
                yield einsum(server.rank, tokens, packed=packed, token_minor=token_minor)


def _needs(server: Deployment) -> Iterator[Need]:
    rank = server.rank
    for step, tokens in server.steps:
        sizes = {"b": tokens, "h": rank.o_groups, "r": rank.o_in, "d": rank.model.o_lora_rank}
        make = functools.partial(einsum, rank, tokens, packed=server.packed_scales)
        yield Need("fp8_einsum", f"output projection, {step}", sizes, make)


def _class(x: Shape, w: Shape) -> tuple[str, int]:
    return f"h={x[1]} d={w[1]} r={x[2]}", x[0]


def _shapes(row: Mapping[str, Any]) -> tuple[Shape, Shape]:
    return (row["b"], row["h"], row["r"]), (row["h"], row["d"], row["r"])


def _row(label: str, b: int, h: int, r: int, d: int, scales: str) -> Row:
    name = f"{label} b={b} h={h} r={r} d={d} {scales} scales"
    return Row("fp8_einsum", name, {"b": b, "h": h, "r": r, "d": d, "scales": scales}, {"scales": scales})


def _rows(label: str, rank: Rank) -> Iterator[Row]:
    for scales in SCALES:
        for b in TOKENS:
            yield _row(label, b, rank.o_groups, rank.o_in, rank.model.o_lora_rank, scales)


def _draw(draw: Draw, *, b: int, h: int, r: int, d: int, scales: str = SCALES[0]) -> Arguments:
    """Values group-major, as vLLM's quantiser makes them; scales in fp32."""
    import torch

    blocks = -(-r // 128)
    x = draw.normal(h, b, r, dtype="float8_e4m3fn").transpose(0, 1)
    x_scale = draw.powers(h, blocks, round_up(b, 4))[..., :b].permute(2, 0, 1)
    if scales != SCALES[0]:
        x_scale = x_scale.contiguous()
    # A group at a time: the fp32 draw of all weights is four times their size.
    w = torch.empty((h, d, r), dtype=torch.float8_e4m3fn, device=draw.device)
    for group in w:
        group.copy_(draw.normal(d, r))
    return {"x": x, "x_scale": x_scale, "w": w, "w_scale": draw.powers(h, -(-d // 128), blocks)}


EINSUM = Traffic(
    calls=_calls,
    needs=_needs,
    classes=Classes((0, 2), "b", _class, _shapes),
    rows=_rows,
    tiny=tuple(_row("tiny", 3, 2, 256, 128, scales) for scales in SCALES),
    draw=_draw,
    held=("w", "w_scale"),
)

INVERSE_QUANT = Traffic(
    calls=_inverse_quant_calls,
    needs=_inverse_quant_needs,
    classes=Classes((0, 1), "t", _inverse_class, _inverse_shapes),
    rows=functools.partial(_inverse_rows, "inverse_rope_quant"),
    tiny=(_inverse_row("inverse_rope_quant", "tiny", 3, 4, 2),),
    draw=_draw_inverse,
    held=("cos_sin",),
)

INVERSE = Traffic(
    calls=_inverse_calls,
    needs=_inverse_plain_needs,
    classes=Classes((0, 1), "t", _inverse_class, _inverse_shapes),
    rows=functools.partial(_inverse_rows, "inverse_rope"),
    tiny=(_inverse_row("inverse_rope", "tiny", 3, 4, 2),),
    draw=_draw_inverse,
    held=("cos_sin",),
)
