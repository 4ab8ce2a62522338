"""How far small calls of the Triton kernels are from an empty kernel of the same grid.

Takes the rows of ``bench`` whose batch is at most 128. Graph replays alternate between the call and, for each of its
launches, a kernel without a body that has the launch's grid and warps.
Usage, on a GPU: python tools/launch_floor.py [--op OP]... [--json FILE]
"""

from __future__ import annotations

import argparse
import functools
import sys
from typing import Any

import torch
import triton
from dsv4_backend_triton.arch import arch_of
from dsv4_backend_triton.launch import Launch, recording
from kept import Floor, FloorRow

from dsv4_backends import CONTRACTS, OPS, records
from dsv4_backends.bench import inputs, shapes
from dsv4_backends.bench.provenance import provenance
from dsv4_backends.bench.timing import Captured, Timer
from dsv4_backends.contract.models import MODELS
from dsv4_backends.testing import checks

MOST = 128
"""Rows of the batch."""


@triton.jit
def empty(x):
    pass


def recorded(subject: checks.Subject, arguments: dict[str, Any]) -> list[Launch]:
    """The launches of a call, from tensors without storage."""
    bare = {
        name: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        if isinstance(value, torch.Tensor)
        else value
        for name, value in arguments.items()
    }
    launches: list[Launch] = []
    with recording(launches.append, arch_of(subject.device)):
        subject.run(bare)
    return launches


def hollow(launches: list[Launch], x: torch.Tensor) -> None:
    for launch in launches:
        empty[launch.grid](x, num_warps=launch.options.get("num_warps", 4))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", choices=OPS, help="only this op; may be repeated")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    given = parser.parse_args(argv)
    device = torch.device("cuda", 0)
    timer, x = Timer(device), torch.zeros(1, device=device)
    rows = []
    for row in shapes.rows(tuple(MODELS), 1, given.op or OPS):
        arguments = inputs.draw(row, device)
        if len(arguments[CONTRACTS[row.op].batch]) > MOST:
            continue
        subject = checks.subject("triton", row.op, device)
        launches = recorded(subject, arguments)
        calls = {
            "call": Captured(functools.partial(subject.run, arguments), device),
            "empty": Captured(functools.partial(hollow, launches, x), device),
        }
        taken = timer.interleaved(calls)
        rows.append(FloorRow(row.op, row.name, taken["call"].us, taken["empty"].us, len(launches)))
        print(f"{row.name:60} {taken['call'].us:7.2f} us, empty {taken['empty'].us:6.2f}", flush=True)
    if given.json:
        command = "python tools/launch_floor.py" + "".join(f" --op {op}" for op in given.op or ())
        records.write(Floor(**provenance(command), rows=tuple(rows)), given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
