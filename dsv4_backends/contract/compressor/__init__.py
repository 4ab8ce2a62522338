"""The compressor: entries of the compressed caches from the states of their tokens."""

from __future__ import annotations

from ..spec import OpContract
from . import cases, meaning, traffic

CONTRACTS = (
    OpContract(
        function=meaning.compress_norm_rope_insert,
        args=meaning.MAIN_ARGS,
        rules=meaning.MAIN_RULES,
        values=meaning.VALUES,
        returns=("k_cache",),
        cases=cases.MAIN,
        make=cases.make_main,
        tolerances=cases.TOLERANCES,
        cost=cases.cost,
        oracle="dsv4_backends.testing.oracle.compressor:compress_norm_rope_insert",
        read="dsv4_backends.testing.oracle.compressor:read_kv",
        traffic=traffic.MAIN,
    ),
    OpContract(
        function=meaning.indexer_compress_insert,
        args=meaning.INDEXER_ARGS,
        rules=meaning.INDEXER_RULES,
        values=meaning.VALUES,
        returns=("k_cache",),
        cases=cases.INDEXER,
        make=cases.make_indexer,
        tolerances=cases.TOLERANCES,
        cost=cases.cost,
        oracle="dsv4_backends.testing.oracle.compressor:indexer_compress_insert",
        read="dsv4_backends.testing.oracle.compressor:read_keys",
        traffic=traffic.INDEXER,
    ),
)
