"""What a result file says of how it was made: command, date, commit and machine."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..selection.machine import Machine, probe

ROOT = Path(__file__).resolve().parents[2]
CODE = ("dsv4_backends", "backends", "tools")


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit(root: Path = ROOT) -> str:
    """The commit that the code under ``root`` is of, followed by ``-dirty`` where the code differs from it.

    An installed copy has no history: then what the variable ``GIT_COMMIT`` says; empty if nothing does.
    """
    tracked = _git(root, "ls-files", "--error-unmatch", f"{CODE[0]}/__init__.py") is not None
    head = _git(root, "rev-parse", "--short=12", "HEAD") if tracked else None
    if not head:
        return os.environ.get("GIT_COMMIT", "")
    return f"{head}-dirty" if _git(root, "status", "--porcelain", "--", *CODE) else head


def provenance(command: str, machine: Machine | None = None) -> dict[str, Any]:
    """The first entries of every result file.

    Args:
        command: What makes the file anew.
        machine: Default: this one.
    """
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit(),
        "machine": (machine or probe()).json(),
    }


def said_commit(result: Mapping[str, Any]) -> str:
    """What a result file says of the commit, in words; files from before it was kept say nothing."""
    return f"commit {made}" if (made := result.get("commit")) else "commit not recorded"
