"""What serving a model takes of one rank's memory, as far as it follows from its dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..contract import CONTRACTS
from ..contract.models import EXPERT_BYTES, Rank
from ..contract.traffic import BLOCK, WINDOW_PAGE, Limits, round_up

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. Activations between the ops, graphs, the CUDA context and communication are not counted.

    Attributes:
        weights: None where the configuration does not state them.
        call: The largest call of an op: its arguments, its results, and the workspace where a provider states it.
        call_of: Which call that is, for people.
        workspace: Whether the provider of that call states its workspace.
        token: Cache of one token of context, without what is fixed for a sequence.
        sequence: Cache of one sequence of the longest context.
        sequences: Cache of all sequences at the longest context.
        device: The device's memory; 0 where unknown.
    """

    weights: int | None
    call: int
    call_of: str
    workspace: bool
    token: float
    sequence: int
    sequences: int
    device: int

    @property
    def needed(self) -> int:
        """The least that serving one sequence of the longest context takes."""
        return (self.weights or 0) + self.call + self.sequence

    @property
    def fits(self) -> bool | None:
        """Whether the device has that much; None: unknown."""
        if not self.device or (self.weights is None and self.needed <= self.device):
            return None
        return self.needed <= self.device


def weights(rank: Rank, *, speculative: bool) -> int | None:
    """Bytes of a rank's weights; None where the model does not state them.

    Heads, output groups, experts, embedding and head are divided over the ranks; the rest is whole on each.

    Args:
        rank: The model and its tensor parallelism.
        speculative: Count the speculative layers.
    """
    model, weights = rank.model, rank.model.weights
    if weights is None:
        return None
    linear, expert, d = EXPERT_BYTES[weights.linear_dtype], EXPERT_BYTES[weights.expert_dtype], model.hidden

    def layer(ratio: int, *, hashed: bool) -> float:
        inner = rank.o_groups * model.o_lora_rank
        dense: float = weights.q_lora_rank * (d + rank.heads * model.head_dim) + model.head_dim * d
        dense += inner * (rank.o_in + d)
        dense += weights.shared_experts * 3 * d * weights.expert_width / rank.tp
        full = 2 * weights.experts * d + 8 * (weights.vocab * weights.experts_per_token if hashed else weights.experts)
        if ratio:
            full += _compressor(ratio, model.head_dim, d)
        if ratio == 4:
            dense += model.index_heads * model.index_dim * weights.q_lora_rank
            full += 2 * model.index_heads * d + _compressor(ratio, model.index_dim, d)
        mixing = 2 * 4 * rank.hc_n * rank.hc_k
        return linear * dense + full + mixing + expert * weights.experts * 3 * d * weights.expert_width / rank.tp

    total = 2.0 * (1 if weights.tied else 2) * weights.vocab * d / rank.tp + 4 * model.hc_mult * rank.hc_k
    total += sum(layer(ratio, hashed=i < weights.hash_layers) for i, ratio in enumerate(model.compress_ratios))
    if speculative:
        total += model.speculative_layers * (layer(0, hashed=False) + linear * 2 * d * d)
    return int(total)


def _compressor(ratio: int, dim: int, d: int) -> int:
    """Bytes of a compressor's weights: two bf16 projections and the fp32 positions."""
    width = _overlap(ratio) * dim
    return 2 * 2 * width * d + 4 * ratio * width


def _overlap(ratio: int) -> int:
    return 2 if ratio == 4 else 1


def cache(rank: Rank, *, next_n: int) -> tuple[int, int]:
    """Bytes of the cache for ``traffic.BLOCK`` tokens of context, and for a sequence whatever its length.

    A page is padded to ``layouts.PAGE_ALIGNMENT`` bytes, as engines do. Fixed for a sequence are the window of every
    layer and the compressors' states. Every rank holds the whole cache: there is one head of keys.
    """
    from ..contract.layouts import INDEXER_SCALE_BYTES, KV_BYTES, PAGE_ALIGNMENT

    def pages(tokens: int, size: int) -> int:
        return round_up(tokens * size, PAGE_ALIGNMENT)

    model = rank.model
    block = fixed = 0
    for ratio in model.compress_ratios:
        dims = [model.head_dim, model.index_dim] if ratio == 4 else [model.head_dim] if ratio else []
        if ratio:
            block += pages(BLOCK // ratio, KV_BYTES)
        if ratio == 4:
            block += pages(BLOCK // ratio, model.index_dim + INDEXER_SCALE_BYTES)
        overlap = _overlap(ratio)
        fixed += sum(2 * 4 * overlap * ratio * overlap * dim for dim in dims)  # values and scores in fp32
    layers = len(model.compress_ratios) + (model.speculative_layers if next_n > 1 else 0)
    window = -(-(model.window + next_n - 1) // WINDOW_PAGE) + 1  # it may begin anywhere in a page
    fixed += layers * window * pages(WINDOW_PAGE, KV_BYTES)
    return block, fixed


def call(op: str, arguments: Mapping[str, Any]) -> int:
    """Bytes that exist for a call only: its arguments but cache and weights, and its results. Nothing is allocated.

    An argument that the op writes into and returns is counted once, and not at all where it is cache.
    """
    import torch

    contract = CONTRACTS[op]
    made = contract.function(**arguments)
    results = made if isinstance(made, tuple) else (made,)
    results = tuple(result for result in results if all(result is not value for value in arguments.values()))
    given = [value for name, value in arguments.items() if name not in contract.traffic.held]
    return sum(_bytes(value) for value in (*given, *results) if isinstance(value, torch.Tensor))


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def of_sequences(rank: Rank, limits: Limits) -> tuple[float, int, int]:
    """Bytes of the cache for a token, for one sequence of the longest context, and for all sequences."""
    block, fixed = cache(rank, next_n=limits.next_n)
    sequence = -(-limits.max_context // BLOCK) * block + fixed
    return block / BLOCK, sequence, sequence * limits.max_requests
