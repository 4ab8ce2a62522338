"""What serving a model will ask for on one rank, and who answers.

No weights and no GPU are needed: the shapes follow from the model's ``config.json``, and a provider that looks at
shapes is asked with tensors that have no storage.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..contract import CONTRACTS
from ..contract.models import Model, Rank
from ..runtime import serving
from ..runtime.serving import Limits
from ..selection import preferences as measured
from ..selection.machine import Device, Machine
from ..selection.provider import Reason, Tier
from ..selection.resolve import Candidate, Resolution

PREFILL_TOKENS = 8192
"""Tokens of one prefill step; engines cut longer prompts into chunks of about this size."""


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


def needs(rank: Rank, limits: Limits, device: Device) -> tuple[Need, ...]:
    """Every op, in the largest shapes, that serving asks for on one rank.

    Args:
        rank: The model and its tensor parallelism.
        limits: How far the server goes.
        device: Engines pack scales for compute capability 10 and newer.

    A model of layers of one kind asks for that kind only. Speculative decoding is counted with ``limits.next_n``.
    """
    model = rank.model
    tokens, seqs, s_q, heads = limits.max_tokens, limits.max_requests, limits.next_n, limits.heads or rank.heads
    packed = device.capability is not None and device.capability.major >= 10
    found: list[Need] = []

    def need(op: str, role: str, sizes: Mapping[str, int], make: Callable[..., serving.Arguments], *args: Any) -> None:
        found.append(Need(op, role, sizes, functools.partial(make, *args)))

    for ratio in (0, 4, 128):
        if ratio not in model.compress_ratios:
            continue
        name = f"ratio {ratio} layers" if ratio else "window layers"
        extra = serving.second_scope(rank, ratio, limits.max_context)
        width, page_size = extra or (0, 0)
        keys, topk = limits.max_context, serving.round_up(model.window + width, serving.TOPK_MULTIPLE)
        sizes = {"s_q": tokens, "h_q": heads, "topk": topk}
        need("sparse_mla_prefill", f"{name}, prefill", sizes, serving.prefill, heads, tokens, keys, topk)
        sizes = {"b": seqs, "s_q": s_q, "h_q": heads, "topk": model.window, "page_size": serving.WINDOW_PAGE}
        sizes |= {"extra_topk": width, "extra_page_size": page_size} if extra else {}
        need("sparse_mla_decode", f"{name}, decode", sizes, serving.decode, heads, seqs, s_q, model.window, extra)
    if 4 in model.compress_ratios:
        keys = -(-limits.max_context // 4)
        sizes = {"h": model.index_heads, "d": model.index_dim, "n": keys}
        need("mqa_logits", "indexer, prefill", {"m": tokens, **sizes}, serving.mqa, rank, tokens, keys)
        sizes = {"b": seqs, "next_n": s_q, **sizes, "page_size": serving.WINDOW_PAGE}
        need("paged_mqa_logits", "indexer, decode", sizes, serving.paged, rank, seqs, s_q, keys)
    inner, width = rank.o_in, model.o_lora_rank
    for step, count in (("prefill", tokens), ("decode", seqs * s_q)):
        einsum = functools.partial(serving.einsum, packed=packed)
        sizes = {"b": count, "h": rank.o_groups, "r": inner, "d": width}
        need("fp8_einsum", f"output projection, {step}", sizes, einsum, rank, count)
        for role, k, n in serving.connections(rank):
            sizes = {"m": count, "k": k, "n": n}
            need("hc_prenorm_gemm", f"{role}, {step}", sizes, serving.hyper_connection, count, k, n)
    order = list(CONTRACTS)
    return tuple(sorted(found, key=lambda one: order.index(one.op)))


@dataclass(frozen=True)
class Check:
    """Who serves each need on one device.

    Attributes:
        rank: The model and its tensor parallelism.
        limits: How far the server goes.
        machine, device: Where.
        served: Each need with the choice for its shapes.
    """

    rank: Rank
    limits: Limits
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
    limits = Limits(min(PREFILL_TOKENS, length), max_num_seqs, length)
    checks = []
    for device, choices in resolutions:
        by_op = {resolution.op: resolution for resolution in choices}
        served = tuple((need, _judge(need, by_op[need.op])) for need in needs(rank, limits, device))
        checks.append(Check(rank, limits, machine, device, served))
    return checks


def _judge(need: Need, resolution: Resolution) -> Resolution:
    """A choice by capability as one for these shapes: the measured candidate first, without those that refuse them."""
    judged = []
    decided = False
    candidates = list(resolution.candidates)
    if resolution.measured:
        made, names = need.arguments(), list(CONTRACTS[need.op].args)
        one, two = (made[names[position]].shape for position in measured.CLASSES[need.op].tensors)
        if (found := measured.preferred(resolution.measured, need.op, (one, two))) is not None:
            candidates.sort(key=lambda candidate: candidate.name != found.prefer)
    for candidate in candidates:
        if candidate.accepted and not decided:
            candidate = _ask(need, candidate)
            decided = candidate.accepted  # what comes after it need not be imported
        judged.append(candidate)
    return replace(resolution, candidates=tuple(judged))


def _ask(need: Need, candidate: Candidate) -> Candidate:
    from ..runtime.bind import bind_candidate

    bound = bind_candidate(CONTRACTS[need.op], candidate)
    if isinstance(bound, tuple):
        return replace(candidate, reasons=bound)
    if bound.refuses is None:
        return candidate
    try:
        reason = bound.refuses(**need.arguments())
    except Exception as error:  # a provider's code, which may want a GPU
        message = f"could not be asked about these shapes: {type(error).__name__}: {' '.join(str(error).split())}"
        return replace(candidate, warning=Reason("shape-unknown", message))
    return candidate if reason is None else replace(candidate, reasons=(reason,))
