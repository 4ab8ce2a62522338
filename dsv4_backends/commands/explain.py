"""``dsv4-backends explain OP``: every candidate, ranked, with all reasons."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ..contract.names import OPS
from ..selection import builds
from ..selection.policy import PREFIX
from ..selection.resolve import Candidate, Resolution
from ..selection.survey import survey
from .render import SCHEMA_VERSION, hinted, reason_json, resolution_json
from .shared import DEVICE, FINDING, OK, AddCommand, show


def add(command: AddCommand) -> None:
    explain = command("explain", run, "every candidate for one op, ranked, with all reasons")
    explain.add_argument("op", choices=OPS, metavar="OP", help=", ".join(OPS))
    explain.add_argument("--device", **DEVICE)


def run(args: argparse.Namespace) -> int:
    resolutions = [r for _, all_ops in survey(args.device).resolutions for r in all_ops if r.op == args.op]
    show(args, lambda: as_json(resolutions), lambda: "\n\n".join(map(text, resolutions)))
    return OK if all(r.serves().candidate for r in resolutions) else FINDING


def as_json(resolutions: Sequence[Resolution]) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "op": resolutions[0].op,
        "devices": [
            {
                "device": r.device.json(),
                **resolution_json(r),
                "notices": {c.name: [reason_json(n) for n in builds.notices(c)] for c in r.accepted},
            }
            for r in resolutions
        ],
    }


def _batch_invariance(candidate: Candidate) -> str:
    implementation = candidate.implementation
    if implementation.batch_invariant:
        return "batch-invariant: a row's bits do not depend on the other rows"
    other = [i for i in candidate.provider.implementations if i.op == implementation.op and i.only_batch_invariant]
    if other:
        return f"not batch-invariant; with {PREFIX}BATCH_INVARIANT=1 {other[0].target} is, in its place"
    return "does not claim to be batch-invariant"


def text(resolution: Resolution) -> str:
    """Every candidate of one op, ranked, with everything that speaks for and against it."""
    served = resolution.serves()
    selected = served.candidate
    lines = [f"{resolution.op} on {resolution.device.label}"]
    if resolution.pinned:
        lines.append(resolution.pin_text)
    for place, candidate in enumerate(resolution.candidates, 1):
        provider, implementation = candidate.provider, candidate.implementation
        verdict = "selected" if candidate is selected else "can serve" if candidate.accepted else "refused"
        if candidate is selected and served.by == "measured":
            verdict = "selected, since it was measured to be faster on most shapes"
        lines.append("")
        lines.append(f"{place}. {candidate.name}: {verdict}")
        lines.append(f"   {provider.tier.label} tier, priority {implementation.priority}: {provider.summary}")
        lines.append(f"   {implementation.target}")
        if candidate.build is not None and candidate.build.name:
            lines.append(f"   {candidate.build.name}")
        if implementation.note:
            lines.append(f"   {implementation.note}")
        lines.append(f"   {_batch_invariance(candidate)}")
        if implementation.refuses:
            lines.append(f"   may refuse a call by its shapes, then the next one serves it ({implementation.refuses})")
        if candidate.warning is not None:
            lines.append(f"   [{candidate.warning.code}] {candidate.warning}")
        lines += [f"   [{r.code}] {r}" for r in builds.notices(candidate)]
        lines += [f"   [{r.code}] {hinted(r, selected)}" for r in candidate.reasons]
    if not resolution.candidates:
        lines.append("no installed provider implements it")
    if served.unless:
        lines += ["", "otherwise:"]
        lines += [f"   {u.provider}{' (measured)' * u.measured}: {u.where}" for u in served.unless]
    if resolution.measured:
        lines += ["", "measured on this architecture; DSV4_BACKENDS_MEASURED=0 turns it off:"]
        lines += [f"   {preference}" for preference in resolution.measured]
    if resolution.absent:
        lines += ["", "plugins that gave no provider, so what they implement is not known:"]
        lines += [f"   {name}: [{reason.code}] {reason}" for name, reasons in resolution.absent for reason in reasons]
    return "\n".join(lines)
