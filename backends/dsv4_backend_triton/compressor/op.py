"""The provider's functions for ``compress_norm_rope_insert`` and ``indexer_compress_insert``."""

from __future__ import annotations

import torch

from .. import variants
from ..arch import arch_of
from .plan import Call, Shape


def compress_norm_rope_insert(
    positions: torch.Tensor,
    requests: torch.Tensor,
    slots: torch.Tensor,
    state: torch.Tensor,
    block_table: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    cos_sin: torch.Tensor,
    ratio: int,
    k_cache: torch.Tensor,
) -> torch.Tensor:
    """The entries of the windows that tokens complete, written into the KV cache and returned with it.

    ``positions``, ``requests``, ``slots`` [t]; ``state`` fp32 [state_pages, state_page_size, 1024 or 2048];
    ``block_table`` int32 [r, blocks]; ``k_cache`` uint8 [pages, page_size, (1,) 584], page-split. Deterministic
    where no two tokens have a slot in common. Workspace: for windows of more than 16 rows t * 512 fp32.
    """
    _run(
        "compress_norm_rope_insert", positions, requests, slots, state, block_table, norm_weight, eps, cos_sin, ratio,
        k_cache, False,
    )  # fmt: skip
    return k_cache


def indexer_compress_insert(
    positions: torch.Tensor,
    requests: torch.Tensor,
    slots: torch.Tensor,
    state: torch.Tensor,
    block_table: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    cos_sin: torch.Tensor,
    ratio: int,
    k_cache: torch.Tensor,
    *,
    hadamard: bool = False,
) -> torch.Tensor:
    """The indexer's keys of the windows that tokens complete, written into its cache and returned with it.

    As ``compress_norm_rope_insert``, with ``state`` [..., 256 or 512] and ``k_cache`` [pages, page_size, (1,) 132].
    Workspace: for windows of more than 64 rows t * 128 fp32.
    """
    _run(
        "indexer_compress_insert", positions, requests, slots, state, block_table, norm_weight, eps, cos_sin, ratio,
        k_cache, hadamard,
    )  # fmt: skip
    return k_cache


def _run(
    op, positions, requests, slots, state, block_table, norm_weight, eps, cos_sin, ratio, k_cache, hadamard
):  # fmt: skip
    if len(positions) and k_cache.shape[0] and block_table.shape[0]:
        dim = norm_weight.shape[0]
        overlap = state.shape[2] == 4 * dim
        shape = Shape(arch_of(state.device), op, dim, ratio, overlap, hadamard)
        call = Call(
            shape, positions, requests, slots, state, block_table, norm_weight, eps, cos_sin, k_cache
        )  # fmt: skip
        variants.run(op, call)
