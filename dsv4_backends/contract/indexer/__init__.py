"""The lightning indexer."""

from __future__ import annotations

from ..spec import OpContract
from . import cases, meaning, traffic

CONTRACTS = (
    OpContract(
        function=meaning.mqa_logits,
        args=meaning.MQA_ARGS,
        rules=meaning.MQA_RULES,
        values=meaning.MQA_VALUES,
        returns=("out",),
        cases=cases.MQA,
        make=cases.make_mqa,
        tolerances=cases.TOLERANCES,
        cost=cases.cost_mqa,
        oracle="dsv4_backends.testing.oracle.indexer:mqa_logits",
        traffic=traffic.MQA,
    ),
    OpContract(
        function=meaning.paged_mqa_logits,
        args=meaning.PAGED_ARGS,
        rules=meaning.PAGED_RULES,
        values=meaning.PAGED_VALUES,
        returns=("out",),
        cases=cases.PAGED,
        make=cases.make_paged,
        tolerances=cases.TOLERANCES,
        cost=cases.cost_paged,
        oracle="dsv4_backends.testing.oracle.indexer:paged_mqa_logits",
        traffic=traffic.PAGED,
    ),
    OpContract(
        function=meaning.indexer_q_rope_quant,
        args=meaning.Q_ARGS,
        rules=meaning.Q_RULES,
        values=meaning.Q_VALUES,
        returns=("q_fp8", "weights_out"),
        cases=cases.Q,
        make=cases.make_q,
        tolerances=cases.Q_TOLERANCES,
        cost=cases.cost_q,
        oracle="dsv4_backends.testing.oracle.indexer:indexer_q_rope_quant",
        traffic=traffic.Q,
    ),
)
