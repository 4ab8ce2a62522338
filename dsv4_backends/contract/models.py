"""DeepSeek V4's dimensions, and what tensor parallelism leaves of them on one rank. Free of torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HC_MULT = 4
_LAYER_RATIO = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}


@dataclass(frozen=True)
class Model:
    """The dimensions that decide the shapes of the ops.

    Attributes:
        name: For people.
        hidden: Model width.
        heads: Query heads; there is one KV head.
        head_dim: 512 = 448 without and 64 with RoPE.
        o_groups, o_lora_rank: Groups of the output projection and its inner width per group.
        index_heads, index_dim, index_topk: The indexer.
        window: Sliding window.
        hc_mult: Residual streams of the hyper-connections.
        compress_ratios: Per layer 0 (window only), 4 (indexer) or 128, without MTP layers.
        max_positions: Longest context.
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

    def rank(self, tp: int) -> Rank:
        """What one of ``tp`` tensor-parallel ranks computes.

        Heads and output groups are divided; the indexer, the keys and the hyper-connections are whole on every rank.

        Raises:
            ValueError: heads or groups do not divide by ``tp``.
        """
        if tp < 1:
            raise ValueError(f"tensor parallel size: expected at least 1, got {tp}")
        for what, count in (("attention heads", self.heads), ("output groups", self.o_groups)):
            if count % tp:
                raise ValueError(f"{self.name}: {count} {what} cannot be divided over tensor parallel size {tp}")
        return Rank(self, tp)


@dataclass(frozen=True)
class Rank:
    """One rank of a model: the sizes that its ops see.

    The main attention has ``heads`` heads over ``topk`` indices in two scopes: the window, and the compressed keys
    (``index_topk`` of them in a ratio-4 layer).
    """

    model: Model
    tp: int

    @property
    def heads(self) -> int:
        return self.model.heads // self.tp

    @property
    def o_groups(self) -> int:
        return self.model.o_groups // self.tp

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
)
MODELS: Mapping[str, Model] = {"flash": FLASH, "pro": PRO}


def from_config(source: str | Path | Mapping[str, Any]) -> Model:
    """Read a model's dimensions.

    Args:
        source: ``"flash"``, ``"pro"``, the path of a Hugging Face ``config.json`` or of the folder it is in, or its
            contents.

    Raises:
        ValueError: not a DeepSeek V4 configuration, or a field is missing; names the field.
        OSError: the file cannot be read.
    """
    name = "config.json"
    if isinstance(source, Mapping):
        config: Mapping[str, Any] = source
    elif isinstance(source, str) and source in MODELS:
        return MODELS[source]
    else:
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        name = str(path)
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}: not JSON: {error}") from None
        if not isinstance(config, dict):
            raise ValueError(f"{name}: expected a JSON object, got {type(config).__name__}")
    if config.get("model_type") != "deepseek_v4":
        raise ValueError(f"{name}: model_type: expected 'deepseek_v4', got {config.get('model_type')!r}")

    def number(key: str) -> int:
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: {key}: expected a positive integer, got {value!r}")
        return value

    layers = number("num_hidden_layers")
    if ratios := config.get("compress_ratios"):
        pass
    elif types := config.get("layer_types"):
        unknown = sorted(set(types) - set(_LAYER_RATIO))
        if unknown:
            raise ValueError(f"{name}: layer_types: expected {sorted(_LAYER_RATIO)}, got {unknown[0]!r}")
        ratios = [_LAYER_RATIO[kind] for kind in types]
    else:
        raise ValueError(f"{name}: expected compress_ratios or layer_types: no default matches a released model")
    if len(ratios) < layers or not set(ratios) <= {0, 4, 128}:
        raise ValueError(
            f"{name}: compress_ratios: expected 0, 4 or 128 for each of {layers} layers, "
            f"got {len(ratios)} entries of {sorted(set(ratios), key=str)}"
        )
    model = Model(
        name=str(config.get("_name_or_path") or name),
        hidden=number("hidden_size"),
        heads=number("num_attention_heads"),
        o_groups=number("o_groups"),
        o_lora_rank=number("o_lora_rank"),
        index_heads=number("index_n_heads"),
        index_dim=number("index_head_dim"),
        index_topk=number("index_topk"),
        window=number("sliding_window"),
        hc_mult=number("hc_mult"),
        compress_ratios=tuple(ratios[:layers]),
        max_positions=number("max_position_embeddings"),
        head_dim=number("head_dim"),
    )
    if model.head_dim != 512:
        raise ValueError(f"{name}: head_dim: the ops are defined for 512, got {model.head_dim}")
    return model
