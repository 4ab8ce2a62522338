"""``dsv4-backends list``: one row per op."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator
from typing import Any

from .. import __version__
from ..selection.resolve import Served
from ..selection.survey import Survey, survey
from .render import SCHEMA_VERSION, WIDTH, plugins_json, resolution_json, table, terminal_width, versions
from .shared import DEVICE, FINDING, OK, AddCommand, show


def add(command: AddCommand) -> None:
    command("list", run, "one row per op: its provider, and why not a better one").add_argument("--device", **DEVICE)


def run(args: argparse.Namespace) -> int:
    found = survey(args.device)
    show(args, lambda: as_json(found), lambda: text(found, terminal_width()))
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


def text(survey: Survey, width: int = WIDTH) -> str:
    parts = []
    for device, resolutions in survey.resolutions:
        answers = [resolution.serves() for resolution in resolutions]
        rows = []
        for served in answers:
            selected = served.candidate
            tier = "" if selected is None else selected.provider.tier.label
            rows.append((served.resolution.op, served.shown, tier, "\n".join(_why(served)) or "-"))
        serving = (c.build for r in resolutions for c in r.accepted)
        names = dict.fromkeys(build.name for build in serving if build is not None and build.name)
        installed = ", ".join((versions(survey.machine), *names))
        wrapped = textwrap.fill(installed, width, break_long_words=False, break_on_hyphens=False)
        parts.append(f"{device.label}\n{wrapped}")
        parts.append(table(("OP", "PROVIDER", "TIER", "OTHERWISE, AND WHY NOT A BETTER ONE"), rows, width))
    if survey.machine.fault:
        parts.append(f"note: {survey.machine.note}")
    broken = [
        f"plugin {p.name} of {p.origin} is broken: {'; '.join(map(str, p.problems))}" for p in survey.plugins.broken
    ]
    if broken:
        parts.append("\n".join(broken))
    return "\n\n".join(parts)


def _why(served: Served) -> Iterator[str]:
    """The notes of an op: its pin, its other providers, and why a better one does not serve."""
    resolution, selected = served.resolution, served.candidate
    if resolution.pinned:
        yield f"pinned to {resolution.pinned}" if selected is not None else resolution.pin_text
    if selected is not None and selected.warning is not None:
        yield f"{selected.warning.code}: {selected.warning}"
    places: dict[tuple[str, bool], list[str]] = {}
    for unless in served.unless:
        places.setdefault((unless.provider, unless.measured), []).append(unless.where)
    for (name, measured), where in places.items():
        yield f"{name} (measured): {'; '.join(where)}" if measured else f"otherwise {name}: {'; '.join(where)}"
    reasons: dict[str, list[str]] = {}
    for candidate in served.passed_over:
        if all(reason.code != "not-pinned" for reason in candidate.reasons):  # the pin has been said
            reasons.setdefault("; ".join(map(str, candidate.reasons)), []).append(candidate.name)
    for name, problems in resolution.absent:
        if name != resolution.pinned:
            for problem in problems:
                if problem.code == "denied":  # the broken ones have lines of their own
                    reasons.setdefault(str(problem), []).append(name)
    for why, names in reasons.items():
        named = ", ".join(dict.fromkeys(names))
        yield why if why.startswith(f"{named} ") else f"{named}: {why}"
    if not resolution.candidates:
        yield "no installed provider implements it"
