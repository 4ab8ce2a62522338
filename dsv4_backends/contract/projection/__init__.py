"""The grouped FP8 output projection, and what makes its activations of the attention's output."""

from __future__ import annotations

from ..spec import OpContract
from . import cases, meaning, traffic

CONTRACTS = (
    OpContract(
        function=meaning.fp8_einsum,
        args=meaning.EINSUM_ARGS,
        rules=meaning.EINSUM_RULES,
        returns=("out",),
        cases=cases.EINSUM,
        make=cases.make_einsum,
        tolerances=cases.EINSUM_TOLERANCES,
        cost=cases.cost_einsum,
        oracle="dsv4_backends.testing.oracle.projection:fp8_einsum",
        traffic=traffic.EINSUM,
    ),
    OpContract(
        function=meaning.inverse_rope_quant,
        args=meaning.INVERSE_QUANT_ARGS,
        rules=meaning.INVERSE_RULES,
        values=meaning.INVERSE_VALUES,
        returns=("x_fp8", "x_scale"),
        cases=cases.INVERSE_QUANT,
        make=cases.make_inverse_quant,
        tolerances=cases.INVERSE_QUANT_TOLERANCES,
        cost=cases.cost_inverse_quant,
        oracle="dsv4_backends.testing.oracle.projection:inverse_rope_quant",
        read="dsv4_backends.testing.oracle.projection:read",
        strided=("x_fp8", "x_scale"),
        traffic=traffic.INVERSE_QUANT,
    ),
    OpContract(
        function=meaning.inverse_rope,
        args=meaning.INVERSE_ARGS,
        rules=meaning.INVERSE_RULES,
        values=meaning.INVERSE_VALUES,
        returns=("out",),
        cases=cases.INVERSE,
        make=cases.make_inverse,
        tolerances=cases.INVERSE_TOLERANCES,
        cost=cases.cost_inverse,
        oracle="dsv4_backends.testing.oracle.projection:inverse_rope",
        strided=("out",),
        traffic=traffic.INVERSE,
    ),
)
