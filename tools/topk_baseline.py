"""Time the top-k ops next to the two calls that they replace: the logits, then ``torch.topk``.

On the rows of ``bench``, as alternating graph replays, with the L2 cache flushed. The logits are those of the provider
that dispatch chooses, in a buffer of all columns. Both results are compared with the definition first.

Usage: python tools/topk_baseline.py [--op OP ...] [--only TEXT] [--seconds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path
from typing import Any

import torch
from kept import Topk, TopkRow

from dsv4_backends import ops, records
from dsv4_backends.bench import inputs, run, shapes, timing
from dsv4_backends.bench.provenance import provenance
from dsv4_backends.testing import checks

LOGITS = {"indexer_topk": "mqa_logits", "paged_indexer_topk": "paged_mqa_logits"}
SAMPLES = 15


def two_calls(op: str, made: dict[str, Any]) -> tuple[torch.Tensor]:
    """The indices, -1 where there is no key. Rows of ``bench`` begin at key 0."""
    given = {name: value for name, value in made.items() if name != "topk"}
    logits = getattr(ops, LOGITS[op])(**given)
    best = logits.topk(min(made["topk"], logits.shape[1]))  # sorted, so -inf is last
    return (torch.where(best.values == -torch.inf, -1, best.indices).int(),)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=LOGITS, default=list(LOGITS))
    parser.add_argument("--only", default="", help="rows whose name has this text")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no row after so many")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda")
    timer, started = timing.Timer(device, SAMPLES), time.perf_counter()
    rows: list[TopkRow] = []
    for row in shapes.rows((), 1, args.op):
        if args.only not in row.name or time.perf_counter() - started > args.seconds:
            continue
        made = inputs.draw(row, device)
        one_call = functools.partial(checks.subject("triton", row.op, device).run, made)
        wanted = {"triton": one_call, "two calls": functools.partial(two_calls, row.op, made)}
        calls = {name: timing.Captured(call, device) for name, call in wanted.items()}
        judge = run.Judge(row.op, made)
        wrong = {name: judge(call) for name, call in calls.items()}
        us = {name: taken.us for name, taken in timer.interleaved(calls).items()}
        if not any(wrong.values()):
            rows.append(TopkRow(row.op, row.name, us["triton"], us["two calls"]))
        errors = "  ".join(f"{name}: {text}" for name, text in wrong.items() if text)
        ratio = us["two calls"] / us["triton"]
        print(
            f"{row.op:18} {row.name:75} {us['triton']:10.1f} {us['two calls']:10.1f} {ratio:6.2f}  {errors}", flush=True
        )
        if args.json:
            records.write(Topk(**provenance("python tools/topk_baseline.py"), rows=tuple(rows)), args.json)
        del made, one_call, wanted, calls, judge
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
