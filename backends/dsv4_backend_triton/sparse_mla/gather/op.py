"""The provider's function for ``gather_dequant_kv``."""

from __future__ import annotations

import torch

from ... import variants
from ...arch import arch_of
from ...lib.sizes import common_unit
from .plan import Call, Shape


def gather_dequant_kv(
    k_cache: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    out: torch.Tensor,
    *,
    gather_lens: torch.Tensor | None = None,
    offset: int = 0,
) -> torch.Tensor:
    """The last ``gather_lens`` [r] (all, if None) of ``seq_lens`` [r] entries of each request as bf16 rows of ``out``
    [r, m, 512], from row ``offset`` on.

    ``k_cache`` [pages, page, 584] or [pages, page, 1, 584] bytes, page-split; ``block_table`` [r, blocks] int32.
    Deterministic. No workspace.
    """
    pages, page_size = k_cache.shape[:2]
    rows = min(out.shape[1] - offset, page_size * block_table.shape[1])
    if rows > 0 and out.shape[0]:
        unit = common_unit(k_cache.data_ptr(), k_cache.stride(0) if pages > 1 else 0)
        shape = Shape(arch_of(out.device), unit)
        cache = k_cache.view(torch.uint8)
        call = Call(shape, cache, page_size, seq_lens, block_table, out, gather_lens, offset, rows)
        variants.run("gather_dequant_kv", call)
    return out
