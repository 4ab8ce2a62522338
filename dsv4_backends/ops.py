"""The functions that people call. Each is bound to a provider once per device and policy, then called directly.

Schema and fake of the ``torch.library`` ops exist from the import of this module on.
"""

from __future__ import annotations

from .contract.hyper_connection import meaning as _hyper_connection
from .contract.indexer import meaning as _indexer
from .contract.projection import meaning as _projection
from .contract.sparse_mla import meaning as _sparse_mla
from .runtime.dispatch import define as _define

sparse_mla_prefill = _define(_sparse_mla.sparse_mla_prefill)
sparse_mla_decode = _define(_sparse_mla.sparse_mla_decode)
mqa_logits = _define(_indexer.mqa_logits)
paged_mqa_logits = _define(_indexer.paged_mqa_logits)
fp8_einsum = _define(_projection.fp8_einsum)
hc_prenorm_gemm = _define(_hyper_connection.hc_prenorm_gemm)

__all__ = [
    "fp8_einsum",
    "hc_prenorm_gemm",
    "mqa_logits",
    "paged_mqa_logits",
    "sparse_mla_decode",
    "sparse_mla_prefill",
]
