"""``dsv4-backends engine ENGINE``: what an engine's hook replaces, where, by which provider, and why not."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

from ..engines import ENGINES, load
from .render import SCHEMA_VERSION, WIDTH, reason_json, table, terminal_width, wrapped
from .shared import DEVICE, FINDING, OK, AddCommand, show

if TYPE_CHECKING:
    from ..engines.base import Plan

_NAME = 28
"""Characters of a line of a long name in the last column."""


def add(command: AddCommand) -> None:
    engine = command("engine", run, "what an engine's hook replaces, where, by which provider, and why not")
    engine.add_argument("engine", choices=tuple(ENGINES), metavar="ENGINE", help=", ".join(ENGINES))
    engine.add_argument("--device", **DEVICE)


def run(args: argparse.Namespace) -> int:
    made = load(args.engine).plan(args.device)
    show(args, lambda: as_json(made), lambda: text(made, terminal_width()))
    return OK if made.ok else FINDING


def as_json(plan: Plan) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "engine": plan.engine,
        "version": plan.version,
        "enabled": plan.enabled,
        "devices": [device.json() for device in plan.devices],
        "targets": [
            {
                "module": row.target.module,
                "attribute": row.target.attribute,
                "op": row.target.op,
                "provider": row.provider,
                "serves": row.serves,
                "state": row.state,
                "reasons": [reason_json(r) for r in row.reasons],
                "calls": row.calls,
                "passed_on": row.passed_on,
            }
            for row in plan.rows
        ],
        "notes": list(plan.notes),
        "left_out": plan.left_out,
        "ok": plan.ok,
    }


def _broken(text: str) -> str:
    """The text with its long names over several lines, each after a dot: the last column is narrow."""

    def lines(name: re.Match[str]) -> str:
        made = [""]
        for part in re.findall(r"[^.]+\.?", name[0]):
            if made[-1] and len(made[-1]) + len(part) > _NAME:
                made.append("")
            made[-1] += part
        return "\n  ".join(made)

    return re.sub(rf"[\w.]{{{_NAME},}}", lines, text)


def text(plan: Plan, width: int = WIDTH) -> str:
    """Every target of an engine's hook by module, who serves it, and why any would not be replaced."""
    asked = "enabled" if plan.enabled else f"not enabled: {plan.switch}"

    def filled(line: str) -> str:
        return "\n".join(wrapped(line, width))

    parts = [filled(f"{plan.name} on {', '.join(device.label for device in plan.devices)}; {asked}")]
    rows: list[tuple[str, str, str]] = []
    module = ""
    for row in plan.rows:
        if row.target.module != module:
            module = row.target.module
            rows.append((module, "", ""))
        served = f"{row.target.about}: {row.serves}" if row.serves else row.target.about
        name = "  " + row.target.attribute.replace(".", ".\n    ")
        reasons = (_broken(str(reason)) for reason in row.reasons) if plan.refusal is None else ()
        rows.append((name, row.state, "\n".join((served, *reasons))))
    if plan.refusal is not None:
        parts.append(filled(f"REFUSED: {plan.refusal}"))
    parts.append(table((f"REPLACED IN {plan.engine.upper()}", "STATE", "FOR: PROVIDER, AND WHY NOT"), rows, width))
    if plan.left_out:
        parts.append(filled(f"NOT LOADED: {plan.left_out}; add it to the variable"))
    return "\n\n".join([*parts, *(filled(f"note: {note}") for note in plan.notes)])
