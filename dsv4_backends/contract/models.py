"""DeepSeek V4's dimensions, and those of one tensor-parallel rank. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

HC_MULT = 4
EXPERT_BYTES = {"fp4": 1 / 2 + 1 / 32, "fp8": 1 + 1 / 128**2, "bf16": 2.0, "bfloat16": 2.0}
"""Bytes of one weight, including its share of the scales."""


@dataclass(frozen=True)
class Weights:
    """The numbers that decide the size of a model's weights, besides the dimensions of its ops.

    Attributes:
        vocab: Rows of the embedding and of the head.
        q_lora_rank: Width of the queries' latent.
        experts, shared_experts, expert_width, experts_per_token: The mixture of experts of a layer.
        hash_layers: Layers whose experts are looked up by token.
        linear_dtype, expert_dtype: Names in ``EXPERT_BYTES``.
        tied: Whether embedding and head share their weights.
    """

    vocab: int
    q_lora_rank: int
    experts: int
    expert_width: int
    experts_per_token: int = 6
    shared_experts: int = 1
    hash_layers: int = 3
    linear_dtype: str = "fp8"
    expert_dtype: str = "fp4"
    tied: bool = False


@dataclass(frozen=True)
class Model:
    """The dimensions that decide the shapes of the ops.

    Attributes:
        name: Shown to people.
        hidden: Model width.
        heads: Query heads; there is one KV head.
        head_dim: 512 = 448 without and 64 with RoPE.
        o_groups, o_lora_rank: Groups of the output projection and its inner width per group.
        index_heads, index_dim, index_topk: The indexer.
        window: Sliding window.
        hc_mult: Residual streams of the hyper-connections.
        compress_ratios: Per layer 0 (window only), 4 (indexer) or 128, without MTP layers.
        max_positions: Longest context.
        speculative_layers: Layers that predict further tokens (MTP); they see the window only.
        weights: What decides the size of the weights; None: unknown.

    Raises:
        ValueError: the heads cannot be divided into the groups.
    """

    name: str
    hidden: int
    heads: int
    o_groups: int
    o_lora_rank: int
    index_heads: int
    index_dim: int
    index_topk: int
    window: int
    hc_mult: int
    compress_ratios: tuple[int, ...]
    max_positions: int
    head_dim: int = 512
    speculative_layers: int = 0
    weights: Weights | None = None

    def __post_init__(self) -> None:
        if self.o_groups < 1 or self.heads % self.o_groups:
            raise ValueError(f"{self.name}: {self.heads} heads cannot be divided into {self.o_groups} output groups")

    @property
    def unsupported(self) -> tuple[str, ...]:
        """Dimensions that the ops do not support, each with what is expected."""
        found = []
        if self.head_dim != 512:
            found.append(f"head_dim: expected 512, got {self.head_dim}: the ops and the cache are defined for 448 + 64")
        for ratio in sorted(set(self.compress_ratios) - {0, 4, 128}):
            layer = self.compress_ratios.index(ratio)
            found.append(f"compress_ratios: expected 0, 4 or 128, got {ratio} in layer {layer}")
        return tuple(found)

    def rank(self, tp: int) -> Rank:
        """The sizes of one of ``tp`` tensor-parallel ranks.

        Heads and output groups are divided; the indexer, the keys and the hyper-connections are whole on every rank.
        With more ranks than groups, each rank has one group with its heads, and several ranks have the same.

        Raises:
            ValueError: more ranks than heads, or heads or groups do not divide by ``tp``, nor ``tp`` by the groups.
        """
        if tp < 1:
            raise ValueError(f"tensor parallel size: expected at least 1, got {tp}")
        if tp > self.heads:
            raise ValueError(
                f"{self.name}: {self.heads} attention heads cannot be divided over tensor parallel size {tp}"
            )
        if tp > self.o_groups and tp % self.o_groups == 0:
            return Rank(self, tp)
        for what, count in (("attention heads", self.heads), ("output groups", self.o_groups)):
            if count % tp:
                raise ValueError(f"{self.name}: {count} {what} cannot be divided over tensor parallel size {tp}")
        return Rank(self, tp)


@dataclass(frozen=True)
class Rank:
    """One rank of a model: the sizes of its ops.

    The main attention has ``heads`` heads over ``topk`` indices in two scopes: the window, and the compressed keys
    (``index_topk`` of them in a ratio-4 layer).
    """

    model: Model
    tp: int

    @property
    def replicas(self) -> int:
        """Number of ranks with the same heads and output groups: more than 1 with more ranks than groups."""
        return max(1, self.tp // self.model.o_groups)

    @property
    def heads(self) -> int:
        return self.model.heads * self.replicas // self.tp

    @property
    def o_groups(self) -> int:
        return self.model.o_groups * self.replicas // self.tp

    @property
    def o_in(self) -> int:
        """Input width of one output group."""
        return self.model.heads * self.model.head_dim // self.model.o_groups

    @property
    def topk(self) -> int:
        """Indices of a prefill row in a ratio-4 layer: window and selected keys."""
        return self.model.window + self.model.index_topk

    @property
    def hc_k(self) -> int:
        return self.model.hc_mult * self.model.hidden

    @property
    def hc_n(self) -> int:
        """Outputs of the hyper-connection's GEMM: pre and post gates and the mixing matrix."""
        return self.model.hc_mult * (2 + self.model.hc_mult)


FLASH = Model(
    name="DeepSeek-V4-Flash",
    hidden=4096,
    heads=64,
    o_groups=8,
    o_lora_rank=1024,
    index_heads=64,
    index_dim=128,
    index_topk=512,
    window=128,
    hc_mult=HC_MULT,
    compress_ratios=(0, 0, *(4, 128) * 20, 4),
    max_positions=1048576,
    speculative_layers=1,
    weights=Weights(vocab=129280, q_lora_rank=1024, experts=256, expert_width=2048),
)
PRO = Model(
    name="DeepSeek-V4-Pro",
    hidden=7168,
    heads=128,
    o_groups=16,
    o_lora_rank=1024,
    index_heads=64,
    index_dim=128,
    index_topk=1024,
    window=128,
    hc_mult=HC_MULT,
    compress_ratios=(128, 128, *(4, 128) * 29, 4),
    max_positions=1048576,
    speculative_layers=1,
    weights=Weights(vocab=129280, q_lora_rank=1536, experts=384, expert_width=3072),
)
MODELS: Mapping[str, Model] = {"flash": FLASH, "pro": PRO}
