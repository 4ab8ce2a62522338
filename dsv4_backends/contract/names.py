"""The ops, by name, in the order in which people see them. Free of torch and of everything else."""

from __future__ import annotations

OPS = (
    "sparse_mla_prefill",
    "sparse_mla_decode",
    "mqa_logits",
    "paged_mqa_logits",
    "fp8_einsum",
    "hc_prenorm_gemm",
)
