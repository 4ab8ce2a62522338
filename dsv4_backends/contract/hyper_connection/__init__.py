"""The hyper-connection's prenorm GEMM."""

from __future__ import annotations

from ..spec import OpContract
from . import cases, meaning, traffic

CONTRACTS = (
    OpContract(
        function=meaning.hc_prenorm_gemm,
        args=meaning.PRENORM_ARGS,
        rules=meaning.PRENORM_RULES,
        returns=("out", "sqr_sum"),
        partials="num_splits",
        cases=cases.CASES,
        make=cases.make,
        tolerances=cases.TOLERANCES,
        cost=cases.cost,
        oracle="dsv4_backends.testing.oracle.hyper_connection:hc_prenorm_gemm",
        traffic=traffic.PRENORM,
    ),
)
