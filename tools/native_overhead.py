"""Measure what the adapters over DeepGEMM and FlashMLA add to a direct call of the library, on a Hopper GPU.

Runs the rows of ``bench`` of the installed libraries, in two modes:

- ``call``: everything is made again in every call; the direct call makes the schedule too.
- ``step``, for the ops with a schedule: the lengths keep their values. The adapter runs in ``dsv4_backends.step()``;
  the direct call gets a schedule made beforehand.

GPU time: from CUDA graphs of nine calls and of one, with the L2 cache flushed before each call. Their difference is
divided by eight, and the time of a flush, measured alike, is subtracted. The flush reads, since lines that it wrote
would be written back while a call is timed. Host time: CPU time of the thread for eager calls, in many short batches
that alternate between direct calls and the adapter's; the median of the batches. ``public`` is the same call through
``dsv4_backends.ops``. Both sides get what an engine has ready: result buffers if the library takes them, scales with
the tokens contiguous, and caches, keys and indices with the dimension for the head that the libraries need.

Only the adapter sets undefined logits to -inf: the paged and compressed ones, and the full ones of DeepGEMM 2.8 (2.5
does it itself for the full ones). In a ``call`` it also makes lengths and bounds safe.

Usage: python tools/native_overhead.py [--only PROVIDER] [--op OP] [--jobs N] [--json FILE]

With --jobs, as many processes first make every call once, so that DeepGEMM compiles its kernels side by side.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import native_calls
from kept import NativeOverhead, NativeRow

from dsv4_backends import CONTRACTS, ops, records, step, use_providers
from dsv4_backends.bench import inputs, shapes
from dsv4_backends.bench.provenance import provenance
from dsv4_backends.contract.arguments import ScalarArg, TensorArg
from dsv4_backends.contract.traffic import Row
from dsv4_backends.testing import checks

MORE, ROUNDS = 8, 21
HOST_CALLS, HOST_BATCHES = 20, 60
HOST_GPU_US = 20_000
"""Fewer calls of long kernels are queued: the time of the host for a call does not depend on them."""
PROVIDERS = {op: native.provider for op, native in native_calls.NATIVE.items()}
FLUSH_FLOATS = 64 << 20

ROWS = {op: {row.name: row for row in shapes.rows((), 1, (op,))} for op in native_calls.NATIVE}
"""The rows of ``bench`` of every op that has a library function."""


def captured(run: Callable[[], Any], flush: torch.Tensor, count: int, mode: str) -> torch.cuda.CUDAGraph:
    """A graph of ``count`` flushes and calls; what is made once a step is made in the first of them."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), step() if mode == "step" else contextlib.nullcontext():
        for _ in range(count):
            flush.amax()
            run()
    return graph


def gpu_times(runs: dict[str, Callable[[], Any]], flush: torch.Tensor, mode: str) -> dict[str, float]:
    """Microseconds of one call of each, interleaved."""
    runs = {**runs, "nothing": lambda: None}
    graphs = {(name, count): captured(run, flush, count, mode) for name, run in runs.items() for count in (1, 1 + MORE)}
    times: dict[tuple[str, int], list[float]] = {key: [] for key in graphs}
    for round_ in range(ROUNDS + 3):
        for key, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if round_ >= 3:
                times[key].append(start.elapsed_time(end) * 1e3)
    each = {
        name: (statistics.median(times[name, 1 + MORE]) - statistics.median(times[name, 1])) / MORE for name in runs
    }
    return {name: each[name] - each["nothing"] for name in runs if name != "nothing"}


def host_times(runs: dict[str, Callable[[], Any]], mode: str, calls: int) -> dict[str, float]:
    """Microseconds of the calling thread for one eager call of each, interleaved."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for batch in range(HOST_BATCHES):
        names.append(names.pop(0))  # none always follows the same other
        for name in names:
            run = runs[name]
            with step() if mode == "step" else contextlib.nullcontext():
                run()
                torch.cuda.synchronize()
                start = time.thread_time()
                for _ in range(calls):
                    run()
                spent = time.thread_time() - start
            torch.cuda.synchronize()
            if batch:
                times[name].append(spent / calls * 1e6)
    return {name: statistics.median(found) for name, found in times.items()}


def as_engines_have_it(row: Row, device: torch.device) -> dict[str, Any]:
    """A row's arguments in the layouts, and with the buffers, that an engine has before the step."""
    contract = CONTRACTS[row.op]
    made = {name: _with_head_dimension(contract.args[name], value) for name, value in inputs.draw(row, device).items()}
    if native_calls.NATIVE[row.op].buffers:
        results = contract.function(**made)
        results = results if isinstance(results, tuple) else (results,)
        made |= {name: result for name, result in zip(contract.returns, results, strict=True) if name in contract.args}
    return made


def _with_head_dimension(arg: TensorArg | ScalarArg, value: Any) -> Any:
    """A tensor in the form that has a dimension of 1 more, where the contract has one."""
    for form in arg.forms if isinstance(arg, TensorArg) else ():
        if value is not None and "1" in form.dims and value.dim() == len(form.dims) - 1:
            return value.unsqueeze(form.dims.index("1"))
    return value


def closures(op: str, made: dict[str, Any], mode: str) -> tuple[str, dict[str, Callable[[], Any]]]:
    """The library's name, and the call made directly and through the adapter."""
    target = checks.subject(PROVIDERS[op], op, "cuda")
    if (reason := target.refusal(made)) is not None:
        raise native_calls.Unsupported(f"the adapter refuses: {reason}")
    direct = native_calls.prepare(op, made, fresh_metadata=mode == "call")
    return direct.library, {"direct": direct.run, "adapter": lambda: target.function(**made)}


def measure(op: str, case: str, made: dict[str, Any], mode: str, flush: torch.Tensor) -> NativeRow:
    library, runs = closures(op, made, mode)
    for run in runs.values():  # what compiles, compiles here
        run()
        run()
    torch.cuda.synchronize()
    gpu = gpu_times(runs, flush, mode)
    public = getattr(ops, op)
    calls = max(5, min(HOST_CALLS, int(HOST_GPU_US / max(gpu.values()))))
    with use_providers({op: PROVIDERS[op]}):
        host = host_times({**runs, "public": lambda: public(**made)}, mode, calls)
    row = NativeRow(op, case, mode, gpu["direct"], gpu["adapter"], host["direct"], host["adapter"])
    print(
        f"{op:20} {case:30} {mode:4} {library}: GPU {row.gpu_direct_us:.2f} us, {row.gpu_added_percent:+.1f} %; host "
        f"{row.host_direct_us:.2f} us, {row.host_added_us:+.2f}, through dsv4_backends.ops {host['public']:.2f}",
        flush=True,
    )
    return row


def call_once(part: int, parts: int, rows: list[tuple[str, str]]) -> None:
    """Make every ``parts``-th call once; what cannot be called is reported when it is measured."""
    for op, case in rows[part::parts]:
        with contextlib.suppress(Exception):
            made = as_engines_have_it(ROWS[op][case], torch.device("cuda"))
            for run in closures(op, made, "call")[1].values():
                run()
            torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(set(PROVIDERS.values())), action="append", help="may be given twice")
    parser.add_argument("--op", choices=ROWS, action="append")
    parser.add_argument("--jobs", type=int, default=0)
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    chosen = [op for op in arguments.op or ROWS if PROVIDERS[op] in (arguments.only or PROVIDERS.values())]
    compiled = [(op, case) for op in chosen if native_calls.NATIVE[op].compiled for case in ROWS[op]]
    if arguments.part is not None:
        call_once(arguments.part, arguments.jobs, compiled)
        return
    if arguments.jobs:
        start = time.monotonic()
        command = [sys.executable, *sys.argv, "--part"]
        for child in [subprocess.Popen([*command, str(part)]) for part in range(arguments.jobs)]:
            child.wait()
        print(f"{len(compiled)} calls made once in {time.monotonic() - start:.0f} s", flush=True)
    flush = torch.zeros(FLUSH_FLOATS, device="cuda")
    rows: list[NativeRow] = []

    def keep(row: NativeRow) -> None:
        rows.append(row)
        if row.error:
            print(f"{row.op:20} {row.case:30} {row.mode:4} {row.error}", flush=True)
        if arguments.json:
            result = NativeOverhead(**provenance("python tools/native_overhead.py"), rows=tuple(rows))
            records.write(result, arguments.json)

    for op in chosen:
        for case, drawn in ROWS[op].items():
            made: dict[str, Any] = {}
            for mode in ("step", "call") if native_calls.NATIVE[op].planned else ("call",):
                try:
                    made = made or as_engines_have_it(drawn, torch.device("cuda"))
                    row = measure(op, case, made, mode, flush)
                except Exception as error:  # one failing row must not lose the others
                    row = NativeRow(op, case, mode, error=f"{type(error).__name__}: {' '.join(str(error).split())}")
                keep(row)
                gc.collect()
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
