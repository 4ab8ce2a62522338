"""The command line. Plain text that survives a pipe, ``--json`` with a ``schema_version``.

An error that ends a command is a line on standard error, and with ``--json`` an object on standard output as well.
"""

from __future__ import annotations

import argparse
import codecs
import io
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

from .. import __version__
from ..errors import DSV4Error, PolicyError
from ..selection.foreign import as_command
from ..selection.policy import VARIABLES
from . import bench, check, doctor, engine, explain, plugins, tune, verify, warmup
from . import list as listing
from .render import SCHEMA_VERSION
from .shared import (
    EXIT_CODES,
    FINDING,
    INTERNAL,
    INTERRUPTED,
    OK,
    USAGE,
    AnsweredInterrupt,
    CannotWrite,
    need_torch,
    put,
    tell,
    written,
)

COMMANDS = (listing, explain, plugins, doctor, check, engine, verify, warmup, bench, tune)


class _Usage(Exception):
    """The arguments cannot be parsed."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _Usage(f"{self.format_usage()}{self.prog}: error: {message}")


def parser() -> argparse.ArgumentParser:
    width = max(map(len, VARIABLES))
    variables = "\n".join(f"  {name:{width}}  {meaning}" for name, meaning in VARIABLES.items())
    top = _Parser(
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


def main(argv: Sequence[str] | None = None, *, to_the_end: bool = False) -> int:
    """Run the command line; returns the exit code.

    Args:
        argv: Default: this process's.
        to_the_end: The process ends afterwards, and prints nothing more to standard output.

    Raises:
        SystemExit: as argparse does, after ``--help`` and for arguments that cannot be parsed.
    """
    _prepare_streams()
    try:
        return _run(sys.argv[1:] if argv is None else argv, to_the_end)
    except CannotWrite as error:
        tell(f"dsv4-backends: {error}\n")
        return USAGE
    except BrokenPipeError:  # the reader has gone (`list | head`)
        return OK
    finally:
        _settle_streams()


def _run(argv: Sequence[str], to_the_end: bool) -> int:
    try:
        args = parser().parse_args(argv)
    except _Usage as error:
        tell(f"{error}\n")
        _put_error("--json" in argv, USAGE, "UsageError", str(error).rpartition("error: ")[2])
        raise SystemExit(USAGE) from None
    except SystemExit:  # --help or --version
        written()
        raise
    as_json = getattr(args, "json", None) in (True, "-")
    # torch says on its first tensor that there is no NumPy. Nothing here needs one.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    try:
        with as_command(to_the_end=to_the_end):
            code: int = args.run(args)
        return code
    except (CannotWrite, BrokenPipeError):
        raise
    except KeyboardInterrupt as error:
        tell("dsv4-backends: interrupted\n")
        if not isinstance(error, AnsweredInterrupt):
            _put_error(as_json, INTERRUPTED, "KeyboardInterrupt", "interrupted")
        return INTERRUPTED
    except DSV4Error as error:
        return _fail(error, as_json)
    except Exception as error:
        if isinstance(error, ImportError | OSError) and "torch" not in sys.modules:
            try:
                need_torch()
            except DSV4Error as reason:
                return _fail(reason, as_json)
        tell(f"{traceback.format_exc()}dsv4-backends: this is a bug in dsv4-backends; please report the lines above\n")
        _put_error(as_json, INTERNAL, type(error).__name__, str(error))
        return INTERNAL


def _fail(error: DSV4Error, as_json: bool) -> int:
    code = USAGE if isinstance(error, PolicyError) else FINDING
    tell(f"dsv4-backends: {error}\n")
    _put_error(as_json, code, type(error).__name__, str(error))
    return code


def _put_error(as_json: bool, code: int, kind: str, message: str) -> None:
    if as_json:
        error = {"type": kind, "message": message, "exit_code": code}
        put(json.dumps({"schema_version": SCHEMA_VERSION, "error": error}, indent=2))


def _plain(error: UnicodeError) -> tuple[str, int]:
    """For an encoding without a character: ``us`` for microseconds, else an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].replace("\N{MICRO SIGN}", "u")
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


def _prepare_streams() -> None:
    """A closed stderr swallows what it gets, a closed stdout cannot be written; a poor encoding gets what it can."""
    codecs.register_error("dsv4_backends", _plain)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="dsv4_backends")
        elif stream is None:
            sink = os.open(os.devnull, os.O_RDONLY if number == 1 else os.O_WRONLY)
            try:
                os.fstat(number)
            except OSError:  # else a file that is opened later would get what C code prints
                os.dup2(sink, number)
            setattr(sys, name, open(sink, "w", encoding="utf-8"))  # noqa: SIM115


def _settle_streams() -> None:
    """Write what waits; what cannot be written is dropped, else Python complains once more while it shuts down."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    sys.exit(main(to_the_end=True))
