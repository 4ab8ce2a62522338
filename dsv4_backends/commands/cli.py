"""The command line. Plain text that survives a pipe, ``--json`` with a ``schema_version``.

Exit codes: 0 fine, 1 a finding, 2 usage, 3 an internal error.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence

from .. import __version__
from ..errors import DSV4Error, PolicyError
from ..selection.policy import VARIABLES
from . import bench, check, doctor, engine, explain, plugins, tune, verify, warmup
from . import list as listing
from .shared import EXIT_CODES, FINDING, INTERNAL, OK, USAGE

COMMANDS = (listing, explain, plugins, doctor, check, engine, verify, warmup, bench, tune)


def parser() -> argparse.ArgumentParser:
    width = max(map(len, VARIABLES))
    variables = "\n".join(f"  {name:{width}}  {meaning}" for name, meaning in VARIABLES.items())
    top = argparse.ArgumentParser(
        prog="dsv4-backends",
        description="DeepSeek V4's hot ops: who serves them on this machine, and why.",
        epilog=f"environment:\n{variables}\n\nexit codes: {EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], about: str, *, as_json: bool = True
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about)
        if as_json:
            sub.add_argument("--json", action="store_true", help="print JSON with a schema_version")
        sub.set_defaults(run=run)
        return sub

    for module in COMMANDS:
        module.add(command)
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
