"""Hugging Face transformers' DeepSeek V4 with and without the integration, on a GPU.

Flash dimensions with six layers (two sliding, two of ratio 4, two of ratio 128), random weights, bf16. The experts are
few and narrow (8 of width 512, 6 a token), so that they fit and do not dominate; both sides run the same ones. The
cache of the decode rows is drawn at random rather than filled by a prefill. Besides times and memory, some rows say
where the time goes (`kernels of ...`), and one compares each layer's attention block with eager (`check`).

Each side runs in a process of its own. A row that runs out of memory is a result like any other. After a crash the
remaining rows run in a new process. Usage:

    python tools/transformers_bench.py [--json FILE] [--only SIDE/ROW ...] [--small]

`--small` is a dry run with a tiny model, on the CPU too. Its times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROWS = {
    "eager": (
        "decode b=1",
        "decode b=32",
        "prefill 8192",
        "kernels of prefill 8192",
        "kernels of decode b=1",
        "kernels of decode b=32",
        "prefill 65536",
    ),
    "dsv4_backends": (
        "check 1024",
        "decode b=1",
        "decode b=32",
        "prefill 8192",
        "prefill 65536",
        "kernels of prefill 8192",
        "kernels of decode b=1",
        "kernels of decode b=32",
    ),
    "packed": ("decode b=1", "decode b=32", "kernels of decode b=1", "kernels of decode b=32"),
}
WANTED = [f"{side}/{row}" for side, rows in ROWS.items() for row in rows]
MODEL = "six layers (ratios 0, 0, 4, 128, 4, 128), Flash dimensions, 8 experts of width 512, random weights"
CHILD_SECONDS = 150
PREFILL_REPEATS = 3
GO_ON = 3  # exit code: a row failed and was printed, but it may have broken CUDA for this process


def make_config(small: bool) -> Any:
    from transformers.models.deepseek_v4 import DeepseekV4Config

    yarn = {"rope_type": "yarn", "factor": 16.0, "beta_fast": 32, "beta_slow": 1}
    values: dict[str, Any] = {
        "num_hidden_layers": 6,
        "compress_ratios": [0, 0, 4, 128, 4, 128],
        "n_routed_experts": 8,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 512,
        "rope_parameters": {**yarn, "original_max_position_embeddings": 65536},
    }
    if small:
        values |= {"vocab_size": 64, "hidden_size": 64, "moe_intermediate_size": 32, "num_attention_heads": 4}
        values |= {"q_lora_rank": 32, "o_groups": 2, "o_lora_rank": 128, "index_n_heads": 8, "index_topk": 16}
    return DeepseekV4Config(**values)


class Bench:
    """One side: its model, and its rows."""

    def __init__(self, side: str, small: bool) -> None:
        import torch
        from transformers.models.deepseek_v4 import DeepseekV4ForCausalLM

        self.torch, self.side, self.small = torch, side, small
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.config = make_config(small)
        self.context = 512 if small else 32768
        self.decode_steps = 1 if small else 16
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with self.device:  # parameters are made and drawn where they stay
                self.model = DeepseekV4ForCausalLM(self.config).eval()
        finally:
            torch.set_default_dtype(before)
        for name, buffer in self.model.named_buffers():
            if name.endswith("tid2eid"):
                buffer.random_(0, self.config.n_routed_experts)
        for name, module in self.model.named_modules():
            if name.endswith(("attn_hc", "ffn_hc", "hc_head", "rotary_emb")):
                module.float()  # as a checkpoint has them
        self.compiled = 0  # Triton kernels so far: a row whose times have some in them is no measurement
        with contextlib.suppress(ImportError):
            import triton

            triton.knobs.compilation.listener = self.count_compiled
        self.parts: tuple[Any, ...] = ()
        if side != "eager":
            from dsv4_backends.engines import transformers as engine

            self.parts = engine.enable(self.model)

    def count_compiled(self, *, cache_hit: bool, **_: Any) -> None:
        self.compiled += not cache_hit

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()

    def timed(self, function: Callable[[], Any]) -> float:
        self.synchronise()
        start = time.perf_counter()
        function()
        self.synchronise()
        return time.perf_counter() - start

    def tokens(self, batch: int, length: int) -> Any:
        return self.torch.randint(0, self.config.vocab_size, (batch, length), device=self.device)

    def one_prefill(self, length: int) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.config)
        ids = self.tokens(1, min(length // 128, 128) if self.small else length)
        return self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    def prefill(self, length: int) -> dict[str, Any]:
        torch, run = self.torch, lambda: self.one_prefill(length)
        first = self.timed(run)  # compiles kernels, and runs out of memory if it has to
        base = peak = 0
        if self.device.type == "cuda":
            base = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        compiled = self.compiled
        seconds = sorted(self.timed(run) for _ in range(PREFILL_REPEATS))
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        return {
            "seconds": seconds[len(seconds) // 2],
            "all_seconds": seconds,
            "first_seconds": first,
            "compiled_while_timed": self.compiled - compiled,
            "peak_extra_bytes": peak - base,
            "model_bytes": base,
            "finite": bool(torch.isfinite(run()).all()),
        }

    def kernels(self, row: str) -> dict[str, Any]:
        """Which kernels take the time of one call, by the profiler."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        kind, _, value = row.partition(" ")
        batch = int(value.removeprefix("b=")) if kind == "decode" else 0
        cache = self.cache(batch, self.context) if batch else None

        def run() -> None:
            if cache is None:
                self.one_prefill(int(value))
            else:
                self.model(self.tokens(batch, 1), past_key_values=cache, use_cache=True)

        run()
        on_gpu = self.device.type == "cuda"
        activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
        with profile(activities=[activity]) as profiler:
            run()
            self.synchronise()
        attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        # The calls of the CUDA runtime, which launch the kernels, are events too.
        events = [event for event in profiler.key_averages() if (event.device_type != DeviceType.CPU) == on_gpu]
        found = [(getattr(event, attribute), event.count, event.key[:100]) for event in events]
        top = sorted(found, reverse=True)[:25]
        return {
            "milliseconds": sum(time for time, _, _ in found) / 1000,
            "launches": sum(count for _, count, _ in found),
            "kernels": [{"milliseconds": t / 1000, "launches": count, "name": name} for t, count, name in top],
        }

    def check(self, length: int) -> dict[str, Any]:
        """Each layer's attention block against eager's, on the inputs that eager gave it; without FP8, as eager is.

        Few enough tokens for the indexer to select everything: else a tie could select another key.
        """
        from dsv4_backends.engines import transformers as engine

        ids = self.tokens(1, 48 if self.small else length)
        blocks = [layer.self_attn for layer in self.model.model.layers]
        inputs: list[Any] = []
        results: list[list[Any]] = [[], []]

        def keep(into: list[Any]) -> Callable[..., None]:
            def hook(module: Any, args: Any, result: Any) -> None:
                into.append(result[0])
                inputs.append(args[0])

            return hook

        def feed(module: Any, args: Any) -> Any:
            return (inputs[blocks.index(module)], *args[1:])

        for enabled in (False, True):
            engine.disable(self.model)
            if enabled:
                engine.enable(self.model, fp8=False)
            hooks = [block.register_forward_hook(keep(results[enabled])) for block in blocks]
            if enabled:
                hooks += [block.register_forward_pre_hook(feed) for block in blocks]
            self.model(ids, use_cache=False)
            for hook in hooks:
                hook.remove()
            if not enabled:
                engine.enable(self.model)
        engine.disable(self.model)
        engine.enable(self.model)
        errors = [
            float((ours.float() - eager.float()).norm() / eager.float().norm())
            for eager, ours in zip(*results, strict=True)
        ]
        return {"relative_errors": errors, "worst_relative_error": max(errors)}

    def cache(self, batch: int, context: int) -> Any:
        """A cache that has seen ``context`` tokens, with random keys."""
        from transformers import DynamicCache

        torch, config = self.torch, self.config
        packed = self.side == "packed"

        def draw(*shape: int) -> Any:
            return torch.randn(*shape, device=self.device, dtype=torch.bfloat16)

        if packed:
            from dsv4_backends.engines import transformers as engine

            cache = engine.packed_cache(self.model)
        else:
            cache = DynamicCache(config=config)
        for layer, kind in zip(cache.layers, config.layer_types, strict=True):
            window = draw(batch, 1, config.sliding_window - 1, config.head_dim)
            layer.cumulative_length = context - window.shape[2]
            if packed:
                layer.update(window, window)
            else:
                layer.lazy_initialization(window, window)
                layer.keys = layer.values = window
                layer.cumulative_length = context
            if kind == "sliding_attention":
                continue
            rate = config.compress_rates[kind]
            dims = {"compressor": config.head_dim}
            if kind == "compressed_sparse_attention":
                dims["indexer"] = config.index_head_dim
            for name, d in dims.items():
                entries = draw(batch, context // rate, d)
                if packed:
                    layer.append(name, entries, 64 if rate == 4 else 2)
                else:
                    layer.compressed_kv[name] = entries
                layer.entry_count[name] = context // rate
                if kind == "compressed_sparse_attention":
                    layer.overlap_kv[name] = draw(batch, rate, d)
                    layer.overlap_gate[name] = draw(batch, rate, d)
        return cache

    def decode(self, batch: int) -> dict[str, Any]:
        torch = self.torch
        base = torch.cuda.memory_allocated() if self.device.type == "cuda" else 0
        cache = self.cache(batch, self.context)
        held = (torch.cuda.memory_allocated() - base) if self.device.type == "cuda" else 0
        ids = self.tokens(batch, 1)

        def steps(count: int) -> Any:
            for _ in range(count):
                logits = self.model(ids, past_key_values=cache, use_cache=True).logits
            return logits

        first = self.timed(lambda: steps(1))
        steps(4)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        compiled = self.compiled
        seconds = sorted(self.timed(lambda: steps(self.decode_steps)) / self.decode_steps for _ in range(3))
        peak = torch.cuda.max_memory_allocated() - base if self.device.type == "cuda" else 0
        return {
            "batch": batch,
            "context": self.context,
            "seconds": seconds[1],
            "all_seconds": seconds,
            "first_seconds": first,
            "compiled_while_timed": self.compiled - compiled,
            "cache_bytes": held,
            "peak_extra_bytes": peak,
            "host_waits_per_step": self.waits(lambda: steps(1)),
            "finite": bool(torch.isfinite(steps(1)).all()),
        }

    def waits(self, function: Callable[[], Any]) -> int:
        """How often a call makes the host wait for the GPU."""
        if self.device.type != "cuda":
            return 0
        self.synchronise()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.torch.cuda.set_sync_debug_mode("warn")
            try:
                function()
            finally:
                self.torch.cuda.set_sync_debug_mode("default")
        return sum("called a synchronizing" in str(warning.message) for warning in caught)

    def row(self, name: str) -> dict[str, Any]:
        kind, _, value = name.partition(" ")
        if kind == "kernels":
            return self.kernels(value.removeprefix("of "))
        if kind == "check":
            return self.check(int(value))
        if kind == "prefill":
            return self.prefill(int(value))
        return self.decode(int(value.removeprefix("b=")))


def child(side: str, rows: list[str], small: bool) -> None:
    """Run rows of one side; print a line of JSON before and after each."""
    import torch

    from dsv4_backends import stats

    start = time.perf_counter()
    bench = Bench(side, small)
    started = {"start": side, "build_seconds": time.perf_counter() - start, "parts": [str(p) for p in bench.parts]}
    print(json.dumps(started), flush=True)
    for name in rows:
        before = stats()
        start = time.perf_counter()
        try:
            with torch.no_grad():
                result: dict[str, Any] = {"outcome": "ran", **bench.row(name)}
        except torch.OutOfMemoryError as error:
            result = {"outcome": "out of memory", "message": str(error).partition(". ")[0]}
        except Exception as error:
            result = {"outcome": "error", "message": f"{type(error).__name__}: {error}"[:600]}
        result["row_seconds"] = time.perf_counter() - start
        calls = {op: {p: n - before.get(op, {}).get(p, 0) for p, n in counts.items()} for op, counts in stats().items()}
        served = {op: {p: n for p, n in counts.items() if n} for op, counts in calls.items()}
        result["served"] = {op: counts for op, counts in served.items() if counts}
        print(json.dumps({"side": side, "row": name, **result}), flush=True)
        if result["outcome"] == "error" and bench.device.type == "cuda":
            sys.exit(GO_ON)
        gc.collect()  # what a failed row's frames held
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def run_side(side: str, rows: list[str], small: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """All rows of a side, in as many processes as it takes; and the replaced parts, in words."""
    done: list[dict[str, Any]] = []
    parts: list[str] = []
    while rows:
        command = [sys.executable, __file__, "--child", side, *rows, *(["--small"] if small else [])]
        env = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**env, **os.environ}
        )
        try:
            out, errors = process.communicate(timeout=CHILD_SECONDS)
            why = f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            process.kill()
            out, errors = process.communicate()
            why = f"stopped after {CHILD_SECONDS} s"
        for line in out.splitlines():
            if line.startswith("{"):
                found = json.loads(line)
                if "row" in found:
                    done.append(found)
                    rows = [row for row in rows if row != found["row"]]
                else:
                    parts = found["parts"]
        if rows and process.returncode != GO_ON and (process.returncode or not out):
            lost, *rows = rows
            tail = " | ".join(errors.strip().splitlines()[-4:])
            done.append({"side": side, "row": lost, "outcome": "crashed", "message": f"{why}: {tail}"[:1200]})
    return done, parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="+", choices=WANTED, default=WANTED, metavar="SIDE/ROW")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], args.child[1:], args.small)
        return
    import kept

    from dsv4_backends import records
    from dsv4_backends.bench.provenance import provenance

    rows: list[kept.ModelRow] = []
    start = time.perf_counter()
    for side in ROWS:
        wanted = [name.partition("/")[2] for name in args.only if name.startswith(f"{side}/")]
        done, parts = run_side(side, wanted, args.small)
        for row in done:
            shown = {key: value for key, value in row.items() if key not in ("side", "row")}
            print(f"{row['side']}/{row['row']}: {json.dumps(shown)}", flush=True)
        rows += [records.build(kept.ModelRow, row, f"{side}/{row['row']}") for row in done]
        result = kept.ModelRuns(
            **provenance(f"python tools/transformers_bench.py{' --small' if args.small else ''}"),
            transformers=importlib.metadata.version("transformers"),
            model=MODEL,
            complete=len(rows) == len(args.only),
            rows=tuple(rows),
        )
        print(*parts, sep="\n", flush=True)
        if args.json:  # after each side: a run that is stopped keeps what it has
            records.write(result, args.json)
    print(json.dumps(result.figures, indent=1), f"{time.perf_counter() - start:.0f} s", sep="\n")


if __name__ == "__main__":
    main()
