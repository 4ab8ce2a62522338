"""The rows of a benchmark: calls that DeepSeek V4 makes in a deployment. Free of torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..contract.config import from_config
from ..contract.models import MODELS, Model

RATIO = 4
"""Tokens per compressed key in a layer that has an indexer."""
CONTEXT = 65536
"""Tokens before a prefill chunk, and of each request of a decode batch: 16384 compressed keys."""
PREFILL_TOKENS = (512, 4096)
DECODE_BATCHES = (1, 8, 16, 32, 64, 128)
LOGITS = ((1024, 8192), (4096, 16384), (4096, 65536))
"""Queries of a chunk, and compressed keys."""
PAGED = ((1, 16384), (32, 16384), (128, 4096), (64, 65536))
"""Requests, and compressed keys of each."""
PROJECTION_TOKENS = (1, 8, 32, 128, 512, 4096)
HYPER_CONNECTION_TOKENS = (1, 32, 128, 1024, 8192)
SCALES = ("token-minor", "token-major")
"""How the activation scales of ``fp8_einsum`` may lie: the tokens contiguous and padded to 4, as vLLM's quantiser
leaves them; or ``[tokens, groups, blocks]`` as it is written, which DeepGEMM transposes in each call."""


@dataclass(frozen=True)
class Row:
    """One call to time.

    Attributes:
        op: Contract name.
        name: Unique within the op, and the same in every run, so that runs can be compared.
        params: Keyword arguments of the op's function in ``inputs``.
    """

    op: str
    name: str
    params: Mapping[str, Any]


def rows(models: Sequence[str], tp: int, ops: Iterable[str], scales: str = SCALES[0]) -> list[Row]:
    """The rows of ``ops`` for some models, each row once.

    Args:
        models: ``"flash"``, ``"pro"``, or the path of a ``config.json``; none: Flash and Pro.
        tp: Tensor parallel size; a row is what one rank computes.
        ops: Op names; their order is kept.
        scales: One of ``SCALES``.

    Raises:
        ValueError: not a model, or its heads do not divide by ``tp``.
        OSError: a configuration cannot be read.
    """
    found: dict[tuple[str, str], Row] = {}
    for source in models or tuple(MODELS):
        model = from_config(source)
        for row in _of_model(source if source in MODELS else model.name.replace(" ", "-"), model, tp, scales):
            found.setdefault((row.op, row.name), row)
    return [row for op in ops for row in found.values() if row.op == op]


def _of_model(label: str, model: Model, tp: int, scales: str) -> Iterator[Row]:
    rank = model.rank(tp)
    heads, window, selected = rank.heads, model.window, model.index_topk
    compressed = CONTEXT // RATIO
    prefill, decode = "sparse_mla_prefill", "sparse_mla_decode"
    for s_q in PREFILL_TOKENS:
        common = {"s_q": s_q, "h_q": heads, "window": window}
        name = f"{label} s_q={s_q} h={heads} topk={window + selected}"
        yield Row(prefill, name, {**common, "selected": selected, "compressed": compressed})
        if 0 in model.compress_ratios:
            name = f"{label} window only s_q={s_q} h={heads} topk={window}"
            yield Row(prefill, name, {**common, "selected": 0, "compressed": 0})
    for b, s_q in (*((b, 1) for b in DECODE_BATCHES), (32, 2)):
        name = f"{label} b={b} {f's_q={s_q} ' if s_q > 1 else ''}h={heads} topk={window}+{selected}"
        common = {"b": b, "s_q": s_q, "h_q": heads, "window": window}
        yield Row(decode, name, {**common, "selected": selected, "compressed": compressed})
    indexer = {"h": model.index_heads, "d": model.index_dim}
    for m, n in LOGITS:
        name = f"m={m} n={n} h={model.index_heads} d={model.index_dim}"
        yield Row("mqa_logits", name, {"m": m, "n": n, **indexer})
    for b, keys in PAGED:
        name = f"b={b} keys={keys} h={model.index_heads} d={model.index_dim}"
        yield Row("paged_mqa_logits", name, {"b": b, "keys": keys, **indexer})
    groups, r, d = rank.o_groups, rank.o_in, model.o_lora_rank
    for b in PROJECTION_TOKENS:
        name = f"{label} b={b} h={groups} r={r} d={d} {scales} scales"
        yield Row("fp8_einsum", name, {"b": b, "h": groups, "r": r, "d": d, "scales": scales})
    for m in HYPER_CONNECTION_TOKENS:
        # As many partials as keep the 132 multiprocessors of a Hopper GPU busy with tiles of 64 tokens, 32 at most.
        splits = max(1, min(32, 132 // -(-m // 64)))
        params = {"m": m, "k": rank.hc_k, "n": rank.hc_n, "num_splits": splits}
        yield Row("hc_prenorm_gemm", f"{label} m={m} k={rank.hc_k} splits={splits}", params)


def tiny(ops: Iterable[str], scales: str = SCALES[0]) -> list[Row]:
    """A row or two for each op that a CPU gets through at once."""
    found = (
        Row(
            "sparse_mla_prefill",
            "tiny s_q=4 h=8 topk=48",
            {"s_q": 4, "h_q": 8, "window": 16, "selected": 32, "compressed": 64},
        ),
        Row(
            "sparse_mla_prefill",
            "tiny window only s_q=4 h=8 topk=16",
            {"s_q": 4, "h_q": 8, "window": 16, "selected": 0, "compressed": 0},
        ),
        Row(
            "sparse_mla_decode",
            "tiny b=2 h=8 topk=16+32",
            {"b": 2, "s_q": 1, "h_q": 8, "window": 16, "selected": 32, "compressed": 64},
        ),
        Row("mqa_logits", "tiny m=8 n=96", {"m": 8, "n": 96, "h": 8, "d": 64}),
        Row("paged_mqa_logits", "tiny b=2 keys=100", {"b": 2, "keys": 100, "h": 8, "d": 64}),
        Row(
            "fp8_einsum",
            f"tiny b=3 h=2 r=256 d=128 {scales} scales",
            {"b": 3, "h": 2, "r": 256, "d": 128, "scales": scales},
        ),
        Row("hc_prenorm_gemm", "tiny m=4 k=512 splits=2", {"m": 4, "k": 512, "n": 24, "num_splits": 2}),
    )
    return [row for op in ops for row in found if row.op == op]


def looked_at(op: str, params: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of a row's tensors that the measured choice looks at (``measured.CLASSES``)."""
    p = params
    if op == "sparse_mla_prefill":
        return (p["s_q"], p["h_q"], 512), (p["s_q"], p["window"] + p["selected"])
    if op == "sparse_mla_decode":
        return (p["b"], p["s_q"], p["h_q"], 512), (p["b"], p["s_q"], p["window"])
    if op == "mqa_logits":
        return (p["m"], p["h"], p["d"]), (p["n"], p["d"])
    if op == "paged_mqa_logits":
        return (p["b"], 1, p["h"], p["d"]), ()
    if op == "fp8_einsum":
        return (p["b"], p["h"], p["r"]), (p["h"], p["d"], p["r"])
    return (p["m"], p["k"]), (p["n"], p["k"])
