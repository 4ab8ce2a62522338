"""Launch configurations: ``tables/OP.json``, measured by tools/sweep.py, or derived where nothing was measured.

A table's ``sources`` say where its rows come from. A row is for a variant of the op and for some compute capabilities,
and either for calls up to a size or for a role that the variant's ``plan`` names. The first row that fits is used.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4_backends.provider import Support, support

if TYPE_CHECKING:
    from .arch import Arch

TABLES = Path(__file__).parent / "tables"


@cache
def table(op: str) -> dict[str, Any]:
    return dict(json.loads((TABLES / f"{op}.json").read_text(encoding="utf-8")))


def configured(op: str, variant: str, arch: Arch, *, size: int = 0, role: str = "") -> dict[str, Any]:
    """The configuration of a variant on a machine, for calls of a size or for a role."""
    return dict(row(op, variant, arch, size=size, role=role)["config"])


def row(op: str, variant: str, arch: Arch, *, size: int = 0, role: str = "") -> dict[str, Any]:
    """The row of the table for it."""
    for found in table(op)["rows"]:
        fits = found["variant"] == variant and found.get("role", "") == role and size <= found.get("up_to", size)
        if fits and support(tuple(found["capability"]), arch.capability) is Support.SUPPORTED:
            return dict(found)
    raise LookupError(f"tables/{op}.json has no row for {variant} {role} on {arch.capability}, size {size}")


def sources(op: str) -> str:
    """Where the measured configurations of an op come from, in one line."""
    kept = table(op)["sources"].values()
    measured = [f"{s['gpu']} with Triton {s['triton']} on {s['date']}" for s in kept if "gpu" in s]
    commands = {s["command"]: None for s in kept if s.get("command", "not recorded") != "not recorded"}
    redo = f"; to redo: {', '.join(commands)}" if commands else ""
    return f"{', '.join(measured) or 'all derived'}{redo} (tables/{op}.json)"
