"""How far the logprobs of runs of serve.py are from each other.

    compare.py FOLDER [--json FILE]      FOLDER: of logprobs-RUN.json, with native and chunks, perhaps torch

The noise is the distance of vLLM with its native libraries from itself: the mean over the pairs of a composition of
native and one of chunks, whose prefill chunks have 64 tokens. Within one run most tokens have the same bits in every
composition. Every composition of another run is compared with the same one of native; if there is a run torch, the
reference, every run also with it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

Scored = list[dict[str, Any]]


def distance(a: Scored, b: Scored) -> dict[str, float]:
    """Over all tokens of all prompts: mean and largest difference of logprobs, and how often the best token agrees."""
    differences, same = [], []
    for one, other in zip(a, b, strict=True):
        differences += [abs(x - y) for x, y in zip(one["logprobs"], other["logprobs"], strict=True)]
        same += [x == y for x, y in zip(one["best"], other["best"], strict=True)]
    return {
        "mean": round(statistics.mean(differences), 4),
        "max": round(max(differences), 3),
        "top1": round(statistics.mean(same), 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    names = ("usual", "moved", "alone")
    runs: dict[str, dict[str, Scored]] = {}
    for path in given.folder.glob("logprobs-*.json"):
        scored = json.loads(path.read_text())
        runs[path.stem.removeprefix("logprobs-")] = {name: scored[name] for name in names}
    pairs = [distance(a, b) for a, b in itertools.product(runs["native"].values(), runs["chunks"].values())]
    noise = {
        "mean": round(statistics.mean(pair["mean"] for pair in pairs), 4),
        "max": round(statistics.mean(pair["max"] for pair in pairs), 3),
        "top1": round(statistics.mean(pair["top1"] for pair in pairs), 4),
    }
    print("native from itself:", noise, [pair["mean"] for pair in pairs])
    rows = []
    for run in sorted(runs.keys() - {"native", "chunks"}):
        for name in names:
            found = distance(runs[run][name], runs["native"][name])
            rows.append({"run": run, "composition": name, **found, "ratio": round(found["mean"] / noise["mean"], 3)})
            print(rows[-1])
    reference = []
    for run in sorted(runs.keys() - {"torch"}) if "torch" in runs else ():
        means = [distance(runs[run][name], runs["torch"][name])["mean"] for name in names]
        reference.append({"run": run, "mean": round(statistics.mean(means), 4)})
        print("from the reference:", reference[-1])
    if given.json:
        found = {"noise": noise, "pairs": pairs, "rows": rows, "reference": reference}
        given.json.write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
