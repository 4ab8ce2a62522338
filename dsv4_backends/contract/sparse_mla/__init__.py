"""Sparse multi-head latent attention, and the keys that prefill has of the cache."""

from __future__ import annotations

from ..spec import OpContract
from . import cases, meaning, traffic

CONTRACTS = (
    OpContract(
        function=meaning.sparse_mla_prefill,
        args=meaning.PREFILL_ARGS,
        rules=meaning.PREFILL_RULES,
        values=meaning.PREFILL_VALUES,
        returns=("out", "max_logits", "lse"),
        cases=cases.PREFILL,
        make=cases.make_prefill,
        tolerances=cases.PREFILL_TOLERANCES,
        cost=cases.cost_prefill,
        oracle="dsv4_backends.testing.oracle.sparse_mla:sparse_mla_prefill",
        traffic=traffic.PREFILL,
    ),
    OpContract(
        function=meaning.sparse_mla_decode,
        args=meaning.DECODE_ARGS,
        rules=meaning.DECODE_RULES,
        values=meaning.DECODE_VALUES,
        returns=("out", "lse"),
        cases=cases.DECODE,
        make=cases.make_decode,
        tolerances=cases.DECODE_TOLERANCES,
        cost=cases.cost_decode,
        oracle="dsv4_backends.testing.oracle.sparse_mla:sparse_mla_decode",
        traffic=traffic.DECODE,
    ),
    OpContract(
        function=meaning.gather_dequant_kv,
        args=meaning.GATHER_ARGS,
        rules=meaning.GATHER_RULES,
        values=meaning.GATHER_VALUES,
        returns=("out",),
        cases=cases.GATHER,
        make=cases.make_gather,
        tolerances=cases.GATHER_TOLERANCES,
        cost=cases.cost_gather,
        oracle="dsv4_backends.testing.oracle.sparse_mla:gather_dequant_kv",
        batch="seq_lens",
        traffic=traffic.GATHER,
    ),
)
