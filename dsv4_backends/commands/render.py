"""What the commands print: tables, reasons, resolutions. Text and JSON are made from the same objects."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from .. import __version__
from ..selection.machine import Machine
from ..selection.plugins import Plugins
from ..selection.provider import Reason
from ..selection.resolve import Candidate, Resolution

SCHEMA_VERSION = 1


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Left-aligned columns; a cell may hold several lines."""
    lines: list[list[str]] = [list(header)]
    for row in rows:
        cells = [cell.split("\n") for cell in row]
        height = max(len(cell) for cell in cells)
        lines += [[cell[i] if i < len(cell) else "" for cell in cells] for i in range(height)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("  ".join(f"{c:{w}}" for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


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
    selected = resolution.selected
    return {
        "op": resolution.op,
        "selected": None if selected is None else selected.name,
        "tier": None if selected is None else selected.provider.tier.label,
        "pinned": resolution.pinned,
        "measured": [asdict(preference) for preference in resolution.measured],
        "candidates": [candidate_json(c) for c in resolution.candidates],
    }


def hinted(reason: Reason, resolution: Resolution) -> str:
    """A reason in words, with who serves the op instead where the reason itself knows no next step."""
    selected = resolution.selected
    if reason.hint or selected is None or reason.code not in ("capability", "device-type"):
        return str(reason)
    return f"{reason.message}; {selected.name} serves it"


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
