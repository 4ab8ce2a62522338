"""What each op means. Providers depend on this package; it depends on none of them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from .hyper_connection import HC_PRENORM_GEMM
from .indexer import MQA_LOGITS, PAGED_MQA_LOGITS
from .names import OPS
from .op import LEVELS, Case, Cost, OpContract, Tolerance
from .projection import FP8_EINSUM
from .sparse_mla import DECODE, PREFILL

CONTRACTS: Mapping[str, OpContract] = MappingProxyType(
    {c.name: c for c in (PREFILL, DECODE, MQA_LOGITS, PAGED_MQA_LOGITS, FP8_EINSUM, HC_PRENORM_GEMM)}
)
"""Every op by name, in the order of ``OPS``."""

assert tuple(CONTRACTS) == OPS

__all__ = ["CONTRACTS", "LEVELS", "OPS", "Case", "Cost", "OpContract", "Tolerance"]
