"""Time small calls of the Triton kernels next to kernels that only launch, or only make dependent reads.

Takes the rows of ``bench`` whose batch is at most 128. Graph replays alternate between the call and kernels with the
grids and warps of its launches: without a body, and with two or three dependent reads, each of which gets its address
from the one before (position, table, page). All with a cold L2 cache.
Usage, on a GPU: python tools/launch_floor.py [--op OP]... [--json FILE]
"""

from __future__ import annotations

import argparse
import functools
import sys
from typing import Any

import torch
import triton
import triton.language as tl
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
LINKS = 1 << 22


@triton.jit
def empty(x):
    pass


@triton.jit
def chained(links, out, reads: tl.constexpr):
    """``reads`` reads, each from the address that the one before it returned."""
    program = tl.program_id(0) + tl.program_id(1) * tl.num_programs(0)
    at = program.to(tl.int64)
    for _ in tl.static_range(reads):
        at = tl.load(links + at)
    tl.store(out + program, at)


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


def reading(launches: list[Launch], reads: int, links: torch.Tensor, out: torch.Tensor) -> None:
    """``reads`` dependent reads in the first launch, and one in each that follows, of what that has left."""
    for i, launch in enumerate(launches):
        chained[launch.grid](links, out, 1 if i else reads, num_warps=launch.options.get("num_warps", 4))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", choices=OPS, help="only this op; may be repeated")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    given = parser.parse_args(argv)
    device = torch.device("cuda", 0)
    timer, x = Timer(device), torch.zeros(1, device=device)
    links = torch.randperm(LINKS, device=device)
    out = torch.empty_like(links)
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
            "two": Captured(functools.partial(reading, launches, 2, links, out), device),
            "three": Captured(functools.partial(reading, launches, 3, links, out), device),
        }
        us = {name: taken.us for name, taken in timer.interleaved(calls).items()}
        rows.append(FloorRow(row.op, row.name, **us, launches=len(launches)))
        print(f"{row.op} {row.name}", *(f"{name} {value:.2f}" for name, value in us.items()), sep="  ", flush=True)
    if given.json:
        command = "python tools/launch_floor.py" + "".join(f" --op {op}" for op in given.op or ())
        records.write(Floor(**provenance(command), rows=tuple(rows)), given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
