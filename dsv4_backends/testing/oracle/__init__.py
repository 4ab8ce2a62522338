"""A second implementation of every op: one row at a time, in fp64, straight from the formula.

It judges all providers, the torch reference included, so it shares no code with any. Each contract names its oracle;
each family has a file here. An oracle is slow and may synchronise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...contract import CONTRACTS
from ...contract.settings import without_autocast
from ...runtime.bind import load_target
from ...selection.policy import known_op


def of(op: str) -> Callable[..., tuple[Tensor, ...]]:
    """The oracle that the contract names.

    Raises:
        PolicyError: an unknown op.
    """
    return load_target(CONTRACTS[known_op(op)].oracle)


def expected(op: str, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """The op's results in fp64, in the order of the contract's ``returns``.

    Raises:
        PolicyError: an unknown op.
        ContractError: an argument is missing or unknown.
    """
    oracle = of(op)
    CONTRACTS[op].require_names(arguments)
    with without_autocast():
        return oracle(**arguments)


def finished(op: str, arguments: dict[str, Any], results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Results in the oracle's form: partial sums added, bytes and indices read as numbers, in fp64."""
    contract = CONTRACTS[op]
    if contract.read:
        read = load_target(contract.read)
        return tuple(read(name, result, arguments) for name, result in zip(contract.returns, results, strict=True))
    if arguments.get(contract.partials) is not None:
        return tuple(result.to(torch.float64).sum(0) for result in results)
    return results
