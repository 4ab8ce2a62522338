"""Compressed keys: made from complete windows of tokens, rotated, and stored in the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .chunks import FEW_TOKENS
from .handover import once
from .pages import COMPRESSED_PAGE


def angles_of(module: Any, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of RoPE at positions ``[B, n]``: ``[B, n, r / 2]`` in the dtype of x."""
    cos, sin = module.rotary_emb(x, position_ids=positions, layer_type=module.rope_layer_type)
    return cos.contiguous(), sin.contiguous()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor], unsqueeze_dim: int) -> Tensor:
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import apply_rotary_pos_emb

    rotated: Tensor = apply_rotary_pos_emb(x, *angles, unsqueeze_dim=unsqueeze_dim)
    return rotated


def new_entries(module: Any, cache: Any, name: str, hidden: Tensor, position_ids: Tensor, *, overlap: bool) -> Tensor:
    """The compressed keys ``[B, n, d]`` of the windows that this call completes."""
    batch, rate, d = len(hidden), module.compress_rate, module.head_dim
    kv, gate, start = module.kv_proj(hidden), module.gate_proj(hidden), 0
    if cache is None:
        usable = kv.shape[1] // rate * rate
        kv, gate = kv[:, :usable], gate[:, :usable]
    else:
        kv, gate, start = cache.store_compression_weights(name, kv, gate)
    count = kv.shape[1] // rate
    if count == 0:
        return hidden.new_zeros((batch, 0, d), dtype=kv.dtype)
    kv = kv.reshape(batch, count, rate, -1)
    gate = gate.reshape(batch, count, rate, -1) + module.position_bias
    if overlap:
        # A window is compressed together with the one before it: the first d channels of a token are for the next
        # window, the others for its own. Before the first window the gates are -inf, so the values have weight 0.
        before = None, None
        if cache is not None:
            before = cache.update_overlap_state(name, kv, gate, d)
        kv = torch.cat([_shifted(kv[..., :d], before[0], 0.0), kv[..., d:]], 2)
        gate = torch.cat([_shifted(gate[..., :d], before[1], -torch.inf), gate[..., d:]], 2)
    share = gate.softmax(dim=2, dtype=torch.float32).to(kv.dtype)
    compressed = module.kv_norm((kv * share).sum(2))

    def angles() -> tuple[Tensor, Tensor]:
        positions = torch.arange(count, device=hidden.device) * rate + start
        return angles_of(module, compressed, positions.expand(batch, -1))

    return rotate(compressed.unsqueeze(1), once(("entries", rate, start, count), position_ids, angles), 1).squeeze(1)


def _shifted(x: Tensor, before: Tensor | None, fill: float) -> Tensor:
    """``[B, n, rate, d]`` shifted by one window, with ``before`` ``[B, rate, d]`` as the first."""
    first = x.new_full((len(x), 1, *x.shape[2:]), fill) if before is None else before.unsqueeze(1).to(x.dtype)
    return torch.cat([first, x[:, :-1]], 1)


def counts_of(position_ids: Tensor, rate: int, entries: int) -> Tensor:
    """How many of ``entries`` each query may see: those of windows that end at or before its position."""
    return ((position_ids + 1) // rate).clamp_(max=entries).to(torch.int32)


def store(
    module: nn.Module, cache: Any, hidden: Tensor, position_ids: Tensor, layer_type: str, *, overlap: bool
) -> tuple[Tensor, int]:
    """Compress and store. Returns the keys ``[B, T, 512]`` to attend to (none if the pages are read) and T."""
    entries = new_entries(module, cache, "compressor", hidden, position_ids, overlap=overlap)
    if cache is None:
        return entries, entries.shape[1]
    if not hasattr(cache, "append"):
        entries = cache.update_compressor_states("compressor", entries)
        return entries, entries.shape[1]
    pages = cache.append("compressor", entries, COMPRESSED_PAGE[layer_type])
    cache.entry_count["compressor"] = pages.length
    if hidden.shape[1] <= FEW_TOKENS:
        return entries[:, :0], pages.length
    everything = torch.arange(pages.length, device=hidden.device)
    return pages.read_kv(everything).to(entries.dtype), pages.length
