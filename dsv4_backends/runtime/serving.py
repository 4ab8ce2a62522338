"""The calls that serving a model makes on one rank, as arguments without storage."""

from __future__ import annotations

from collections.abc import Iterator

from ..contract import CONTRACTS
from ..contract.models import Rank
from ..contract.traffic import Arguments, Deployment, Limits

__all__ = ["Arguments", "Limits", "calls"]


def calls(op: str, rank: Rank, limits: Limits, *, packed_scales: bool = False) -> Iterator[Arguments]:
    """Arguments of every call of ``op`` that differs in what could be compiled for it.

    Args:
        op: One of ``dsv4_backends.OPS``.
        rank: The model and its tensor parallelism.
        limits: How far the server goes.
        packed_scales: The engine packs the scales of the output projection (compute capability 10 and newer).
    """
    return CONTRACTS[op].traffic.calls(Deployment(rank, limits, packed_scales))
