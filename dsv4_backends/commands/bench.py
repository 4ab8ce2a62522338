"""``dsv4-backends bench``: time the providers on the shapes of a deployment, compare two results, draw one."""

from __future__ import annotations

import argparse
from typing import Any

from .. import records
from ..bench.compare import Change, passed
from ..bench.results import Result, verdict
from ..bench.shapes import SCALES
from ..contract import OPS
from ..errors import PolicyError
from .render import SCHEMA_VERSION, table
from .shared import (
    FINDING,
    OK,
    USAGE,
    AddCommand,
    AnsweredInterrupt,
    known_providers,
    need_torch,
    progress,
    put,
    require_writable,
    show,
    tell,
    torch_device,
    whole,
    write,
)


def add(command: AddCommand) -> None:
    bench = command(
        "bench", run, "time the providers on the shapes of a deployment, each result judged first", as_json=False
    )
    bench.add_argument("--op", action="append", choices=OPS, metavar="OP", help="only this op; may be repeated")
    bench.add_argument(
        "--provider",
        action="append",
        default=[],
        help="this provider; may be repeated; default: all that run here but the slow reference",
    )
    bench.add_argument(
        "--model",
        action="append",
        default=[],
        help="flash, pro, or the path of a config.json; may be repeated; default: flash and pro",
    )
    bench.add_argument("--tp", type=whole, default=1, metavar="N", help="tensor parallel size (default: 1)")
    bench.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write JSON there; without FILE print it, not the text"
    )
    bench.add_argument("--torch-device", metavar="DEVICE", help="a torch device (default: the first GPU, else the CPU)")
    bench.add_argument(
        "--also-as",
        action="append",
        default=[],
        metavar="SM",
        help="measure providers once more, by the code that they would run on this architecture; may be repeated",
    )
    bench.add_argument(
        "--scales",
        choices=SCALES,
        default=SCALES[0],
        help="how the activation scales of fp8_einsum lie: as vLLM's quantiser leaves them (default), or by token",
    )
    bench.add_argument("--plot", metavar="FILE", help="draw a roofline of each op: FILE.svg, .png or .pdf")
    about = "what got slower, or lost its time, from one result of bench to another; exit 1 if anything did"
    inner = bench.add_subparsers(metavar="")
    compare = inner.add_parser("compare", help=about, description=about)
    compare.add_argument("before", metavar="BEFORE", help="a file that bench --json wrote")
    compare.add_argument("after", metavar="AFTER", help="another")
    compare.add_argument("--json", action="store_true", help="print JSON with a schema_version")
    compare.set_defaults(run=run_compare)
    about = "draw what another run measured"
    plot = inner.add_parser("plot", help=about, description=about)
    plot.add_argument("result", metavar="RESULT", help="a file that bench --json wrote")
    plot.add_argument("file", metavar="FILE", help="FILE.svg, .png or .pdf")
    plot.set_defaults(run=run_plot)


def run(args: argparse.Namespace) -> int:
    need_torch()
    from ..bench import plot
    from ..bench import run as runner

    file = args.json if args.json != "-" else None
    if file is not None:
        require_writable("--json", file)
    if args.plot is not None:
        require_plot("--plot", args.plot)
    known_providers(args.provider)
    kept: Result | None = None
    trouble: dict[str, str] = {}  # by option

    def save(result: Result) -> None:
        nonlocal kept
        kept = result
        if file is not None:
            try:
                write("--json", file, records.text(result))
                trouble.pop("--json", None)
            except PolicyError as error:  # what is measured is not thrown away for it
                trouble["--json"] = str(error)

    def answer(result: Result) -> None:
        progress("")
        put(records.text(result).rstrip() if args.json == "-" else text(result))

    try:
        result = runner.bench(
            args.op or OPS,
            args.provider,
            args.model,
            args.tp,
            torch_device(args.torch_device),
            progress,
            save,
            args.also_as,
            args.scales,
        )
    except KeyboardInterrupt:
        if kept is None:
            raise
        answer(kept)
        raise AnsweredInterrupt from None
    except (OSError, ValueError) as error:
        if isinstance(error, PolicyError):
            raise
        raise PolicyError(f"bench: {error}") from error
    finally:
        progress("")
    answer(result)
    if args.plot is not None:
        try:
            plot.plot(result, args.plot)
        except (PolicyError, OSError) as error:
            trouble["--plot"] = f"--plot: {error}"
    for words in trouble.values():
        tell(f"dsv4-backends: {words}\n")
    if trouble:
        return USAGE
    return FINDING if result.failed else OK


def require_plot(option: str, file: str) -> None:
    """Find out before measuring that nothing can be drawn.

    Raises:
        PolicyError: no matplotlib, another suffix than those that it draws, or a file that cannot be written.
    """
    from ..bench import plot

    plot.require(file)
    require_writable(option, file)


def run_compare(args: argparse.Namespace) -> int:
    from ..bench import compare, results

    before, after = results.read(args.before), results.read(args.after)
    changes = compare.compare(before, after)
    show(args, lambda: compare_json(before, after, changes), lambda: compare_text(before, after, changes))
    return OK if compare.passed(changes) else FINDING


def run_plot(args: argparse.Namespace) -> int:
    from ..bench import plot, results

    result = results.read(args.result)
    require_plot("FILE", args.file)
    try:
        plot.plot(result, args.file)
    except OSError as error:
        raise PolicyError(f"FILE: {error}") from error
    return OK


def text(result: Result) -> str:
    """One table per op, then what could not be measured and why, then the automatic choice."""
    rates = result.rates
    memory = {"copy": rates.copy_gbps, "read": rates.read_gbps}
    products = {"bf16": rates.bf16_tflops, "fp8": rates.fp8_tflops, "tf32": rates.tf32_tflops}
    reached = [f"{name} {rate:.0f} GB/s" for name, rate in memory.items() if rate]
    reached += [f"{name} {rate:.4g} TFLOP/s" for name, rate in products.items() if rate]
    parts = [f"{result.device.name}: {', '.join(reached)}; an empty graph {rates.launch_us:.1f} µs"]
    if result.device.type != "cuda":
        parts.append("On a CPU: small rows, the wall clock, and no word about any GPU. It shows that the bench works.")
    by_op: dict[str, list[tuple[str, ...]]] = {}
    problems = []
    for row in result.rows:
        lines = by_op.setdefault(row.op, [])
        if row.error:
            problems.append(f"FAILED {row.op} {row.name}: {row.error}")
        times = row.rivals
        first = True
        for timing in row.timings:
            if timing.error:
                kind = "" if timing.error.startswith("refused") else "FAILED "
                problems.append(f"{kind}{row.op} {row.name}: {timing.label}: {timing.error}")
            us = timing.us
            shown = ("-",) * 6
            if us is not None:
                rate = result.rate(row, us)
                others = [value for name, value in times.items() if name != timing.label]
                shown = (
                    f"{us:.1f}",
                    f"{timing.q1:.1f}..{timing.q3:.1f}",
                    f"{rate.tflops:.4g}",
                    f"{rate.gbps:.3g}" if rate.gbps < 100 else f"{rate.gbps:.0f}",
                    f"{rate.floor_share:.0%}",
                    f"{min(others) / us:.2f}" if others else "-",
                )
            mark = " (auto)" if timing.label == row.auto else ""
            lines.append((row.name if first else "", timing.label + mark, *shown))
            first = False
    header = ("ROW", "PROVIDER", "µs", "QUARTILES", "TFLOP/s", "GB/s", "OF FLOOR", "VS BEST OTHER")
    parts += [f"{op}\n{table(header, lines)}" for op, lines in by_op.items()]
    absent = [f"not measured: {op}: {name}: {why}" for op, all_ in result.absent.items() for name, why in all_.items()]
    parts += ["\n".join(lines) for lines in (problems, absent) if lines]
    parts.append(f"{verdict(result.rows)}\n{len(result.rows)} rows in {result.seconds:.0f} s")
    return "\n\n".join(parts)


_SHOWN = ("slower", "lost", "faster", "new", "absent")


def compare_text(before: Result, after: Result, changes: list[Change]) -> str:
    """What changed, worst first; and what the two machines are, since a slower machine makes everything slower."""
    parts = []
    for name, result in (("before", before), ("after", after)):
        rates = result.rates
        parts.append(
            f"{name}: {result.device.name}, {result.date}, copy {rates.copy_gbps:.0f} GB/s, "
            f"bf16 {rates.bf16_tflops:.4g} TFLOP/s"
        )
    if before.device.name != after.device.name:
        parts.append("these are different devices: what differs may be theirs")
    shown = []
    for change in sorted(changes, key=lambda c: -(c.after or 0) / c.before if c.before else 0):
        if change.verdict in _SHOWN[:4]:
            ratio = f"{change.after / change.before:.2f}" if change.before and change.after else "-"
            times = [f"{us:.1f}" if us is not None else "-" for us in (change.before, change.after)]
            shown.append((change.verdict, change.op, change.row, change.provider, *times, ratio, change.note))
    if shown:
        parts.append(table(("", "OP", "ROW", "PROVIDER", "BEFORE µs", "AFTER µs", "AFTER/BEFORE", ""), shown))
    counts = {verdict: sum(c.verdict == verdict for c in changes) for verdict in _SHOWN}
    counted = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    same = sum(c.verdict == "same" for c in changes)
    parts.append(f"{counted or 'nothing changed'} ({same} within noise)")
    if not any(c.before and c.after for c in changes):
        parts.append("nothing to compare: no row and provider has a time in both files")
    return "\n".join(parts)


def compare_json(before: Result, after: Result, changes: list[Change]) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "before": _provenance(before),
        "after": _provenance(after),
        "ok": passed(changes),
        "changes": [vars(change) for change in changes],
    }


def _provenance(result: Result) -> dict[str, Any]:
    return {"date": result.date, "device": result.device.json(), "rates": records.plain(result.rates)}
