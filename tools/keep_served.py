"""Make the kept files from the results of tools/serve_on_gpu.sh.

    python tools/keep_served.py OUT docs/results [--machine docs/results/h200-bench.json]

OUT is the folder of these results. The logprobs are read from the output of ``tools/serve/compare.py OUT --json
OUT/compare.json``. ``--machine`` takes the machine from that kept file, if this is not the machine that served. Results
that OUT lacks are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import kept

from dsv4_backends import records
from dsv4_backends.bench.provenance import Measured, Provenance, provenance

COMMAND = "tools/serve_on_gpu.sh BUNDLE OUT {}"
LONGEST = 12
"""Kernels of a profile that are kept."""
RUNS = ("native", "chunks", "triton", "torch", "auto", "sm_80", "sm_86", "sm_89")
ORDER = (*RUNS, *(f"{run}-steps" for run in RUNS))


def runs_of(folder: Path, what: str) -> dict[str, dict[str, Any]]:
    """What ``serve.py`` wrote, by run."""
    found = {run: folder / f"{what}-{run}.json" for run in ORDER}
    return {run: json.loads(path.read_text(encoding="utf-8")) for run, path in found.items() if path.exists()}


def reported(log: Path) -> int | None:
    """Compilations that vLLM's monitor reported after the warm-up; None: it was off, or there is no log."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    _, active, rest = text.partition("JIT monitor activated")
    return rest.partition("\nwarm ")[2].count(" during inference: ") if active else None


def served(given: dict[str, Any]) -> dict[str, Any]:
    """The model of one run."""
    return {name: given["arguments"][name] for name in ("layers", "experts", "weights")}


def step_profile(what: str, found: dict[str, Any]) -> kept.StepProfile:
    times = sorted((kept.KernelTime(*each) for each in found["kernels"]), key=lambda each: -each.ms)
    return kept.StepProfile(what, found["steps"], round(sum(each.ms for each in times), 2), tuple(times[:LONGEST]))


def speed_run(folder: Path, run: str, found: dict[str, Any]) -> kept.SpeedRun:
    rows = tuple(
        kept.SpeedRow(**{f.name: row[f.name] for f in dataclasses.fields(kept.SpeedRow) if f.name in row})
        for row in found["rows"]
    )
    return kept.SpeedRun(
        run=run,
        start_s=found["start_s"],
        compiled_while_serving=tuple(found["compiled_while_serving"]),
        rows=rows,
        reported=reported(folder / f"speed-{run}.log"),
        odd=tuple(map(int, found.get("odd", ()))),
        profile=tuple(step_profile(what, each) for what, each in found.get("profile", {}).items()),
    )


def files(folder: Path, made: Provenance) -> dict[str, kept.Served]:
    """Each kept file by its name."""
    written: dict[str, kept.Served] = {}

    def by(what: str, runs: dict[str, Any]) -> dict[str, Any]:
        steps = " ".join(f"{what}:{run}" for run in runs)
        return {**made, "command": COMMAND.format(steps), **served(next(iter(runs.values())))}

    logprobs, compared = runs_of(folder, "logprobs"), folder / "compare.json"
    if logprobs and compared.exists():
        found = json.loads(compared.read_text(encoding="utf-8"))
        written["logprobs"] = kept.ServedLogprobs(
            **by("logprobs", logprobs),
            lengths=tuple(logprobs["native"]["arguments"]["lengths"]),
            noise=tuple(kept.ServedNoise(**row) for row in found["noise"]),
            pairs=tuple(kept.ServedDistance(**row) for row in found["rows"]),
            reference=tuple(kept.ReferenceDistance(**row) for row in found["reference"]),
        )
    if speed := runs_of(folder, "speed"):
        given = next(iter(speed.values()))["arguments"]
        written["speed"] = kept.ServedSpeed(
            **by("speed", speed),
            tp=given["tp"],
            input=given["input"],
            output=given["output"],
            passes=given["passes"],
            runs=tuple(speed_run(folder, run, found) for run, found in speed.items()),
        )
    mtp, long = runs_of(folder, "mtp"), runs_of(folder, "long")
    if mtp or long:
        made_by = by("mtp", mtp) if mtp else by("long", long)
        made_by["command"] = COMMAND.format(
            " ".join(f"{what}:{run}" for what, runs in (("mtp", mtp), ("long", long)) for run in runs)
        )
        written["once"] = kept.ServedOnce(
            **made_by,
            mtp=tuple(
                kept.MtpRun(run, len(found["tokens"]), len(found["tokens"][0]), found["seconds"])
                for run, found in mtp.items()
            ),
            long=tuple(
                kept.LongRun(run, found["prompt"], found["first_token_s"], found["peak_mib"])
                for run, found in long.items()
            ),
        )
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("kept", type=Path)
    parser.add_argument("--machine", type=Path, metavar="FILE")
    given = parser.parse_args()
    made = provenance("")
    if given.machine:
        made["machine"] = records.build(Measured, records.load(given.machine), str(given.machine)).machine
    written = files(given.out, made)
    for name, record in written.items():
        path = given.kept / f"h200-served-{name}.json"
        records.write(record, path)
        print(path, path.stat().st_size, "bytes")
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())
