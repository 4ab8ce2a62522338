"""The reference provider: every op in plain PyTorch, on the CPU and on any GPU.

Written to be read. It shares no code with the kernels it judges.
"""

from __future__ import annotations

from collections.abc import Iterable

from dsv4_backends.provider import Implementation, ProviderSpec, Tier, hookimpl

_HOMES = {
    "sparse_mla_prefill": "attention",
    "sparse_mla_decode": "attention",
    "mqa_logits": "indexer",
    "paged_mqa_logits": "indexer",
    "fp8_einsum": "projection",
    "hc_prenorm_gemm": "hyper_connection",
}


@hookimpl
def dsv4_providers() -> Iterable[ProviderSpec]:
    yield ProviderSpec(
        name="torch",
        summary="plain PyTorch, fp32 accumulation; runs anywhere, and is slow",
        tier=Tier.REFERENCE,
        implementations=tuple(
            Implementation(
                op=op,
                target=f"dsv4_backend_torch.{module}:{op}",
                devices=("cuda", "cpu"),
                note="extra memory at most 1 GiB",
            )
            for op, module in _HOMES.items()
        ),
    )
