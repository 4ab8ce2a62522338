"""A step in a CUDA graph, for every provider that plans something once a step."""

from __future__ import annotations

from typing import Any

import torch

from dsv4_backends import step
from dsv4_backends.testing import checks, numerics, oracle


def check_step_in_a_graph(provider: str, op: str, case_name: str) -> None:
    """Two layers share a schedule; a replay with other lengths makes it anew."""
    target = checks.subject(provider, op, checks.default_device())
    contract = target.contract
    case = next(case for case in contract.cases if case.name == case_name)
    made: dict[str, Any] = contract.inputs(case, target.device)
    target.run(made)
    torch.cuda.synchronize(target.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(target.device)), step():
        target.run(made)
        results = target.run(made)
    for variant in (1, 2, 0):
        other = contract.inputs(case, target.device, variant)
        for name, value in made.items():
            if isinstance(value, torch.Tensor):
                checks._storage(value).copy_(checks._storage(other[name]))
        graph.replay()
        torch.cuda.synchronize(target.device)
        for name, result, want in zip(contract.returns, results, oracle.expected(op, other), strict=True):
            error = numerics.compare(result, want, contract.tolerances[name])
            assert error.ok, (variant, name, error)
