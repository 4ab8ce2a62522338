"""``dsv4-backends tune``: make the table of the measured choice."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..selection import preferences
from . import render
from .shared import OK, AddCommand, show


def add(command: AddCommand) -> None:
    tune = command("tune", run, "make the table of the measured choice from results of bench")
    tune.add_argument("results", nargs="+", metavar="RESULT", help="files that bench --json wrote, of one architecture")
    tune.add_argument("--output", metavar="FILE", help="write the table there")


def run(args: argparse.Namespace) -> int:
    from ..bench import compare, tune

    table = tune.tune([compare.read(path) for path in args.results])
    if args.output:
        Path(args.output).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    show(args, lambda: table, lambda: text(table))
    return OK


def text(table: Mapping[str, Any]) -> str:
    """The table's preferences, a line each."""
    rows = [(p.op, p.where, p.prefer, p.over, f"{p.ratio:.2f}") for p in preferences.parse(table)]
    if not rows:
        return "nothing to prefer: on every row the provider that ranks first is the fastest, or near it"
    return render.table(("OP", "WHERE", "PREFER", "OVER", "AT LEAST"), rows)
