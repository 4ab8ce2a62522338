"""What is tested of the native providers where their libraries are: on a Hopper GPU, one installed library at a time.

Run by name: ``DSV4_BACKENDS_LEVEL=full pytest tests/gpu/native_suite.py -k "DeepGemm or deep_gemm"``, and the same with
``FlashMla or flash_mla``. A library that is not there, or does not serve, is a failure here and not a skip.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from extremes import check_bounds, check_extreme_scale_codes, check_lengths

from dsv4_backends import step
from dsv4_backends.testing import ProviderConformance, checks, numerics, oracle


class _Native(ProviderConformance):
    def test_serves(self, op: str) -> None:
        checks.subject(self.provider, op, checks.default_device())


class TestDeepGemm(_Native):
    provider = "deep_gemm"


class TestFlashMla(_Native):
    provider = "flash_mla"


def subject(provider: str, op: str) -> checks.Subject:
    return checks.subject(provider, op, checks.default_device())


def test_deep_gemm_extreme_scale_codes() -> None:
    check_extreme_scale_codes("deep_gemm", checks.default_device())


@pytest.mark.parametrize("compressed", [None, 7])
def test_deep_gemm_bounds(compressed: int | None) -> None:
    check_bounds(subject("deep_gemm", "mqa_logits"), compressed)


@pytest.mark.parametrize("next_n", [1, 2, 3, 4, 5])
def test_deep_gemm_lengths(next_n: int) -> None:
    check_lengths(subject("deep_gemm", "paged_mqa_logits"), next_n)


def _step_in_a_graph(provider: str, op: str, case_name: str) -> None:
    """Two layers share a schedule; a replay with other lengths makes it anew."""
    target = subject(provider, op)
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


def test_deep_gemm_step_in_a_graph() -> None:
    _step_in_a_graph("deep_gemm", "paged_mqa_logits", "v4")


def test_flash_mla_step_in_a_graph() -> None:
    _step_in_a_graph("flash_mla", "sparse_mla_decode", "flash tp1 mtp")
