"""What every command has: exit codes, ``--json``, the progress line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

OK, FINDING, USAGE, INTERNAL = 0, 1, 2, 3
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
