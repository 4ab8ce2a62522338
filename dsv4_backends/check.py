"""What serving a model will ask for on one rank, and who answers: the ``check`` command.

No weights and no GPU are needed: the shapes follow from the model's ``config.json``, and a provider that looks at
shapes is asked with tensors that have no storage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from . import report
from .contract import CONTRACTS
from .contract.models import Model, Rank
from .machine import Device, Machine
from .provider import Reason, Tier
from .resolve import Candidate, Resolution

PREFILL_TOKENS = 8192
"""Tokens of one prefill step; engines cut longer prompts into chunks of about this size."""
WINDOW_PAGE = 64
"""Tokens in a page of the window's cache, and of the indexer's keys."""
BLOCK = 256
"""Tokens of context that one page of a compressed cache stands for: 64 keys at ratio 4, 2 at ratio 128."""
TOPK_MULTIPLE = 128
"""Engines round the number of indices of a row up to this."""


@dataclass(frozen=True)
class Need:
    """One op in one set of shapes.

    Attributes:
        op: The contract's name.
        role: What asks for it, for people.
        sizes: The dimensions that decide, by name.
        arguments: Makes the call's arguments on the ``meta`` device.
    """

    op: str
    role: str
    sizes: Mapping[str, int]
    arguments: Callable[[], dict[str, Any]]

    @property
    def shown(self) -> str:
        return ", ".join(f"{name} {size}" for name, size in self.sizes.items())


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _meta(dtype: str, *shape: int) -> Any:
    import torch

    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


def _decode(role: str, rank: Rank, seqs: int, extra: tuple[int, int] | None) -> Need:
    window = rank.model.window
    sizes = {"b": seqs, "h_q": rank.heads, "topk": window, "page_size": WINDOW_PAGE}
    if extra is not None:
        sizes |= {"extra_topk": extra[0], "extra_page_size": extra[1]}

    def arguments() -> dict[str, Any]:
        made = {
            "q": _meta("bfloat16", seqs, 1, rank.heads, 512),
            "k_cache": _meta("uint8", 1024, WINDOW_PAGE, 1, 584),
            "indices": _meta("int32", seqs, 1, window),
            "sm_scale": 512**-0.5,
            "attn_sink": _meta("float32", rank.heads),
            "topk_length": _meta("int32", seqs),
        }
        if extra is not None:
            made["extra_k_cache"] = _meta("uint8", 1024, extra[1], 1, 584)
            made["extra_indices"] = _meta("int32", seqs, 1, extra[0])
            made["extra_topk_length"] = _meta("int32", seqs)
        return made

    return Need("sparse_mla_decode", role, sizes, arguments)


def _prefill(role: str, rank: Rank, tokens: int, keys: int, topk: int) -> Need:
    def arguments() -> dict[str, Any]:
        return {
            "q": _meta("bfloat16", tokens, rank.heads, 512),
            "kv": _meta("bfloat16", keys, 1, 512),
            "indices": _meta("int32", tokens, 1, topk),
            "sm_scale": 512**-0.5,
            "attn_sink": _meta("float32", rank.heads),
            "topk_length": _meta("int32", tokens),
        }

    return Need("sparse_mla_prefill", role, {"s_q": tokens, "h_q": rank.heads, "topk": topk}, arguments)


def _mqa(rank: Rank, tokens: int, keys: int) -> Need:
    h, d = rank.model.index_heads, rank.model.index_dim

    def arguments() -> dict[str, Any]:
        return {
            "q": _meta("float8_e4m3fn", tokens, h, d),
            "k": _meta("float8_e4m3fn", keys, d),
            "k_scale": _meta("float32", keys),
            "weights": _meta("float32", tokens, h),
            "row_starts": _meta("int32", tokens),
            "row_ends": _meta("int32", tokens),
            "max_seqlen_k": keys,
        }

    return Need("mqa_logits", "indexer, prefill", {"m": tokens, "h": h, "d": d, "n": keys}, arguments)


def _paged(rank: Rank, seqs: int, keys: int) -> Need:
    h, d = rank.model.index_heads, rank.model.index_dim

    def arguments() -> dict[str, Any]:
        blocks = -(-keys // WINDOW_PAGE)
        return {
            "q": _meta("float8_e4m3fn", seqs, 1, h, d),
            "k_cache": _meta("uint8", 1024, WINDOW_PAGE, 1, d + 4),
            "weights": _meta("float32", seqs, h),
            "context_lens": _meta("int32", seqs, 1),
            "block_table": _meta("int32", seqs, blocks),
            "max_context_len": keys,
        }

    sizes = {"b": seqs, "next_n": 1, "h": h, "d": d, "page_size": WINDOW_PAGE, "n": keys}
    return Need("paged_mqa_logits", "indexer, decode", sizes, arguments)


def _einsum(role: str, rank: Rank, tokens: int, packed: bool) -> Need:
    groups, inner, width = rank.o_groups, rank.o_in, rank.model.o_lora_rank

    def arguments() -> dict[str, Any]:
        dtype, blocks = ("int32", -(-inner // 512)) if packed else ("float32", -(-inner // 128))
        return {
            "x": _meta("float8_e4m3fn", tokens, groups, inner),
            "x_scale": _meta(dtype, tokens, groups, blocks),
            "w": _meta("float8_e4m3fn", groups, width, inner),
            "w_scale": _meta(dtype, groups, width if packed else -(-width // 128), blocks),
        }

    return Need("fp8_einsum", role, {"b": tokens, "h": groups, "r": inner, "d": width}, arguments)


def _hyper_connection(role: str, rank: Rank, tokens: int, k: int) -> Need:
    def arguments() -> dict[str, Any]:
        return {"x": _meta("bfloat16", tokens, k), "fn": _meta("float32", rank.hc_n, k)}

    return Need("hc_prenorm_gemm", role, {"m": tokens, "k": k, "n": rank.hc_n}, arguments)


def needs(rank: Rank, max_model_len: int, max_num_seqs: int, device: Device) -> tuple[Need, ...]:
    """Every op, in the largest shapes, that serving asks for on one rank.

    Args:
        rank: The model and its tensor parallelism.
        max_model_len: Longest context in tokens.
        max_num_seqs: Sequences of one decode step.
        device: Engines pack scales for compute capability 10 and newer.

    A model of layers of one kind asks for that kind only. Speculative decoding is not counted.
    """
    model = rank.model
    tokens = min(PREFILL_TOKENS, max_model_len)
    packed = device.capability is not None and device.capability.major >= 10
    kinds = {  # by compression ratio: a name, and how many compressed keys a row may see
        0: ("window layers", 0),
        4: ("ratio 4 layers", model.index_topk),
        128: ("ratio 128 layers", _up(-(-max_model_len // 128), TOPK_MULTIPLE)),
    }
    found = []
    for ratio, (name, keys) in kinds.items():
        if ratio in model.compress_ratios:
            # A step gathers what its requests can see: the compressed keys, the window, and its own tokens.
            gathered = (-(-max_model_len // ratio) if ratio else 0) + model.window + tokens
            topk = _up(model.window + keys, TOPK_MULTIPLE)
            extra = (keys, BLOCK // ratio) if ratio else None
            found.append(_prefill(f"{name}, prefill", rank, tokens, gathered, topk))
            found.append(_decode(f"{name}, decode", rank, max_num_seqs, extra))
    if 4 in model.compress_ratios:
        compressed = -(-max_model_len // 4)
        found += [_mqa(rank, tokens, compressed), _paged(rank, max_num_seqs, compressed)]
    for step, count in (("prefill", tokens), ("decode", max_num_seqs)):
        found.append(_einsum(f"output projection, {step}", rank, count, packed))
        found.append(_hyper_connection(f"hyper-connections, {step}", rank, count, rank.hc_k))
    found.append(_hyper_connection("first layer's streams", rank, tokens, model.hidden))
    order = list(CONTRACTS)
    return tuple(sorted(found, key=lambda need: order.index(need.op)))


@dataclass(frozen=True)
class Check:
    """Who serves each need on one device.

    Attributes:
        rank: The model and its tensor parallelism.
        max_model_len, max_num_seqs: As asked.
        machine, device: Where.
        served: Each need with the choice for its shapes.
    """

    rank: Rank
    max_model_len: int
    max_num_seqs: int
    machine: Machine
    device: Device
    served: tuple[tuple[Need, Resolution], ...]

    @property
    def uncovered(self) -> tuple[Need, ...]:
        return tuple(need for need, resolution in self.served if resolution.selected is None)

    @property
    def slow(self) -> tuple[Need, ...]:
        """What only the reference serves."""
        return tuple(
            need
            for need, resolution in self.served
            if resolution.selected is not None and resolution.selected.provider.tier is Tier.REFERENCE
        )


def check(
    model: Model,
    tp: int,
    max_model_len: int | None,
    max_num_seqs: int,
    machine: Machine,
    resolutions: Sequence[tuple[Device, Sequence[Resolution]]],
) -> list[Check]:
    """Judge every need of a model on every device.

    Args:
        model: Dimensions.
        tp: Tensor parallel size.
        max_model_len: Longest context; None: the model's.
        max_num_seqs: Sequences of one decode step.
        machine: Where ``resolutions`` come from.
        resolutions: For each device the choice for every op, as ``list`` makes it.

    Raises:
        ValueError: the model cannot be divided by ``tp``, or has no positions for ``max_model_len``.
    """
    rank = model.rank(tp)
    length = model.max_positions if max_model_len is None else max_model_len
    if length > model.max_positions:
        raise ValueError(f"max-model-len: {model.name} has {model.max_positions} positions, got {length}")
    checks = []
    for device, choices in resolutions:
        by_op = {resolution.op: resolution for resolution in choices}
        served = tuple((need, _judge(need, by_op[need.op])) for need in needs(rank, length, max_num_seqs, device))
        checks.append(Check(rank, length, max_num_seqs, machine, device, served))
    return checks


def _judge(need: Need, resolution: Resolution) -> Resolution:
    """A choice by capability as a choice for these shapes: candidates that refuse them, or do not import, are out."""
    judged = []
    decided = False
    for candidate in resolution.candidates:
        if candidate.accepted and not decided:
            candidate = _ask(need, candidate)
            decided = candidate.accepted  # what comes after it need not be imported
        judged.append(candidate)
    return replace(resolution, candidates=tuple(judged))


def _ask(need: Need, candidate: Candidate) -> Candidate:
    from .ops import _bind

    bound = _bind(CONTRACTS[need.op], candidate)
    if isinstance(bound, Reason):
        return replace(candidate, reasons=(bound,))
    if bound.refuses is None:
        return candidate
    try:
        reason = bound.refuses(**need.arguments())
    except Exception as error:  # a provider's code, which may want a GPU
        message = f"could not be asked about these shapes: {type(error).__name__}: {' '.join(str(error).split())}"
        return replace(candidate, warning=Reason("shape-unknown", message))
    return candidate if reason is None else replace(candidate, reasons=(reason,))


def json(checks: Sequence[Check]) -> dict[str, Any]:
    first = checks[0]
    rank, model = first.rank, first.rank.model
    return {
        "schema_version": report.SCHEMA_VERSION,
        "model": model.name,
        "tp": rank.tp,
        "max_model_len": first.max_model_len,
        "max_num_seqs": first.max_num_seqs,
        "rank": {"heads": rank.heads, "o_groups": rank.o_groups, "index_heads": model.index_heads},
        "devices": [
            {
                "device": report._device(check.device),
                "needs": [
                    {"role": need.role, "sizes": dict(need.sizes), **report.resolution_json(resolution)}
                    for need, resolution in check.served
                ],
                "uncovered": len(check.uncovered),
                "reference": len(check.slow),
            }
            for check in checks
        ],
        "ok": not any(check.uncovered for check in checks),
    }


def text(checks: Sequence[Check]) -> str:
    first = checks[0]
    rank, model = first.rank, first.rank.model
    groups = f"{rank.o_groups} output group{'s' * (rank.o_groups != 1)}"
    limits = f"contexts up to {first.max_model_len} tokens, {first.max_num_seqs} sequences"
    shares = f"{rank.heads} heads, {groups} and {model.index_heads} index heads on a rank"
    parts = [f"{model.name}, tensor parallel {rank.tp}: {shares}; {limits}"]
    for check in checks:
        rows = []
        reasons: dict[str, None] = {}
        for need, resolution in check.served:
            selected = resolution.selected
            name, tier = ("none", "") if selected is None else (selected.name, selected.provider.tier.label)
            rows.append((need.op, need.role, need.shown, name, tier))
            for candidate in resolution.passed_over:
                for reason in candidate.reasons:
                    reasons.setdefault(f"{need.op}: {candidate.name}: {report._hinted(reason, resolution)}")
            if selected is not None and selected.warning is not None:
                reasons.setdefault(f"{need.op}: {selected.name}: {selected.warning}")
            if selected is None and not resolution.candidates:
                reasons.setdefault(f"{need.op}: no installed provider implements it")
        parts.append(f"{check.device.label}; {report._versions(check.machine)}")
        parts.append(report.table(("OP", "FOR", "LARGEST SHAPES", "PROVIDER", "TIER"), rows))
        if reasons:
            parts.append("why not a better one:\n" + "\n".join(f"  {line}" for line in reasons))
        total = len(check.served)
        if check.uncovered:
            parts.append(f"NOT SERVED: {len(check.uncovered)} of {total}; the model will not run here")
        if check.slow:
            parts.append(f"warning: only the reference serves {len(check.slow)} of {total}, which is slow")
        if not check.uncovered and not check.slow:
            parts.append("everything is served")
    return "\n\n".join(parts)
