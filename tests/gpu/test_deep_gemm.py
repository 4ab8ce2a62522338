"""The provider deep_gemm over the installed DeepGEMM; ``tools/conformance.py`` runs it at level full.

That the library does not serve here is a failure, and not a skip.
"""

from __future__ import annotations

from gpus import needs

needs(library="deep_gemm")

import pytest
from extremes import check_bounds, check_extreme_scale_codes, check_lengths
from graphs import check_step_in_a_graph

from dsv4_backends.testing import ProviderConformance, checks


class TestDeepGemm(ProviderConformance):
    provider = "deep_gemm"

    def test_every_op_serves(self, op: str) -> None:
        checks.subject(self.provider, op, checks.default_device())


def subject(op: str) -> checks.Subject:
    return checks.subject("deep_gemm", op, checks.default_device())


def test_extreme_scale_codes() -> None:
    check_extreme_scale_codes("deep_gemm", checks.default_device())


@pytest.mark.parametrize("compressed", [None, 7])
def test_bounds(compressed: int | None) -> None:
    check_bounds(subject("mqa_logits"), compressed)


@pytest.mark.parametrize("next_n", [1, 2, 3, 4, 5])
def test_lengths(next_n: int) -> None:
    check_lengths(subject("paged_mqa_logits"), next_n)


def test_step_in_a_graph() -> None:
    check_step_in_a_graph("deep_gemm", "paged_mqa_logits", "v4")
