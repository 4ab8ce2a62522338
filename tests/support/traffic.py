"""Calls of a server: the largest ones, and calls with drawn limits."""

from __future__ import annotations

import random
from collections.abc import Sequence

from dsv4_backends.contract import CONTRACTS
from dsv4_backends.contract.hyper_connection.traffic import prenorm
from dsv4_backends.contract.indexer.traffic import mqa, paged, queries
from dsv4_backends.contract.models import Rank
from dsv4_backends.contract.projection.traffic import einsum
from dsv4_backends.contract.sparse_mla.traffic import decode, gather, prefill
from dsv4_backends.contract.traffic import Arguments, Deployment, Limits
from dsv4_backends.runtime.serving import calls

__all__ = [
    "Arguments",
    "Limits",
    "calls",
    "decode",
    "einsum",
    "gather",
    "mqa",
    "paged",
    "prefill",
    "prenorm",
    "queries",
    "served",
]


class OneStep(Deployment):
    """A server of which only the largest steps are asked for."""

    @property
    def tokens(self) -> Sequence[int]:
        return [self.limits.max_tokens]

    @property
    def batches(self) -> Sequence[int]:
        return [self.limits.max_requests]

    @property
    def rows(self) -> Sequence[int]:
        return [self.limits.max_requests * self.limits.next_n]


def served(op: str, rank: Rank, limits: Limits, count: int, seed: int = 0) -> list[Arguments]:
    """``count`` calls of ``op`` within the limits, on the meta device: each is a call of a server with drawn limits."""
    rng = random.Random(seed)

    def one() -> Arguments:
        drawn = Limits(
            max_tokens=rng.randint(1, limits.max_tokens),
            max_requests=rng.randint(1, limits.max_requests),
            max_context=rng.randint(1, limits.max_context),
            next_n=rng.randint(1, limits.next_n),
            heads=limits.heads,
        )
        return rng.choice(list(CONTRACTS[op].traffic.calls(OneStep(rank, drawn))))

    return [one() for _ in range(count)]
