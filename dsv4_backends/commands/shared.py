"""What every command has: exit codes, ``--json``, output that may fail, the progress line."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..errors import DSV4Error, PolicyError
from ..selection.foreign import answering

OK, FINDING, USAGE, INTERNAL, INTERRUPTED = 0, 1, 2, 3, 130
EXIT_CODES = "0 fine, 1 a finding, 2 usage, 3 an internal error, 130 interrupted"
FINDINGS = {
    "list": "an op without a provider, or a broken plugin",
    "explain": "the op has no provider",
    "plugins": "a broken plugin",
    "doctor": "anything that it found wrong",
    "check": "something that the model needs is not served or is refused, or the memory does not suffice",
    "engine": "something is refused, or the engine does not load the plugin",
    "verify": "a case failed, or a named provider cannot run",
    "warmup": "an op without a provider, or a kernel that does not compile",
    "bench": "a wrong result, a failure, or no provider to measure",
    "bench compare": "something got slower, or lost its time",
    "bench plot": "",
    "tune": "",
}
"""What exit code 1 of each command means; empty where it never comes. A model that cannot be divided as it is asked for
is usage (2) for every command."""
DEVICE: dict[str, Any] = {"metavar": "SM", "help": "choose as if the GPU were this one: sm_86, sm_120, cpu"}


class AddCommand(Protocol):
    """Adds one command to the parser and returns its own."""

    def __call__(
        self, name: str, run: Callable[[argparse.Namespace], int], about: str, *, as_json: bool = True
    ) -> argparse.ArgumentParser: ...


class AnsweredInterrupt(KeyboardInterrupt):
    """Ctrl-C in a command that has already printed what it knew by then."""


class CannotWrite(Exception):
    """Standard output does not take what is written: a full disk, say."""


def put(text: str) -> None:
    """Print an answer.

    Raises:
        CannotWrite: standard output does not take it.
    """
    with answering():
        written(f"{text}\n")


def written(text: str = "") -> None:
    """Write to standard output, with what was printed there before. What it does not take is dropped.

    Raises:
        CannotWrite: standard output does not take it.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.stdout.flush()
        if isinstance(error, BrokenPipeError):
            raise
        raise CannotWrite(f"standard output cannot be written: {error.strerror}") from error


def tell(text: str) -> None:
    """Write to standard error what is not the answer. One that takes nothing is no reason to stop."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()


def show(args: argparse.Namespace, as_json: Callable[[], Any], as_text: Callable[[], str]) -> None:
    """Print JSON with ``--json``, else text."""
    put(json.dumps(as_json(), indent=2) if args.json else as_text())


def progress(line: str, *, log: bool = True) -> None:
    """One line that rewrites itself for a person, and goes away when it is empty; for a log, those that it asks for."""
    if sys.stderr.isatty():
        tell(f"\r\x1b[K{line}")
    elif line and log:
        tell(f"{line}\n")


def require_writable(option: str, text: str) -> None:
    """Find out before an hour of measuring that its result cannot be kept. A file that is there stays as it is.

    Raises:
        PolicyError: no file can be written there.
    """
    path = Path(text)
    try:
        if not text or path.is_dir():
            raise PolicyError(f"{option}: expected a file to write, got {text!r}")
        if path.is_file():
            path.open("ab").close()
        elif not path.exists():
            path.open("xb").close()
            path.unlink()
        elif not os.access(path, os.W_OK):  # a pipe or a device: opening it may wait, or mean something
            raise PermissionError(0, "it is not writable")
    except (OSError, ValueError) as error:
        if isinstance(error, PolicyError):
            raise
        raise PolicyError(f"{option}: {text!r} cannot be written: {getattr(error, 'strerror', error)}") from error


def write(option: str, text: str, content: str) -> None:
    """Write a file that is whole or as it was, whenever this process is interrupted.

    Raises:
        PolicyError: it cannot be written.
    """
    path = Path(text).resolve()
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        if path.exists() and not (path.is_file() and os.access(path.parent, os.W_OK)):
            path.write_text(content, encoding="utf-8")  # a pipe or a device, or a folder that takes no other file
            return
        try:
            beside.write_text(content, encoding="utf-8")
            if path.exists():
                beside.chmod(path.stat().st_mode)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise PolicyError(f"{option}: {text!r} cannot be written: {error.strerror}") from error


def torch_device(wanted: str | None) -> Any:
    """What ``--torch-device`` names.

    Raises:
        PolicyError: there is no such device here, or no op runs on it.
    """
    from ..selection import machine

    return machine.torch_device(wanted, "--torch-device")


def need_torch() -> None:
    """For commands that call the ops.

    Raises:
        DSV4Error: torch does not import.
    """
    try:
        import torch  # noqa: F401
    except Exception as error:
        words = " ".join(str(error).split())
        message = f"torch does not import, and the ops cannot be called without it: {type(error).__name__}: {words}"
        raise DSV4Error(message) from error


def known_providers(names: Sequence[str]) -> None:
    """Raise ``PolicyError`` for a provider of ``--provider`` that is not installed."""
    from ..selection import plugins, policy

    loaded = plugins.load(policy.from_environment().deny)
    policy.known_providers("--provider", names, {p.name for p in loaded.providers})


def whole(text: str) -> int:
    """An int, for argparse."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None


def positive(text: str) -> int:
    """An int of at least 1, for argparse."""
    value = whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value
