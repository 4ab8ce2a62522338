"""What the commands print: tables, reasons, resolutions. Text and JSON are made from the same objects."""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import __version__
from ..selection.machine import Machine
from ..selection.plugins import Plugins
from ..selection.provider import Reason
from ..selection.resolve import Candidate, Resolution

SCHEMA_VERSION = 1


WIDTH = 100
"""Columns of a table that goes into a file or a pipe."""


def terminal_width(otherwise: int = WIDTH) -> int:
    """Columns of the terminal that stdout is; ``otherwise`` where it is none."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or otherwise
    except (AttributeError, ValueError, OSError):  # a file, a pipe, or something of Python's
        return otherwise


def table(header: Sequence[str], rows: Iterable[Sequence[str]], width: int = 0) -> str:
    """Left-aligned columns; a cell may hold several lines.

    Args:
        width: The last column is wrapped so that a line has no more columns; 0: it is not.
    """
    lines: list[list[str]] = [list(header)]
    cells = [[cell.split("\n") for cell in row] for row in rows]
    others = sum(
        2 + max(len(line) for row in ([[name] for name in header], *cells) for line in row[column])
        for column in range(len(header) - 1)
    )
    for row in cells:
        if width:
            row[-1] = [part for line in row[-1] for part in wrapped(line, max(width - others, 24))]
        height = max(len(cell) for cell in row)
        lines += [[cell[i] if i < len(cell) else "" for cell in row] for i in range(height)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("  ".join(f"{c:{w}}" for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def wrapped(line: str, width: int) -> list[str]:
    """A line in pieces, those after the first indented; no word is cut."""
    return textwrap.wrap(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False) or [""]


def reason_json(reason: Reason) -> dict[str, str]:
    return {"code": reason.code, "message": reason.message, "hint": reason.hint}


def candidate_json(candidate: Candidate) -> dict[str, Any]:
    return {
        "provider": candidate.name,
        "tier": candidate.provider.tier.label,
        "target": candidate.implementation.target,
        "build": None if candidate.build is None else candidate.build.name,
        "batch_invariant": candidate.implementation.batch_invariant,
        "accepted": candidate.accepted,
        "reasons": [reason_json(r) for r in candidate.reasons],
        "warning": None if candidate.warning is None else reason_json(candidate.warning),
    }


def resolution_json(resolution: Resolution) -> dict[str, Any]:
    """One op on one device."""
    served = resolution.serves()
    selected = served.candidate
    return {
        "op": resolution.op,
        "selected": None if selected is None else selected.name,
        "tier": None if selected is None else selected.provider.tier.label,
        "by": served.by,
        "unless": [asdict(unless) for unless in served.unless],
        "pinned": resolution.pinned,
        "measured": [asdict(preference) for preference in resolution.measured],
        "candidates": [candidate_json(c) for c in resolution.candidates],
        "absent": [{"plugin": name, "reasons": list(map(reason_json, why))} for name, why in resolution.absent],
    }


def home_relative(text: str) -> str:
    """The text with ``~`` for the user's home folder, to be pasted into a report.

    A home that is missing, or that the user cannot write to, stays as it is: it is what is wrong, and nobody's name.
    """
    try:
        home = Path.home()
    except RuntimeError:  # no HOME, and a user without an entry
        return text
    if not home.is_absolute() or home == home.parent or not (home.is_dir() and os.access(home, os.W_OK)):
        return text
    return re.sub(rf"(?<![\w./-]){re.escape(str(home))}(?![\w.-])", "~", text)


def versions(machine: Machine) -> str:
    versions = [f"dsv4-backends {__version__}"]
    versions += [f"{name} {v}" for name in ("torch", "triton") if (v := machine.installed.get(name)) is not None]
    return ", ".join(versions)


def plugins_json(plugins: Plugins) -> list[dict[str, Any]]:
    return [
        {
            "name": plugin.name,
            "target": plugin.target,
            "distribution": plugin.distribution,
            "version": plugin.version,
            "providers": [spec.name for spec in plugin.providers],
            "problems": [reason_json(r) for r in plugin.problems],
        }
        for plugin in plugins.plugins
    ]
