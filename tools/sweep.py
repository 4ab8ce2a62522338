"""Find faster launch configurations of the Triton provider's kernels on this GPU, and write them into its tables.

A candidate is a row of an op's table with one value changed. It is timed on the calls of ``bench`` whose launches it
changes. On each call the replays of all candidates, the present configuration and the native libraries alternate. Then
results are compared with the definition, and a candidate with a wrong one is left out. Usage:

    python tools/sweep.py OP [OP ...] [--model NAME ...] [--tp N ...] [--jobs N] [--json FILE] [--write]

--write puts into each row of the table what was fastest over the calls that the row decides; run it again until it
changes nothing. With --jobs, as many processes first make every call once, so that Triton compiles side by side. With
DSV4_BACKENDS_DEVICE=sm_80 (or another), the candidates are those of that architecture, run on this GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from dsv4_backend_triton import ahead, configurations, variants
from dsv4_backend_triton.arch import Arch, arch_of

from dsv4_backends import records
from dsv4_backends.bench import inputs, run, shapes, timing
from dsv4_backends.bench.provenance import provenance
from dsv4_backends.bench.shapes import Row
from dsv4_backends.errors import NoProviderError
from dsv4_backends.selection import plugins
from dsv4_backends.selection.provider import Tier
from dsv4_backends.testing import checks

PRESENT = "as the table says"
SAMPLES, SHOWN = 25, 6
GAIN = 0.99
"""Of the present time; what saves less is noise."""
MEASURED = ("kib",)
"""Values that follow from the compiled kernel, and are no choice."""


class Candidate(NamedTuple):
    """The ``place``-th row of an op's table with another configuration."""

    place: int
    config: dict[str, Any]


def neighbours(rows: list[dict[str, Any]], place: int) -> Iterator[dict[str, Any]]:
    """The configuration of a row with one value changed: to what another row of the variant has, or a step away."""
    here = rows[place]
    for name, value in here["config"].items():
        if name in MEASURED:
            continue
        others = [row["config"][name] for row in rows if row["variant"] == here["variant"] and name in row["config"]]
        if isinstance(value, bool):
            others.append(not value)
        elif isinstance(value, int):
            power = value & (value - 1) == 0
            others += [value // 2, value * 2] if power else [value - 8, value + 8] if value % 8 == 0 else []
            others += [value - 1, value + 1] if value < 16 else []
        for other in dict.fromkeys(others):
            if other != value and (isinstance(other, bool | str) or other > 0):
                yield {**here["config"], name: other}


def _forget(op: str) -> None:
    """Drop the plans that were made from the tables."""
    folder = f"{variants.__package__}.{variants.OPS[op].folder}."
    kept = [value for name, module in sys.modules.items() if name.startswith(folder) for value in vars(module).values()]
    for function in (variants._choices, *kept):
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@contextlib.contextmanager
def applied(op: str, candidate: Candidate) -> Iterator[None]:
    """Within the block, the table has the candidate."""
    row = configurations.table(op)["rows"][candidate.place]
    present = row["config"]
    try:
        row["config"] = candidate.config
        _forget(op)
        yield
    finally:
        row["config"] = present
        _forget(op)


def launched(op: str, arguments: dict[str, Any], arch: Arch) -> str:
    """Everything that a call launches: kernels, grids, constants, options and numbers."""
    without = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    launches = list(ahead.record(op, [without], arch))
    numbers = [[v for v in one.arguments.values() if isinstance(v, int)] for one in launches]
    boxes = [[getattr(v, "block_shape", None) for v in one.arguments.values()] for one in launches]
    return str([(one.kernel, one.grid, one.constants, one.options) for one in launches]) + str(numbers) + str(boxes)


def candidates(op: str, arguments: dict[str, Any], arch: Arch) -> dict[str, Candidate]:
    """Those that change what the call launches, each by another name; one that repeats another's launches is left
    out."""
    rows = configurations.table(op)["rows"]
    seen, found = {launched(op, arguments, arch)}, {}
    for place, row in enumerate(rows):
        where = " ".join([row["variant"], row.get("role", ""), f"up to {row['up_to']}" if "up_to" in row else ""])
        for config in neighbours(rows, place):
            candidate = Candidate(place, config)
            with applied(op, candidate), contextlib.suppress(Exception):  # a tile that no plan can be made of
                code = launched(op, arguments, arch)
                if code not in seen:
                    seen.add(code)
                    found[f"{' '.join(where.split())}: {json.dumps(config)}"] = candidate
    return found


def calls(op: str, models: list[str], sizes: Iterable[int]) -> list[Row]:
    """The op's rows of ``bench`` on ranks of some tensor parallel sizes."""
    found = {row.name: row for tp in sizes for row in shapes.rows(models, tp, [op])}
    return list(found.values())


def natives(op: str) -> list[str]:
    """The providers that are hand-written for an architecture and have the op."""
    specs = plugins.load().providers
    return [p.name for p in specs if p.tier == Tier.NATIVE and any(i.op == op for i in p.implementations)]


def call_once(part: int, parts: int, rows: list[Row], device: torch.device) -> None:
    """Make every ``parts``-th candidate's call once. Its errors are shown when it is measured."""
    for row in rows:
        made = inputs.draw(row, device)
        function = checks.subject("triton", row.op, device).function
        for candidate in list(candidates(row.op, made, arch_of(device)).values())[part::parts]:
            with applied(row.op, candidate), contextlib.suppress(Exception):
                function(**made)
        torch.cuda.synchronize()


def measure(row: Row, made: dict[str, Any], tried: dict[str, Candidate], timer: timing.Timer) -> dict[str, Any]:
    ours = checks.subject("triton", row.op, timer.device).function
    judge = run.Judge(row.op, made)  # before any call: some ops write into their arguments
    named = {PRESENT: ours}
    for name in natives(row.op):
        with contextlib.suppress(NoProviderError):
            named[name] = checks.subject(name, row.op, timer.device).function

    def tupled(results: Any) -> tuple[Any, ...]:
        return results if isinstance(results, tuple) else (results,)

    def trial(candidate: Candidate) -> Callable[[], Any]:
        def call() -> Any:
            with applied(row.op, candidate):
                return tupled(ours(**made))

        return call

    captured: dict[str, timing.Captured] = {}
    errors: dict[str, str] = {}
    for name, function in named.items():
        captured[name] = timing.Captured(lambda f=function: tupled(f(**made)), timer.device)
    for name, candidate in tried.items():
        try:
            trial(candidate)()  # before the capture: it may not fit, or not compile
            captured[name] = timing.Captured(trial(candidate), timer.device)
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    times = {name: taken.us for name, taken in timer.interleaved(captured).items()}
    errors |= {name: wrong for name in sorted(set(times) - set(named)) if (wrong := judge(captured[name]))}
    best = min((name for name in times if name in tried and name not in errors), key=times.__getitem__, default=None)
    return {"op": row.op, "row": row.name, "best": best, "us": times, "errors": errors}


class Measured(NamedTuple):
    """What was measured on one call: the candidates that changed its launches, and the times of the right ones."""

    tried: dict[str, Candidate]
    us: dict[str, float]


def retuned(op: str, measured: Iterable[Measured]) -> list[Candidate]:
    """For each row of the table that has one, the configuration that is faster over all calls that the row decides.

    A call that a candidate does not change takes its present time. What failed or was wrong on one call is left out.
    """
    found = []
    for place in range(len(configurations.table(op)["rows"])):
        decided = [one for one in measured if any(c.place == place for c in one.tried.values())]
        tried = {name: c for one in decided for name, c in one.tried.items() if c.place == place}

        def cost(name: str, decided: list[Measured] = decided) -> float:
            times = [one.us.get(name, math.inf if name in one.tried else one.us[PRESENT]) for one in decided]
            ratios = [us / one.us[PRESENT] for us, one in zip(times, decided, strict=True)]
            return math.exp(sum(map(math.log, ratios)) / len(ratios)) if math.inf not in ratios else math.inf

        best = min(tried, key=cost, default=None)
        if best is not None and cost(best) < GAIN:
            found.append(tried[best])
    return found


def with_measured_values(op: str, candidate: Candidate, arguments: Iterable[dict[str, Any]], arch: Arch) -> Candidate:
    """The candidate with its kernel's KiB of shared memory, where its row has them."""
    if "kib" not in candidate.config:
        return candidate
    heads, keys = candidate.config["heads"], candidate.config["keys"]
    with applied(op, candidate):
        launches = [one for one in ahead.record(op, arguments, arch) if one.constants.get("HEADS") == heads]
        shared = [one.compile().metadata.shared for one in launches if one.constants.get("KEYS") == keys]
    return candidate._replace(config={**candidate.config, "kib": -(-max(shared) // 1024)})


def write_table(op: str, found: Iterable[Candidate], source: dict[str, str]) -> None:
    table = configurations.table(op)
    key = f"{source['gpu']} {source['date']}"
    table["sources"][key] = source
    for place, config in found:
        table["rows"][place] |= {"source": key, "config": config}
    used = {row["source"] for row in table["rows"]}
    sources = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in table["sources"].items() if k in used)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in table["rows"])
    path = configurations.TABLES / f"{op}.json"
    path.write_text(f'{{\n "sources": {{\n{sources}\n }},\n "rows": [\n{rows}\n ]\n}}\n', encoding="utf-8")
    configurations.table.cache_clear()
    _forget(op)


def shown(result: dict[str, Any]) -> str:
    us, errors = result["us"], result["errors"]
    fixed = [PRESENT, *natives(result["op"])]
    lines = [f"{result['op']} {result['row']}"]
    for name in sorted(us, key=us.__getitem__):
        if name in fixed or len(lines) <= SHOWN:
            mark = "best " if name == result["best"] else "WRONG" if name in errors else "     "
            lines.append(f"  {us[name]:8.1f} us  {us[PRESENT] / us[name]:.2f}  {mark}  {name}")
    failed = [name for name in errors if name not in us]
    return "\n".join([*lines, *([f"  {len(failed)} failed: {errors[failed[0]]}"] if failed else [])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=variants.OPS, nargs="+")
    parser.add_argument("--model", nargs="+", default=[], help="default: Flash and Pro")
    parser.add_argument("--tp", type=int, nargs="+", default=(1, 8), help="tensor parallel sizes (default: 1 and 8)")
    parser.add_argument("--jobs", type=int, default=0)
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true", help="put what was fastest into the provider's tables")
    args = parser.parse_args()
    device = torch.device("cuda")
    if args.part is not None:
        call_once(args.part, args.jobs, [row for op in args.op for row in calls(op, args.model, args.tp)], device)
        return
    if args.jobs:
        command = [sys.executable, *sys.argv, "--part"]
        for child in [subprocess.Popen([*command, str(part)]) for part in range(args.jobs)]:
            child.wait()
    timer, arch = timing.Timer(device, SAMPLES), arch_of(device)
    simulated = os.environ.get("DSV4_BACKENDS_DEVICE", "").strip()
    command_line = f"{f'DSV4_BACKENDS_DEVICE={simulated} ' if simulated else ''}python tools/sweep.py"
    results = []
    for op in args.op:
        measured, metas = [], []
        for row in calls(op, args.model, args.tp):
            made = inputs.draw(row, device)
            tried = candidates(op, made, arch)
            results.append(measure(row, made, tried, timer))
            us, errors = results[-1]["us"], results[-1]["errors"]
            measured.append(Measured(tried, {name: time for name, time in us.items() if name not in errors}))
            metas.append({name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in made.items()})
            print(shown(results[-1]), flush=True)
            del made
            torch.cuda.empty_cache()
            if args.json:
                records.write({**provenance(f"{command_line} {' '.join(args.op)}"), "rows": results}, args.json)
        if args.write:
            where = provenance(f"{command_line} {op} --write")
            source = {"gpu": torch.cuda.get_device_name(), "capability": str(arch.capability)}
            source |= {"triton": triton.__version__, "torch": torch.__version__}
            source |= {"date": where["date"], "command": where["command"]}
            faster = [with_measured_values(op, one, metas, arch) for one in retuned(op, measured)]
            write_table(op, faster, source)
            print(f"{op}: {len(faster)} of {len(configurations.table(op)['rows'])} rows changed", flush=True)


if __name__ == "__main__":
    main()
