"""Measure what a public call adds to the implementation that it reaches: check, choice and counter.

Every op is called with real tensors, all optional ones given, while the implementation is replaced by a function that
returns at once; the same function called directly is the base. A call whose shapes were seen lately is recognised;
`check` is what the check costs where they were not. `may_refuse` and `block` are the call where the provider has
a function that may refuse shapes, under the environment's policy and in a block of `use_providers`.
Usage: python tools/overhead.py [--json FILE]
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from kept import Overhead, OverheadRow

from dsv4_backends import CONTRACTS, ops, records, use_providers
from dsv4_backends.bench.provenance import provenance
from dsv4_backends.contract import OpContract
from dsv4_backends.contract.checker import checked_function
from dsv4_backends.runtime import bind

CALLS, REPEATS = 20_000, 9


def fullest(contract: OpContract, device: str) -> dict[str, Any]:
    """The arguments of the first smoke case with as many tensors as any has."""
    made = (contract.inputs(case, device) for case in contract.at_level("smoke"))
    return max(made, key=lambda arguments: sum(isinstance(value, torch.Tensor) for value in arguments.values()))


def microseconds(function: Any, args: list[Any], kwargs: dict[str, Any]) -> float:
    """Median over repeats of the mean CPU time of a call, which other processes do not inflate."""
    times = []
    for _ in range(REPEATS):
        start = time.thread_time()
        for _ in range(CALLS):
            function(*args, **kwargs)
        times.append((time.thread_time() - start) / CALLS * 1e6)
    return statistics.median(times)


def replaced(chain: Any, stub: Any) -> None:
    """Every candidate of a chain does nothing."""
    for bound in chain.bound:
        bound.function = stub


def refusing(chain: Any, stub: Any) -> None:
    """Every candidate of a chain has a function that may refuse shapes, which takes them all."""
    chain.always = None
    for bound in chain.bound:
        bound.refuses = stub


def measure(op: str, device: str) -> tuple[OverheadRow, float, float]:
    """The row of an op, and what is added where its provider may refuse shapes: by the environment, and in a block.

    Nothing that is bound computes any more: ``bind.reset()`` after it.
    """
    contract, public = CONTRACTS[op], getattr(ops, op)
    made = fullest(contract, device)
    public(**made)
    parameters = [p.replace(annotation=p.empty) for p in contract.signature.parameters.values()]
    scope: dict[str, Any] = {}
    exec(f"def stub{inspect.Signature(parameters)}: return None", scope)
    stub = scope["stub"]
    (chain,) = (c for (name, _), c in bind.current().chains.items() if name == op)
    replaced(chain, stub)
    args = [made[name] for name in contract.args if not contract.is_keyword(name)]
    kwargs = {name: value for name, value in made.items() if contract.is_keyword(name)}
    direct, call = microseconds(stub, args, kwargs), microseconds(public, args, kwargs)
    bind.fast_path[op].clear()
    refusing(chain, stub)
    may_refuse = microseconds(public, args, kwargs)
    with use_providers(order=["torch"]):
        public(*args, **kwargs)
        (scoped,) = (c for (name, _), c in bind.current().chains.items() if name == op)
        replaced(scoped, stub)
        refusing(scoped, stub)
        block = microseconds(public, args, kwargs)
    with mock.patch.dict(sys.modules, {"torch._C._dynamo.guards": None}):  # nothing is recognised
        whole = checked_function(contract, (), ("return None",), {})
    check = microseconds(whole, args, kwargs) - direct
    tensors = sum(isinstance(value, torch.Tensor) for value in made.values())
    return OverheadRow(op, tensors, direct, call, check), may_refuse - direct, block - direct


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    target = parser.parse_args().json
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for op in CONTRACTS:
        row, may_refuse, block = measure(op, device)
        rows.append(row)
        print(
            f"{op:25} {row.tensors} tensors, us: direct {row.direct_us:.2f} call {row.call_us:.2f} "
            f"added {row.added_us:.2f} check {row.check_us:.2f} may_refuse {may_refuse:.2f} block {block:.2f}"
        )
    if target:
        records.write(Overhead(**provenance("python tools/overhead.py"), rows=tuple(rows)), target)


if __name__ == "__main__":
    main()
