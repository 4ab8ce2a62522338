"""The command line. Plain text that survives a pipe, ``--json`` with a ``schema_version``.

Exit codes: 0 fine, 1 a finding, 2 usage, 3 an internal error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from . import __version__
from .contract.names import OPS
from .errors import DSV4Error, PolicyError
from .policy import VARIABLES

OK, FINDING, USAGE, INTERNAL = 0, 1, 2, 3


def _listing(device: str | None, problem: list[PolicyError] | None = None) -> Any:
    """A ``report.Listing``; with ``problem``, settings that cannot be understood are put there and left out."""
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
    return Listing(
        here,
        loaded,
        tuple(
            (
                where,
                tuple(
                    builds.choose(op, where, here.installed, loaded.providers, wishes, builds.load_apart) for op in OPS
                ),
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


def _verify(args: argparse.Namespace) -> int:
    from . import machine, plugins, policy, verify

    wishes = policy.from_environment()
    policy.Policy(order=tuple(args.provider)).validate({p.name for p in plugins.load(wishes.deny).providers})
    tty = sys.stderr.isatty()

    def progress(line: str) -> None:
        # One line that rewrites itself for a person; a line per op for a log.
        if tty:
            sys.stderr.write(f"\r\x1b[K{line}")
        elif " 1/" in line:
            sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    rows = verify.verify(args.op or OPS, args.provider, args.level, args.torch_device, progress)
    if tty:
        sys.stderr.write("\r\x1b[K")
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
        print(f"dsv4-backends: {error}", file=sys.stderr)
        return USAGE

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
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parser().parse_args(argv)
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
