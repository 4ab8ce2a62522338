"""``dsv4-backends list``: one row per op."""

from __future__ import annotations

import argparse
from typing import Any

from .. import __version__
from ..selection.survey import Survey, survey
from .render import SCHEMA_VERSION, hinted, plugins_json, resolution_json, table, versions
from .shared import DEVICE, FINDING, OK, AddCommand, show


def add(command: AddCommand) -> None:
    command("list", run, "one row per op: its provider, and why not a better one").add_argument("--device", **DEVICE)


def run(args: argparse.Namespace) -> int:
    found = survey(args.device)
    show(args, lambda: as_json(found), lambda: text(found))
    return FINDING if found.uncovered or found.plugins.broken else OK


def as_json(survey: Survey) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "version": __version__,
        "simulated": survey.machine.simulated,
        "note": survey.machine.note,
        "devices": [
            {"device": device.json(), "ops": [resolution_json(r) for r in resolutions]}
            for device, resolutions in survey.resolutions
        ],
        "plugins": [p for p in plugins_json(survey.plugins) if p["problems"]],
    }


def text(survey: Survey) -> str:
    parts = []
    for device, resolutions in survey.resolutions:
        rows = []
        for resolution in resolutions:
            selected = resolution.selected
            why = [f"{c.name}: {'; '.join(hinted(r, resolution) for r in c.reasons)}" for c in resolution.passed_over]
            if selected is None:
                if resolution.pinned:
                    why.insert(0, resolution.pin_text)
                rows.append((resolution.op, "none", "", "\n".join(why) or "no installed provider implements it"))
                continue
            if resolution.pinned:
                why.insert(0, f"pinned to {resolution.pinned}")
            if selected.warning is not None:
                why.insert(0, f"untested: {selected.warning}")
            why += map(str, resolution.measured)
            rows.append((resolution.op, selected.name, selected.provider.tier.label, "\n".join(why) or "-"))
        chosen = (r.selected.build for r in resolutions if r.selected is not None)
        names = dict.fromkeys(build.name for build in chosen if build is not None and build.name)
        parts.append("; ".join((device.label, ", ".join((versions(survey.machine), *names)))))
        parts.append(table(("OP", "PROVIDER", "TIER", "WHY NOT A BETTER ONE"), rows))
    broken = [
        f"plugin {p.name} of {p.origin} is broken: {'; '.join(map(str, p.problems))}" for p in survey.plugins.broken
    ]
    if broken:
        parts.append("\n".join(broken))
    return "\n\n".join(parts)
