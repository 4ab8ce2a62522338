"""What a call costs beyond the implementation: the budget, on this machine's CPU."""

from __future__ import annotations

from collections.abc import Iterator

import overhead
import pytest

from dsv4_backends import OPS
from dsv4_backends.runtime import bind

BUDGET_US = 3.0


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(overhead, "CALLS", 2000)
    monkeypatch.setattr(overhead, "REPEATS", 5)
    yield
    bind.reset()  # what was bound computes nothing any more


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("op", OPS)
def test_a_repeated_call_is_within_the_budget(op: str) -> None:
    """The best of some tries: other processes share the machine. Where a provider may refuse, no block is active."""
    tried = []
    for _ in range(5):
        bind.reset()
        row, may_refuse, _ = overhead.measure(op, "cpu")
        tried.append(max(row.added_us, may_refuse))
        if tried[-1] <= BUDGET_US:
            return
    pytest.fail(f"added microseconds: {tried}")
