"""What the adapters over DeepGEMM and FlashMLA add to calling the library directly, on a Hopper GPU.

For V4's sizes, of whichever library is installed. Two ways of using it are compared like with like: ``step``, where
lengths are promised to stay (``dsv4_backends.step()``; directly: metadata made beforehand), and ``call``, where
everything is made anew in every call (directly: metadata in the call).

GPU time: CUDA graphs of one and of nine calls, with a flush of the L2 before each call; the difference between the two,
over eight, without the flush. Host time: CPU time of the thread for eager calls, which other processes do not inflate.
``public`` is the same call through ``dsv4_backends.ops``.

Usage: python tools/native_overhead.py [--op OP] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import native_calls

from dsv4_backends import CONTRACTS, ops, step, use_providers
from dsv4_backends.machine import probe
from dsv4_backends.report import machine_json
from dsv4_backends.testing import checks

MORE, ROUNDS = 8, 21
HOST_CALLS, HOST_REPEATS = 60, 9
PROVIDERS = {op: "flash_mla" if op.startswith("sparse_mla") else "deep_gemm" for op in CONTRACTS}
MODES = ("step", "call")

PREFILL = {"s_kv": 32768, "invalid": "none"}
FLASH_ATTENTION, PRO_ATTENTION = {"h_q": 64, "topk": 640}, {"h_q": 128, "topk": 1152}
DECODE = {"s_q": 1, "topk": 128, "invalid": "none"}
ROWS: dict[str, dict[str, dict[str, Any]]] = {
    "sparse_mla_prefill": {
        f"{name} s_q={s_q}": {"s_q": s_q, **sizes, **PREFILL}
        for name, sizes in (
            ("flash", FLASH_ATTENTION),
            ("pro", PRO_ATTENTION),
            ("flash-swa", {"h_q": 64, "topk": 128}),
        )
        for s_q in (512, 4096)
    },
    "sparse_mla_decode": {
        f"{name} b={b}": {"b": b, "h_q": heads, "extra_topk": extra, **DECODE}
        for name, heads, extra in (("flash", 64, 512), ("pro", 128, 1024))
        for b in (1, 8, 32, 128)
    },
    "mqa_logits": {f"s_q={m} s_kv={n}": {"m": m, "n": n} for m, n in ((1024, 8192), (4096, 16384), (4096, 65536))},
    "paged_mqa_logits": {
        f"b={b} ctx={context}": {"b": b, "context": context, "lens": "full"}
        for b, context in ((1, 16384), (32, 16384), (128, 4096), (64, 65536))
    },
    "fp8_einsum": {
        f"{name} b={b}": {"b": b, "h": h, "r": 4096, "d": 1024}
        for name, h in (("flash", 8), ("pro", 16))
        for b in (1, 8, 32, 128, 4096)
    },
    "hc_prenorm_gemm": {
        f"{name} m={m} num_splits={splits}": {"m": m, "k": k, "num_splits": splits}
        for name, k in (("flash", 16384), ("pro", 28672))
        for m, splits in ((1, 32), (32, 32), (128, 32), (1024, 8), (8192, 1))
    },
}
"""The sizes that were measured when the libraries were first compared."""


def captured(run: Callable[[], Any], flush: torch.Tensor, count: int, mode: str) -> torch.cuda.CUDAGraph:
    """A graph of ``count`` flushes and calls; what is made once a step is made in the first of them."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), step() if mode == "step" else contextlib.nullcontext():
        for _ in range(count):
            flush.zero_()
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


def host_times(runs: dict[str, Callable[[], Any]], mode: str) -> dict[str, float]:
    """Microseconds of the calling thread for one eager call of each, interleaved."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(HOST_REPEATS + 1):
        for name, run in runs.items():
            with step() if mode == "step" else contextlib.nullcontext():
                run()
                torch.cuda.synchronize()
                start = time.thread_time()
                for _ in range(HOST_CALLS):
                    run()
                spent = time.thread_time() - start
            torch.cuda.synchronize()
            if repeat:
                times[name].append(spent / HOST_CALLS * 1e6)
    return {name: statistics.median(found) for name, found in times.items()}


def measure(op: str, case: str, params: dict[str, Any], mode: str, flush: torch.Tensor) -> dict[str, Any]:
    contract = CONTRACTS[op]
    made = contract.make(torch.device("cuda"), torch.Generator().manual_seed(0), **params)
    target = checks.subject(PROVIDERS[op], op, "cuda")
    if (reason := target.refusal(made)) is not None:
        raise native_calls.Unsupported(f"the adapter refuses: {reason}")
    fresh = mode == "call" and op in ("sparse_mla_decode", "paged_mqa_logits")
    direct = native_calls.prepare(op, made, fresh_metadata=fresh)
    public = getattr(ops, op)
    runs: dict[str, Callable[[], Any]] = {"direct": direct.run, "adapter": lambda: target.function(**made)}
    for run in runs.values():  # compiles
        run()
        run()
    torch.cuda.synchronize()
    gpu = gpu_times(runs, flush, mode)
    with use_providers({op: PROVIDERS[op]}):
        host = host_times({**runs, "public": lambda: public(**made)}, mode)
    return {
        "library": direct.library,
        "gpu_direct_us": gpu["direct"],
        "gpu_adapter_us": gpu["adapter"],
        "gpu_added_percent": 100 * (gpu["adapter"] / gpu["direct"] - 1),
        **{f"host_{name}_us": value for name, value in host.items()},
        "host_added_us": host["adapter"] - host["direct"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=ROWS, action="append")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    rows = []

    def keep() -> None:
        if arguments.json:
            result = {"command": "python tools/native_overhead.py", "date": time.strftime("%Y-%m-%d", time.gmtime())}
            result |= {"machine": machine_json(probe()), "rows": rows}
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")

    for op in arguments.op or ROWS:
        for case, params in ROWS[op].items():
            for mode in MODES:
                row: dict[str, Any] = {"op": op, "case": case, "mode": mode}
                try:
                    row |= measure(op, case, params, mode, flush)
                    shown = " ".join(f"{k} {v:.2f}" for k, v in row.items() if isinstance(v, float))
                except Exception as error:  # one failing row must not lose the others
                    row["error"] = shown = f"{type(error).__name__}: {' '.join(str(error).split())}"
                rows.append(row)
                print(f"{op:20} {case:30} {mode:4} {shown}", flush=True)
                keep()
                gc.collect()
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
