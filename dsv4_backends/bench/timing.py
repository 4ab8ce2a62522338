"""Time calls against each other, and measure the machine's own rates in the same way.

On a GPU every call is captured once in a CUDA graph on its own tensors. Replays alternate, A B C A B C, so that a
clock drift affects all calls. Before each replay a buffer larger than the L2 cache is read. It is not written, since
the cache would then write dirty lines back during the timed replay. Two events enclose only the replay. On a CPU the
wall clock encloses the call.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..runtime.steps import step
from .results import Rates

FLUSH_BYTES = 256 << 20
SAMPLES = 50
"""Replays of each call; a tenth of it on a CPU."""


@dataclass(frozen=True)
class Time:
    """Microseconds of one call: median, first and third quartile of ``samples`` measurements."""

    us: float
    q1: float
    q3: float
    samples: int

    @classmethod
    def of(cls, seen: Sequence[float]) -> Time:
        q1, us, q3 = statistics.quantiles(seen, n=4, method="inclusive")
        return cls(us, q1, q3, len(seen))


class Captured:
    """A call that can be replayed: a CUDA graph on a GPU, otherwise the call itself. ``results`` are those of the last.

    A graph has the call of a later layer of a ``dsv4_backends.step()``, which reuses the step's schedule.
    """

    def __init__(self, call: Callable[[], Any], device: torch.device) -> None:
        self.results: Any = None
        if device.type != "cuda":

            def replay() -> None:
                self.results = call()

            self.replay: Callable[[], None] = replay
            return
        # The first use compiles and allocates. PyTorch requires a separate stream for it before a capture.
        aside = torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(2):
                call()
        torch.cuda.current_stream(device).wait_stream(aside)
        torch.cuda.synchronize(device)
        with contextlib.ExitStack() as layers:
            # The first layer of a step makes everything that depends on lengths only; this graph keeps it.
            self.before = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.before):
                layers.enter_context(step())
                call()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.results = call()
        self.before.replay()
        self.replay = graph.replay


class Timer:
    """Times calls on one device; has the buffer that flushes its cache."""

    def __init__(self, device: torch.device, samples: int | None = None) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.samples = samples or (SAMPLES if self.on_gpu else SAMPLES // 10)
        if self.on_gpu:
            cache: int = torch.cuda.get_device_properties(device).L2_cache_size
            self.flush = torch.zeros(max(4 * cache, FLUSH_BYTES) // 4, device=device)

    def interleaved(self, calls: Mapping[str, Captured]) -> dict[str, Time]:
        """The time of each call, whose samples alternate with those of the others."""
        seen = self._on_gpu(calls) if self.on_gpu else self._on_cpu(calls)
        return {name: Time.of(values) for name, values in seen.items()}

    def _on_gpu(self, calls: Mapping[str, Captured]) -> dict[str, list[float]]:
        def event() -> torch.cuda.Event:
            return torch.cuda.Event(enable_timing=True)

        spans: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
        for _ in range(self.samples):
            for name, call in calls.items():
                start, end = event(), event()
                self.flush.amax()
                start.record()
                call.replay()
                end.record()
                spans[name].append((start, end))
        torch.cuda.synchronize(self.device)
        return {name: [start.elapsed_time(end) * 1e3 for start, end in pairs] for name, pairs in spans.items()}

    def _on_cpu(self, calls: Mapping[str, Captured]) -> dict[str, list[float]]:
        seen: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            call.replay()
        for _ in range(self.samples):
            for name, call in calls.items():
                start = time.perf_counter()
                call.replay()
                seen[name].append((time.perf_counter() - start) * 1e6)
        return seen


def rates(timer: Timer) -> Rates:
    """This machine's own rates."""
    device = timer.device
    n = 8192 if timer.on_gpu else 256
    words = (1 << 28) if timer.on_gpu else (1 << 20)
    source, target = (torch.empty(words, dtype=torch.float32, device=device).fill_(1) for _ in range(2))
    a, b = (torch.randn(n, n, device=device) for _ in range(2))
    a16, b16 = a.bfloat16(), b.bfloat16()
    one = torch.zeros(1, device=device)
    calls: dict[str, Callable[[], Any]] = {
        # Not copy_(): in a graph it becomes a memory copy, which reaches two thirds of the rate of a kernel.
        "copy_gbps": lambda: torch.neg(source, out=target),
        "read_gbps": source.sum,
        # A CPU computes in fp32 for any operands.
        "bf16_tflops": (lambda: a16 @ b16) if timer.on_gpu else (lambda: a @ b),
        "tf32_tflops": lambda: a @ b,
        "launch_us": one.zero_,
    }
    if timer.on_gpu:
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        unit = torch.ones((), device=device)

        def fp8() -> Tensor:
            return torch._scaled_mm(a8, b8, unit, unit, out_dtype=torch.bfloat16, use_fast_accum=True)

        calls["fp8_tflops"] = fp8
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    captured = {}
    try:
        for name, call in calls.items():
            # PyTorch raises on a GPU without FP8 products.
            with contextlib.suppress(*([RuntimeError] if name == "fp8_tflops" else [])):
                captured[name] = Captured(call, device)
        times = timer.interleaved(captured)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    found = {"launch_us": times["launch_us"].us}
    for name, moved in (("copy_gbps", 8.0), ("read_gbps", 4.0)):
        found[name] = moved * words / times[name].us / 1e3
    for name in times.keys() - found.keys():
        found[name] = 2.0 * n**3 / times[name].us / 1e6
    return Rates(**found)
