"""``dsv4-backends tune``: make the table of the measured choice."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from ..selection import preferences
from . import render
from .shared import OK, AddCommand, require_writable, show, write


def add(command: AddCommand) -> None:
    tune = command("tune", run, "make the table of the measured choice from results of bench")
    tune.add_argument("results", nargs="+", metavar="RESULT", help="files that bench --json wrote, of one architecture")
    tune.add_argument("--output", metavar="FILE", help="write the table there")


def run(args: argparse.Namespace) -> int:
    from ..bench import compare, tune

    if args.output is not None:
        require_writable("--output", args.output)
    read = [compare.read(path) for path in args.results]
    with compare.understood(*args.results):
        table = tune.tune(read)
    if args.output is not None:
        write("--output", args.output, json.dumps(table, indent=1) + "\n")
    show(args, lambda: table, lambda: text(table))
    return OK


def text(table: Mapping[str, Any]) -> str:
    """The table's preferences, a line each."""
    rows = [(p.op, p.where, p.prefer, p.over, f"{p.ratio:.2f}") for p in preferences.parse(table)]
    if not rows:
        return "nothing to prefer: on every row the provider that ranks first is the fastest, or near it"
    return render.table(("OP", "WHERE", "PREFER", "OVER", "AT LEAST"), rows)
