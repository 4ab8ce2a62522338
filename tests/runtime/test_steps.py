"""What is computed once in a ``step()`` block, with a fake of CUDA's streams."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from dsv4_backends import step
from dsv4_backends.runtime import steps


class Cuda:
    """The current device, the current stream of each device, and the streams that a graph captures."""

    def __init__(self) -> None:
        self.device = 0
        self.streams = {0: 0, 1: 0}
        self.captured: set[int] = set()
        self.asked = 0

    def is_capturing(self) -> bool:
        self.asked += 1
        return self.streams[self.device] in self.captured


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    made = Cuda()
    functions = made.is_capturing, lambda: made.device, lambda device: made.streams[device]
    monkeypatch.setattr(steps, "_cuda", lambda: functions)
    return made


@pytest.fixture
def plan() -> Callable[..., int]:
    """The number of the plan that a call gets for these lengths."""
    numbers = itertools.count()
    return lambda *lengths: steps.once_a_step("plan", lengths, lambda: next(numbers))


def lengths(device: int = -1) -> torch.Tensor:
    class On(torch.Tensor):
        def get_device(self) -> int:
            return device

    return torch.ones(4, dtype=torch.int32).as_subclass(On)


def test_a_plan_is_of_its_stream(cuda: Cuda, plan: Callable[..., int]) -> None:
    own = lengths(0)
    assert [plan(own), plan(own)] == [0, 1]
    with step():
        assert [plan(own), plan(own), plan(None), plan(None)] == [2, 2, 3, 3]
        cuda.streams[0] = 7
        assert [plan(own), plan(own), plan(None), plan(None)] == [4, 4, 5, 5]
        cuda.streams[0] = 0
        assert [plan(own), plan(None)] == [2, 3]


def test_a_plan_does_not_pass_into_a_capture_or_out_of_it(cuda: Cuda, plan: Callable[..., int]) -> None:
    own = lengths(0)
    with step():
        assert [plan(own), plan(own)] == [0, 0]
        cuda.streams[0] = 7
        assert [plan(own), plan(own)] == [1, 1]
        cuda.captured = {7}
        assert [plan(own), plan(own)] == [2, 3]
        with step():
            assert [plan(own), plan(own)] == [4, 4]
            cuda.streams[0] = 0
            assert [plan(own), plan(own)] == [5, 6]
        cuda.captured = set()
        cuda.streams[0] = 7
        assert plan(own) == 1


def test_the_default_stream_is_not_asked_whether_it_is_captured(cuda: Cuda, plan: Callable[..., int]) -> None:
    """It never is. The stream of another device than the current one says nothing about the current one."""
    cuda.captured = {7}
    own, other = lengths(0), lengths(1)
    with step():
        before = cuda.asked
        assert [plan(own), plan(own)] == [0, 0]
        assert cuda.asked == before
        cuda.streams[0] = 7
        assert [plan(other), plan(other)] == [1, 2]
        cuda.streams[0] = 8
        assert [plan(other), plan(other)] == [3, 3]


def test_a_plan_is_made_from_what_is_at_an_address(plan: Callable[..., int]) -> None:
    whole = torch.ones(4, 4, dtype=torch.int32)
    views = (whole, whole[:2], whole.T, whole[:, :2], whole[1:], whole.view(2, 8))
    with step():
        assert [plan(view) for view in views] == list(range(6))
        assert [plan(view) for view in views] == list(range(6))
        assert plan(whole.view(4, 4)) == 0
        assert plan(whole, None) == plan(whole, None) != plan(None, whole)
        whole += 1
        assert plan(whole) > 6


def test_without_lengths_a_plan_is_of_the_current_device(cuda: Cuda, plan: Callable[..., int]) -> None:
    """Both devices' default streams have the handle 0."""
    with step():
        assert [plan(None), plan(None)] == [0, 0]
        cuda.device = 1
        assert [plan(None), plan(None)] == [1, 1]
