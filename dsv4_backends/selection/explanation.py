"""A resolution in words: what ``explain`` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import builds
from .policy import PREFIX
from .provider import Reason

if TYPE_CHECKING:
    from .resolve import Candidate, Resolution


def hinted(reason: Reason, selected: Candidate | None) -> str:
    """A reason in words, with who serves the op instead where the reason itself has no next step."""
    if reason.hint or selected is None or reason.code not in ("capability", "device-type"):
        return str(reason)
    return f"{reason.message}; {selected.name} serves it"


def _batch_invariance(candidate: Candidate) -> str:
    implementation = candidate.implementation
    if implementation.batch_invariant:
        return "batch-invariant: a row's bits do not depend on the other rows"
    other = [i for i in candidate.provider.implementations if i.op == implementation.op and i.only_batch_invariant]
    if other:
        return f"not batch-invariant; with {PREFIX}BATCH_INVARIANT=1 {other[0].target} is, in its place"
    return "does not claim to be batch-invariant"


def explanation(resolution: Resolution) -> str:
    """Every candidate of one op, the preferred first, with all its reasons."""
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
        lines += [f"   [{r.code}] {r}" for r in builds.notices(implementation) if candidate.accepted]
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
