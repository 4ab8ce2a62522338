"""``dsv4-backends verify``: run the contracts' cases here and compare with the definition in fp64."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from .. import records
from ..bench.provenance import Measured, provenance
from ..contract import LEVELS, OPS
from ..selection import machine
from ..selection.machine import Machine
from ..testing.verify import Row
from .render import SCHEMA_VERSION, table
from .shared import FINDING, OK, AddCommand, AnsweredInterrupt, need_torch, progress, show, torch_device

LOG_SECONDS = 5.0
"""In a log, a line for the first case of an op, and later ones this far apart."""


def add(command: AddCommand) -> None:
    verify = command("verify", run, "run the contracts' cases here and compare with the definition in fp64")
    verify.add_argument("--op", action="append", choices=OPS, metavar="OP", help="only this op; may be repeated")
    verify.add_argument(
        "--provider",
        action="append",
        default=[],
        help="this provider; may be repeated; default: the selected ones",
    )
    verify.add_argument("--level", choices=LEVELS, default="smoke", help="how many cases (default: smoke)")
    verify.add_argument(
        "--torch-device", metavar="DEVICE", help="a torch device (default: the first GPU, else the CPU)"
    )


def run(args: argparse.Namespace) -> int:
    need_torch()
    from ..testing.verify import Interrupted, verify

    device = torch_device(args.torch_device)
    logged = -LOG_SECONDS

    def running(line: str) -> None:
        nonlocal logged
        now = time.monotonic()
        log = " 1/" in line or now - logged >= LOG_SECONDS
        logged = now if log else logged
        progress(line, log=log)

    def answer(rows: Sequence[Row], interrupted: bool) -> None:
        progress("")
        show(
            args,
            lambda: records.plain(report(rows, args.level, machine.probe(), interrupted)),
            lambda: text(rows, interrupted),
        )

    try:
        rows = verify(args.op or OPS, providers=args.provider, level=args.level, device=device, progress=running)
    except Interrupted as stopped:
        answer(stopped.rows, True)
        raise AnsweredInterrupt from stopped
    finally:
        progress("")
    answer(rows, False)
    return OK if rows and all(row.ok for row in rows) else FINDING


def text(rows: Sequence[Row], interrupted: bool = False) -> str:
    """Errors against tolerances: a share of 1 is the limit."""
    lines = []
    for row in rows:
        for index, (result, error) in enumerate(row.errors.items()):
            first = index == 0
            passed = f"{row.cases - len({f.partition(':')[0] for f in row.failures})}/{row.cases}"
            lines.append(
                (
                    row.op if first else "",
                    row.provider if first else "",
                    passed + (f", {row.refused} refused" if row.refused else "") if first else "",
                    result,
                    f"{error.share:.3g}",
                    f"{error.calc_diff:.2g}",
                    error.case,
                )
            )
        if not row.errors:
            lines.append((row.op, row.provider, f"0/{row.cases}, {row.refused} refused", "", "", "", ""))
    parts = [table(("OP", "PROVIDER", "PASSED", "RESULT", "SHARE OF TOLERANCE", "CALC_DIFF", "WORST CASE"), lines)]
    failures = [f"FAILED {row.op} {row.provider}: {failure}" for row in rows for failure in row.failures]
    empty = [f"FAILED {row.op} {row.provider}: refused every case" for row in rows if row.cases == 0]
    verdict = "failed" if failures or empty else "all passed"
    verdict = f"interrupted: not all cases ran{', and some failed' * bool(failures)}" if interrupted else verdict
    return "\n".join([*parts, "", *failures, *empty, verdict])


@dataclass(frozen=True, kw_only=True)
class Report(Measured):
    """What ``verify --json`` prints.

    Attributes:
        level: How many cases.
        ok: Whether all passed.
        interrupted: Whether not all ran.
        rows: One for each op and provider.
    """

    schema_version: int
    level: str
    ok: bool
    interrupted: bool
    rows: tuple[Row, ...]


def report(rows: Sequence[Row], level: str, machine: Machine, interrupted: bool = False) -> Report:
    return Report(
        **provenance(" ".join(["dsv4-backends", *sys.argv[1:]]), machine),
        schema_version=SCHEMA_VERSION,
        level=level,
        ok=bool(rows) and not interrupted and all(row.ok for row in rows),
        interrupted=interrupted,
        rows=tuple(rows),
    )
