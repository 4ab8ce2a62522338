"""The reference provider: every op in plain PyTorch, on the CPU and on any GPU.

Written to be read. It shares no code with the kernels it judges.
"""

from __future__ import annotations

from collections.abc import Iterable

from dsv4_backends.contract import CONTRACTS
from dsv4_backends.provider import Implementation, ProviderSpec, Tier, hookimpl

FAMILIES = (
    "sparse_mla",
    "indexer",
    "compressor",
    "projection",
    "hyper_connection",
)
"""The modules, named as the contract's folders: each has every op of its family."""


@hookimpl
def dsv4_providers() -> Iterable[ProviderSpec]:
    yield ProviderSpec(
        name="torch",
        summary="plain PyTorch, fp32 accumulation; runs anywhere, and is slow",
        tier=Tier.REFERENCE,
        implementations=tuple(
            Implementation(
                op=op,
                target=f"dsv4_backend_torch.{contract.family}:{op}",
                devices=("cuda", "cpu"),
                note="extra memory at most 1 GiB",
            )
            for op, contract in CONTRACTS.items()
            if contract.family in FAMILIES
        ),
    )
