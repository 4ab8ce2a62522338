"""What every command has: exit codes, ``--json``, the progress line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

OK, FINDING, USAGE, INTERNAL = 0, 1, 2, 3
EXIT_CODES = "0 fine, 1 a finding, 2 usage, 3 an internal error"
FINDINGS = {
    "list": "an op without a provider, or a broken plugin",
    "explain": "the op has no provider",
    "plugins": "a broken plugin",
    "doctor": "anything that it found wrong",
    "check": "something that the model needs is not served or is refused, or the memory does not suffice",
    "engine": "something is refused",
    "verify": "a case failed, or a named provider cannot run",
    "warmup": "an op without a provider, or a kernel that does not compile",
    "bench": "a wrong result, a failure, or nobody to measure",
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


def show(args: argparse.Namespace, as_json: Callable[[], Any], as_text: Callable[[], str]) -> None:
    """Print JSON with ``--json``, else text."""
    print(json.dumps(as_json(), indent=2) if args.json else as_text())


def progress(line: str, *, log: bool = True) -> None:
    """One line that rewrites itself for a person, and goes away when it is empty; for a log, those that it asks for."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{line}")
    elif line and log:
        sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def known_providers(names: Sequence[str]) -> None:
    """Raise ``PolicyError`` for a provider that is not installed."""
    from ..selection import plugins, policy

    loaded = plugins.load(policy.from_environment().deny)
    policy.Policy(order=tuple(names)).validate({p.name for p in loaded.providers})


def positive(text: str) -> int:
    """An int of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value
