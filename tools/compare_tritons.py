"""Keep how the times of ``dsv4-backends bench`` move from one release of Triton to another.

dsv4-backends bench --json before.json       with one Triton
dsv4-backends bench --json after.json        with another, on the same GPU and of the same commit
python tools/compare_tritons.py before.json after.json docs/results/h200-triton-times.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import kept

from dsv4_backends import records
from dsv4_backends.bench import compare, results, tune
from dsv4_backends.selection import preferences
from dsv4_backends.selection.capability import sm


def of_both(before: results.Result, after: results.Result) -> kept.TritonTimes:
    """Every row and provider that has a time in both."""
    table = preferences.read(preferences.FOLDER / f"{sm(after.device.capability)}.json")
    of = [f"commit {one.commit}, {one.device.name}" for one in (before, after)]
    if of[0] != of[1]:
        raise ValueError(f"expected two results of one commit and GPU, got {of[0]} and {of[1]}")
    return kept.TritonTimes(
        command="python tools/compare_tritons.py BEFORE AFTER OUT",
        date=after.date,
        commit=after.commit,
        machine=after.machine,
        choice=results.verdict(tune.chosen(table, after).rows),
        before=before.machine.packages["triton"],
        rows=tuple(
            kept.TimeMove(one.op, one.row, one.provider, one.before, one.after)
            for one in compare.compare(before, after)
            if one.before and one.after
        ),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    records.write(of_both(results.read(given.before), results.read(given.after)), given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
