"""``dsv4-backends tune``: make the table of the measured choice."""

from __future__ import annotations

import argparse

from .. import records
from ..selection import preferences
from . import render
from .shared import OK, AddCommand, require_writable, show, write


def add(command: AddCommand) -> None:
    tune = command("tune", run, "make the table of the measured choice from results of bench")
    tune.add_argument("results", nargs="+", metavar="RESULT", help="files that bench --json wrote, of one architecture")
    tune.add_argument("--output", metavar="FILE", help="write the table there")


def run(args: argparse.Namespace) -> int:
    from ..bench import results, tune

    if args.output is not None:
        require_writable("--output", args.output)
    given = [results.read(path) for path in args.results]
    table = tune.tune(given)
    verdict = results.verdict(row for result in given for row in tune.chosen(table, result).rows)
    if args.output is not None:
        write("--output", args.output, records.text(table))
    show(args, lambda: records.plain(table), lambda: f"{text(table)}\n\n{verdict}")
    return OK


def text(table: preferences.Table) -> str:
    """The table's preferences, a line each."""
    rows = [(p.op, p.where, p.prefer, p.over, p.ratios) for p in table.named]
    if not rows:
        return "nothing to prefer: on every row the provider that comes first is the fastest, or near it"
    return render.table(("OP", "WHERE", "PREFER", "OVER", "AT LEAST"), rows)
