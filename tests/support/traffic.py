"""Calls of a server: by what decides their shapes, and of sizes that nobody chose."""

from __future__ import annotations

import random

from dsv4_backends.contract.compressor.traffic import compress
from dsv4_backends.contract.hyper_connection.traffic import prenorm
from dsv4_backends.contract.indexer.traffic import mqa, paged, queries
from dsv4_backends.contract.models import Rank
from dsv4_backends.contract.projection.traffic import einsum, inverse
from dsv4_backends.contract.sparse_mla.traffic import compressed_widths, decode, gather, prefill
from dsv4_backends.contract.traffic import POSITIONS, Arguments, Limits, round_up
from dsv4_backends.runtime.serving import calls

__all__ = [
    "Arguments",
    "Limits",
    "calls",
    "compress",
    "decode",
    "einsum",
    "gather",
    "inverse",
    "mqa",
    "paged",
    "prefill",
    "prenorm",
    "queries",
    "served",
]


def served(op: str, rank: Rank, limits: Limits, count: int, seed: int = 0) -> list[Arguments]:
    """``count`` calls of ``op`` within the limits, with tensors on the meta device."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        tokens, requests = rng.randint(1, limits.max_tokens), rng.randint(1, limits.max_requests)
        next_n = rng.randint(1, limits.next_n)
        keys = -(-rng.randint(1, limits.max_context) // 4)
        widths = list(compressed_widths(rank, limits.max_context))
        extra = rng.choice([None, *widths])
        positions, coin = rng.choice(POSITIONS), rng.random() < 0.5
        made.append(
            {
                "sparse_mla_prefill": lambda t=tokens, k=keys, e=extra: prefill(
                    rank.heads, t, k, round_up(rank.model.window + (e[0] if e else 0), 128)
                ),
                "sparse_mla_decode": lambda b=requests, s=next_n, e=extra: decode(
                    rank.heads, b, s, rank.model.window, e
                ),
                "gather_dequant_kv": lambda r=requests, k=keys, given=coin: (
                    gather(r, k, k + 8, rng.choice((64, 2)), given=given) | {"offset": rng.randint(0, 9)}
                ),
                "indexer_q_rope_quant": lambda t=tokens, d=positions, hadamard=coin: (
                    queries(rank, t) | {"hadamard": True}
                    if hadamard
                    else queries(rank, t, dtype=d, weights=rng.choice(("bfloat16", "float32")))
                ),
                "compress_norm_rope_insert": lambda t=tokens, b=requests, d=positions: compress(
                    512, rng.choice((4, 128)), t, b, limits.max_context, rank.model.max_positions, dtype=d
                ),
                "indexer_compress_insert": lambda t=tokens, b=requests, d=positions, hadamard=coin: (
                    compress(128, 4, t, b, limits.max_context, rank.model.max_positions, dtype=d)
                    | {"hadamard": hadamard}
                ),
                "inverse_rope_quant": lambda t=tokens, d=positions: inverse(rank, t, dtype=d, packed=False),
                "inverse_rope": lambda t=tokens, d=positions: inverse(rank, t, dtype=d),
                "mqa_logits": lambda t=tokens, k=keys: mqa(rank, t, k),
                "paged_mqa_logits": lambda b=requests, s=next_n, k=keys: paged(rank, b, s, k),
                "fp8_einsum": lambda t=tokens: einsum(rank, t),
                "hc_prenorm_gemm": lambda t=tokens: prenorm(t, rank.hc_k, rank.hc_n, rng.choice([None, 2, 8, 32])),
            }[op]()
        )
    return made
