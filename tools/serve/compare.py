"""How far the logprobs of runs of serve.py are from each other.

    compare.py FOLDER [--json FILE]      FOLDER: of logprobs-RUN.json, with native, perhaps chunks, native-steps, torch

The noise is the distance of vLLM with its native libraries from itself, with the batches composed in another way: in
chunks prefill chunks have 64 tokens; in native-steps a step takes one token of each prompt, so decode's kernels compute
what prefill's do in native. It is the mean over the pairs with native's own compositions, in which most tokens have the
same bits. Every composition of another run is compared with the same one of native, RUN-steps with native-steps; if
there is a run torch, the reference, every run also with it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

Scored = list[dict[str, Any]]


def distance(a: Scored, b: Scored) -> dict[str, float]:
    """Over all tokens of all prompts: mean and largest difference of logprobs, and how often the best token agrees."""
    differences, same = [], []
    for one, other in zip(a, b, strict=True):
        differences += [abs(x - y) for x, y in zip(one["logprobs"], other["logprobs"], strict=True)]
        same += [x == y for x, y in zip(one["best"], other["best"], strict=True)]
    return {
        "mean": round(mean(differences), 4),
        "max": round(max(differences), 3),
        "top1": round(mean(same), 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    runs: dict[str, dict[str, Scored]] = {}
    for path in given.folder.glob("logprobs-*.json"):
        scored = json.loads(path.read_text())
        found = {name: scored[name] for name in ("usual", "moved", "alone", "steps") if name in scored}
        runs.setdefault(path.stem.removeprefix("logprobs-").removesuffix("-steps"), {}).update(found)
    native = runs.pop("native")
    steps = {name: native.pop(name) for name in ("steps",) if name in native}
    noise = []
    for name, others in (("chunks", runs.pop("chunks", {})), ("steps", steps)):
        pairs = [distance(a, b) for a, b in itertools.product(native.values(), others.values())]
        if pairs:
            noise.append({"composition": name} | {key: round(mean(p[key] for p in pairs), 4) for key in pairs[0]})
            print("native from itself:", noise[-1], [pair["mean"] for pair in pairs])
    native |= steps
    rows = [
        {"run": run, "composition": name, **distance(scored, native[name])}
        for run, found in sorted(runs.items())
        for name, scored in found.items()
        if name in native
    ]
    for row in rows:
        print(row)
    reference = []
    for run, found in sorted({"native": native, **runs}.items()) if "torch" in runs else ():
        means = [distance(found[name], scored)["mean"] for name, scored in runs["torch"].items() if name in found]
        if run != "torch" and means:
            reference.append({"run": run, "mean": round(mean(means), 4)})
            print("from the reference:", reference[-1])
    if given.json:
        given.json.write_text(json.dumps({"noise": noise, "rows": rows, "reference": reference}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
