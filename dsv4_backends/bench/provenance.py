"""How a result file was made: command, date, commit and machine."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from ..selection.machine import Device, Machine, probe

ROOT = Path(__file__).resolve().parents[2]
CODE = ("dsv4_backends", "backends", "tools")


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit(root: Path = ROOT) -> str:
    """The commit of the code under ``root``, followed by ``-dirty`` if the code differs from it.

    An installed copy has no history: then the value of the variable ``GIT_COMMIT``, or empty.
    """
    tracked = _git(root, "ls-files", "--error-unmatch", f"{CODE[0]}/__init__.py") is not None
    head = _git(root, "rev-parse", "--short=12", "HEAD") if tracked else None
    if not head:
        return os.environ.get("GIT_COMMIT", "")
    return f"{head}-dirty" if _git(root, "status", "--porcelain", "--", *CODE) else head


@dataclass(frozen=True)
class Host:
    """The machine of a result.

    Attributes:
        python: Its version.
        packages: The versions of the packages that the numbers depend on.
        devices: One of each kind of GPU, or the CPU.
        note: A problem of the probe; empty if there was none.
    """

    python: str
    packages: dict[str, str]
    devices: tuple[Device, ...]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Made:
    """How a file was made. Every kept file begins with these fields.

    Attributes:
        command: The command that makes it again.
        date: The day, UTC.
        commit: The commit of the code; empty if it was not recorded.
    """

    command: str
    date: str
    commit: str = ""


@dataclass(frozen=True, kw_only=True)
class Measured(Made):
    """A file whose numbers depend on a machine."""

    machine: Host


class Provenance(TypedDict):
    """The fields of ``Measured``, for a subclass with more fields."""

    command: str
    date: str
    commit: str
    machine: Host


def provenance(command: str, machine: Machine | None = None) -> Provenance:
    """The provenance of a file that is made now.

    Args:
        command: The command that makes it again.
        machine: Default: this one.
    """
    found = machine or probe()
    packages = {n: v for n in ("dsv4-backends", "torch", "triton") if (v := found.installed.get(n))}
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit(),
        "machine": Host(platform.python_version(), packages, found.devices, found.note),
    }


def said_commit(commit: str) -> str:
    """A commit in words; older files have none."""
    return f"commit {commit}" if commit else "commit not recorded"
