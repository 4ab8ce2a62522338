"""The command line. Plain text that survives a pipe, ``--json`` with a ``schema_version``.

Exit codes: 0 fine, 1 a finding, 2 usage, 3 an internal error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .bench.shapes import SCALES
from .contract.names import OPS
from .errors import DSV4Error, PolicyError
from .policy import VARIABLES

OK, FINDING, USAGE, INTERNAL = 0, 1, 2, 3


def _listing(device: str | None, problem: list[PolicyError] | None = None, *, load: bool = True) -> Any:
    """A ``report.Listing``; with ``problem``, settings that cannot be understood are put there and left out.

    Without ``load``, native libraries are judged by their metadata and files, and no child process imports them.
    """
    from . import builds, machine, plugins, policy
    from .report import Listing

    here = machine.simulate(device) if device else machine.probe()
    try:
        wishes = policy.from_environment()
        loaded = plugins.load(wishes.deny, wishes.strict)
        wishes.validate(loaded.names)
    except PolicyError as error:
        if problem is None:
            raise
        problem.append(error)
        wishes = policy.Policy()
        loaded = plugins.load()
    ask = builds.load_apart if load else None
    return Listing(
        here,
        loaded,
        tuple(
            (
                where,
                tuple(builds.choose(op, where, here.installed, loaded.providers, wishes, ask) for op in OPS),
            )
            for where in here.devices
        ),
    )


def _print(args: argparse.Namespace, as_json: Callable[[], Any], as_text: Callable[[], str]) -> None:
    print(json.dumps(as_json(), indent=2) if args.json else as_text())


def _list(args: argparse.Namespace) -> int:
    listing = _listing(args.device)
    _print(args, listing.json, listing.text)
    return FINDING if listing.uncovered or listing.plugins.broken else OK


def _explain(args: argparse.Namespace) -> int:
    from . import report

    listing = _listing(args.device)
    resolutions = [r for _, all_ops in listing.resolutions for r in all_ops if r.op == args.op]
    _print(
        args,
        lambda: report.explain_json(resolutions),
        lambda: "\n\n".join(report.explain_text(r) for r in resolutions),
    )
    return OK if all(r.selected for r in resolutions) else FINDING


def _plugins(args: argparse.Namespace) -> int:
    from . import plugins, policy, report

    loaded = plugins.load(policy.from_environment().deny)
    _print(
        args,
        lambda: {"schema_version": report.SCHEMA_VERSION, "plugins": report.plugins_json(loaded)},
        lambda: report.plugins_text(loaded),
    )
    return FINDING if loaded.broken else OK


def _doctor(args: argparse.Namespace) -> int:
    from . import report

    problem: list[PolicyError] = []
    listing = _listing(args.device, problem)
    findings = report.doctor(listing, problem[0] if problem else None)
    _print(args, lambda: report.doctor_json(findings), lambda: report.doctor_text(findings))
    return OK if all(f.ok for f in findings) else FINDING


def _progress(line: str, *, log: bool = True) -> None:
    """One line that rewrites itself for a person, and goes away when it is empty; for a log, those that it asks for."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{line}")
    elif line and log:
        sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _known_providers(names: Sequence[str]) -> None:
    from . import plugins, policy

    loaded = plugins.load(policy.from_environment().deny)
    policy.Policy(order=tuple(names)).validate({p.name for p in loaded.providers})


def _verify(args: argparse.Namespace) -> int:
    from . import machine, verify

    _known_providers(args.provider)
    # A line per op is enough for a log.
    rows = verify.verify(
        args.op or OPS, args.provider, args.level, args.torch_device, lambda line: _progress(line, log=" 1/" in line)
    )
    _progress("")
    _print(args, lambda: verify.json(rows, args.level, machine.probe()), lambda: verify.text(rows))
    return OK if rows and verify.passed(rows) else FINDING


def _warmup(args: argparse.Namespace) -> int:
    from . import ops, report
    from .contract import models
    from .serving import Limits

    try:
        model = models.from_config(args.model)
        model.rank(args.tp)
        limits = Limits(args.max_tokens, args.max_requests, args.max_context, args.next_n, args.heads)
    except (OSError, ValueError) as error:
        raise PolicyError(f"warmup: {error}") from error

    def progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    ready = ops.warmup(
        model, tp=args.tp, limits=limits, device=args.torch_device, ops=args.op or OPS, progress=progress
    )
    rows = [(op, provider, str(count)) for op, made in ready.items() for provider, count in made.items()]
    _print(
        args,
        lambda: {"schema_version": report.SCHEMA_VERSION, "model": args.model, "tp": args.tp, "kernels": ready},
        lambda: report.table(("OP", "PROVIDER", "KERNELS READY"), rows),
    )
    return OK


def _bench(args: argparse.Namespace) -> int:
    from .bench import plot, report, run

    if args.plot:
        plot.require()
    _known_providers(args.provider)

    def save(result: dict[str, Any]) -> None:
        if args.json not in (None, "-"):
            Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    try:
        result = run.bench(
            args.op or OPS,
            args.provider,
            args.model,
            args.tp,
            args.torch_device,
            _progress,
            save,
            args.also_as,
            args.scales,
        )
    except (OSError, ValueError) as error:
        raise PolicyError(f"bench: {error}") from error
    finally:
        _progress("")
    print(json.dumps(result, indent=1) if args.json == "-" else report.text(result))
    if args.plot:
        plot.plot(result, args.plot)
    return FINDING if report.failed(result) else OK


def _compare(args: argparse.Namespace) -> int:
    from .bench import compare

    before, after = compare.read(args.before), compare.read(args.after)
    changes = compare.compare(before, after)
    _print(args, lambda: compare.as_json(before, after, changes), lambda: compare.text(before, after, changes))
    return OK if compare.passed(changes) else FINDING


def _plot(args: argparse.Namespace) -> int:
    from .bench import compare, plot

    plot.plot(compare.read(args.result), args.file)
    return OK


def _tune(args: argparse.Namespace) -> int:
    from .bench import compare, tune

    table = tune.tune([compare.read(path) for path in args.results])
    if args.output:
        Path(args.output).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    _print(args, lambda: table, lambda: tune.text(table))
    return OK


def _check(args: argparse.Namespace) -> int:
    from . import check
    from .contract import models

    try:
        model = models.from_config(args.model)
    except (OSError, ValueError) as error:
        raise PolicyError(f"--model: {error}") from error
    listing = _listing(args.device)
    try:
        checks = check.check(
            model, args.tp, args.max_model_len, args.max_num_seqs, listing.machine, listing.resolutions
        )
    except ValueError as error:  # the model cannot be served like this, on any machine
        print(f"dsv4-backends: {error}", file=sys.stderr)
        return FINDING
    _print(args, lambda: check.json(checks), lambda: check.text(checks))
    return FINDING if any(c.uncovered for c in checks) else OK


def _engine(args: argparse.Namespace) -> int:
    from . import report
    from .engines import vllm

    made = vllm.plan(args.device)
    _print(args, lambda: report.engine_json(made), lambda: report.engine_text(made))
    return OK if made.ok else FINDING


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def parser() -> argparse.ArgumentParser:
    from .contract.op import LEVELS
    from .serving import Limits

    width = max(map(len, VARIABLES))
    variables = "\n".join(f"  {name:{width}}  {meaning}" for name, meaning in VARIABLES.items())
    top = argparse.ArgumentParser(
        prog="dsv4-backends",
        description="DeepSeek V4's hot ops: who serves them on this machine, and why.",
        epilog=f"environment:\n{variables}\n\nexit codes: 0 fine, 1 a finding, 2 usage, 3 an internal error",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], about: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about)
        if name != "bench":  # it writes a file, since the text is wanted as well
            sub.add_argument("--json", action="store_true", help="print JSON with a schema_version")
        sub.set_defaults(run=run)
        return sub

    device: dict[str, Any] = {"metavar": "SM", "help": "choose as if the GPU were this one: sm_86, sm_120, cpu"}
    command("list", _list, "one row per op: its provider, and why not a better one").add_argument("--device", **device)
    explain = command("explain", _explain, "every candidate for one op, ranked, with all reasons")
    explain.add_argument("op", choices=OPS, metavar="OP", help=", ".join(OPS))
    explain.add_argument("--device", **device)
    command("plugins", _plugins, "the installed plugins, and what is wrong with the broken ones")
    command("doctor", _doctor, "look for everything that can be wrong on this machine").add_argument(
        "--device", **device
    )
    check = command("check", _check, "whether a DeepSeek V4 model will run here and who serves it, before it is loaded")
    check.add_argument(
        "--model", required=True, metavar="MODEL", help="a config.json, the folder it is in, or flash or pro"
    )
    check.add_argument("--tp", type=_positive, default=1, metavar="N", help="tensor parallel size (default: 1)")
    check.add_argument(
        "--max-model-len", type=_positive, metavar="L", help="longest context in tokens (default: the model's)"
    )
    check.add_argument(
        "--max-num-seqs", type=_positive, default=256, metavar="B", help="sequences of a decode step (default: 256)"
    )
    check.add_argument("--device", **device)
    engine = command("engine", _engine, "what an engine's hook replaces, where, by whom, and why not")
    engine.add_argument("engine", choices=("vllm",), metavar="ENGINE", help="vllm")
    engine.add_argument("--device", **device)
    verify = command("verify", _verify, "run the contracts' cases here and compare with the definition in fp64")
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
    warmup = command("warmup", _warmup, "compile before serving what serving a model will need, into the cache on disk")
    warmup.add_argument(
        "--model", required=True, metavar="MODEL", help="flash, pro, a config.json or the folder that it is in"
    )
    warmup.add_argument("--op", action="append", choices=OPS, metavar="OP", help="only this op; may be repeated")
    warmup.add_argument("--tp", type=int, default=1, metavar="N", help="tensor parallel size (default: 1)")
    told = {
        "max_tokens": "query tokens of one step",
        "max_requests": "requests of one decode step",
        "max_context": "tokens of the longest context",
        "next_n": "tokens of one request in a decode step: more than 1 with speculative decoding",
        "heads": "heads of an attention call, where the engine pads them; 0: the rank's own",
    }
    for name, about in told.items():
        default = getattr(Limits, name)
        flag = f"--{name.replace('_', '-')}"
        warmup.add_argument(flag, type=int, default=default, metavar="N", help=f"{about} (default: {default})")
    warmup.add_argument(
        "--torch-device", metavar="DEVICE", help="a torch device (default: the current GPU, else the CPU)"
    )
    bench = command("bench", _bench, "time the providers on the shapes of a deployment, each result judged first")
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
    bench.add_argument("--tp", type=int, default=1, metavar="N", help="tensor parallel size (default: 1)")
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
    compare.set_defaults(run=_compare)
    about = "draw what another run measured"
    plot = inner.add_parser("plot", help=about, description=about)
    plot.add_argument("result", metavar="RESULT", help="a file that bench --json wrote")
    plot.add_argument("file", metavar="FILE", help="FILE.svg, .png or .pdf")
    plot.set_defaults(run=_plot)
    tune = command("tune", _tune, "make the table of the measured choice from results of bench")
    tune.add_argument("results", nargs="+", metavar="RESULT", help="files that bench --json wrote, of one architecture")
    tune.add_argument("--output", metavar="FILE", help="write the table there")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parser().parse_args(argv)
    # torch says on its first tensor that there is no NumPy. Nothing here needs one.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except PolicyError as error:
        print(f"dsv4-backends: {error}", file=sys.stderr)
        return USAGE
    except DSV4Error as error:
        print(f"dsv4-backends: {error}", file=sys.stderr)
        return FINDING
    except BrokenPipeError:
        # The reader has gone (`list | head`); without this Python complains once more while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception:
        traceback.print_exc()
        print("dsv4-backends: this is a bug in dsv4-backends; please report the lines above", file=sys.stderr)
        return INTERNAL


if __name__ == "__main__":
    sys.exit(main())
