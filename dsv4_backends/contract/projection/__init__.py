"""The grouped FP8 output projection."""

from __future__ import annotations

from ..spec import OpContract
from . import cases, meaning, traffic

CONTRACTS = (
    OpContract(
        function=meaning.fp8_einsum,
        args=meaning.EINSUM_ARGS,
        rules=meaning.EINSUM_RULES,
        returns=("out",),
        cases=cases.CASES,
        make=cases.make,
        tolerances=cases.TOLERANCES,
        cost=cases.cost,
        oracle="dsv4_backends.testing.oracle.projection:fp8_einsum",
        traffic=traffic.EINSUM,
    ),
)
