"""The compressors' forwards: store the new compressed keys, and pass the selection of each query to the attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .entries import counts_of, store
from .handover import Selected, handover, once
from .indexer import select
from .replaced import Mode


def layer_of(past_key_values: Any, layer_idx: int) -> Any:
    return None if past_key_values is None else past_key_values.layers[layer_idx]


def compress_heavily(
    self: nn.Module,
    mode: Mode,
    hidden_states: Tensor,
    q_residual: Tensor,
    position_ids: Tensor,
    past_key_values: Any,
    layer_idx: int,
) -> tuple[Tensor, None]:
    """``DeepseekV4HCACompressor.forward``: a query sees the compressed keys of windows that end at or before it."""
    cache = layer_of(past_key_values, layer_idx)
    keys, total = store(self, cache, hidden_states, position_ids, "heavily_compressed_attention", overlap=False)
    rate: int = self.compress_rate  # type: ignore[assignment]

    def counts() -> Tensor:
        if position_ids.shape[1] == 1:
            # transformers masks nothing for a single query, so left padding shifts what it sees. This does the same.
            return torch.full((1, 1), total, dtype=torch.int32, device=keys.device)
        return counts_of(position_ids, rate, total)

    key = rate, total, "heavily"
    handover.selected = Selected(once(key, position_ids, counts), total, None, key)
    return keys.unsqueeze(1), None


def compress_and_select(
    self: nn.Module,
    mode: Mode,
    hidden_states: Tensor,
    q_residual: Tensor,
    position_ids: Tensor,
    past_key_values: Any,
    layer_idx: int,
) -> tuple[Tensor, None]:
    """``DeepseekV4CSACompressor.forward``: a query sees the compressed keys with the highest indexer scores."""
    cache = layer_of(past_key_values, layer_idx)
    keys, _ = store(self, cache, hidden_states, position_ids, "compressed_sparse_attention", overlap=True)
    handover.selected = select(self.indexer, mode, cache, hidden_states, q_residual, position_ids)
    return keys.unsqueeze(1), None
