"""Text and JSON for people and programs, from the same objects."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__, policy
from .contract.names import OPS
from .errors import PolicyError
from .machine import Device, Machine
from .plugins import Plugins
from .provider import Reason, Tier
from .resolve import Candidate, Resolution

if TYPE_CHECKING:
    from .engines.vllm import Plan

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


def _reason(reason: Reason) -> dict[str, str]:
    return {"code": reason.code, "message": reason.message, "hint": reason.hint}


def device_json(device: Device) -> dict[str, Any]:
    """One device."""
    return {
        "type": device.type,
        "index": device.index,
        "name": device.name,
        "capability": None if device.capability is None else str(device.capability),
        "multiprocessors": device.multiprocessors,
        "memory": device.memory,
    }


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {
        "provider": candidate.name,
        "tier": candidate.provider.tier.label,
        "target": candidate.implementation.target,
        "build": None if candidate.build is None else candidate.build.name,
        "accepted": candidate.accepted,
        "reasons": [_reason(r) for r in candidate.reasons],
        "warning": None if candidate.warning is None else _reason(candidate.warning),
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
        "candidates": [_candidate(c) for c in resolution.candidates],
    }


def _hinted(reason: Reason, resolution: Resolution) -> str:
    """A reason in words, with who serves the op instead where the reason itself knows no next step."""
    selected = resolution.selected
    if reason.hint or selected is None or reason.code not in ("capability", "device-type"):
        return str(reason)
    return f"{reason.message}; {selected.name} serves it"


def _versions(machine: Machine) -> str:
    versions = [f"dsv4-backends {__version__}"]
    versions += [f"{name} {v}" for name in ("torch", "triton") if (v := machine.installed.get(name)) is not None]
    return ", ".join(versions)


@dataclass(frozen=True)
class Listing:
    """Who serves what on each kind of device, and why not the others."""

    machine: Machine
    plugins: Plugins
    resolutions: tuple[tuple[Device, tuple[Resolution, ...]], ...]

    @property
    def uncovered(self) -> list[str]:
        return [r.op for _, resolutions in self.resolutions for r in resolutions if r.selected is None]

    def json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "version": __version__,
            "simulated": self.machine.simulated,
            "note": self.machine.note,
            "devices": [
                {"device": device_json(device), "ops": [resolution_json(r) for r in resolutions]}
                for device, resolutions in self.resolutions
            ],
            "plugins": [p for p in plugins_json(self.plugins) if p["problems"]],
        }

    def text(self) -> str:
        parts = []
        for device, resolutions in self.resolutions:
            rows = []
            for resolution in resolutions:
                selected = resolution.selected
                why = [
                    f"{c.name}: {'; '.join(_hinted(r, resolution) for r in c.reasons)}" for c in resolution.passed_over
                ]
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
            parts.append("; ".join((device.label, ", ".join((_versions(self.machine), *names)))))
            parts.append(table(("OP", "PROVIDER", "TIER", "WHY NOT A BETTER ONE"), rows))
        broken = [
            f"plugin {p.name} of {p.origin} is broken: {'; '.join(map(str, p.problems))}" for p in self.plugins.broken
        ]
        if broken:
            parts.append("\n".join(broken))
        return "\n\n".join(parts)


def explain_json(resolutions: Sequence[Resolution]) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "op": resolutions[0].op,
        "devices": [{"device": device_json(r.device), **resolution_json(r)} for r in resolutions],
    }


def explain_text(resolution: Resolution) -> str:
    """Every candidate of one op, ranked, with everything that speaks for and against it."""
    lines = [f"{resolution.op} on {resolution.device.label}"]
    if resolution.pinned:
        lines.append(resolution.pin_text)
    for place, candidate in enumerate(resolution.candidates, 1):
        provider, implementation = candidate.provider, candidate.implementation
        verdict = "selected" if candidate is resolution.selected else "can serve" if candidate.accepted else "refused"
        lines.append("")
        lines.append(f"{place}. {candidate.name}: {verdict}")
        lines.append(f"   {provider.tier.label} tier, priority {implementation.priority}: {provider.summary}")
        lines.append(f"   {implementation.target}")
        if candidate.build is not None and candidate.build.name:
            lines.append(f"   {candidate.build.name}")
        if implementation.note:
            lines.append(f"   {implementation.note}")
        if implementation.refuses:
            lines.append(f"   may refuse a call by its shapes, then the next one serves it ({implementation.refuses})")
        if candidate.warning is not None:
            lines.append(f"   [{candidate.warning.code}] {candidate.warning}")
        lines += [f"   [{r.code}] {_hinted(r, resolution)}" for r in candidate.reasons]
    if not resolution.candidates:
        lines.append("no installed provider implements it")
    if resolution.measured:
        lines += ["", "measured on this architecture; DSV4_BACKENDS_MEASURED=0 turns it off:"]
        lines += [f"   {preference}" for preference in resolution.measured]
    return "\n".join(lines)


def plugins_json(plugins: Plugins) -> list[dict[str, Any]]:
    return [
        {
            "name": plugin.name,
            "target": plugin.target,
            "distribution": plugin.distribution,
            "version": plugin.version,
            "providers": [spec.name for spec in plugin.providers],
            "problems": [_reason(r) for r in plugin.problems],
        }
        for plugin in plugins.plugins
    ]


def plugins_text(plugins: Plugins) -> str:
    rows = []
    for plugin in plugins.plugins:
        status = "broken" if plugin in plugins.broken else "denied" if plugin.problems else "ok"
        names = ", ".join(spec.name for spec in plugin.providers) or "-"
        why = "\n".join(f"[{r.code}] {r}" for r in plugin.problems) or "-"
        rows.append((plugin.name, plugin.distribution, plugin.version, status, names, why))
    return table(("PLUGIN", "DISTRIBUTION", "VERSION", "STATUS", "PROVIDERS", "PROBLEM"), rows)


@dataclass(frozen=True)
class Finding:
    """One thing that the doctor looked at."""

    check: str
    ok: bool
    message: str


def _torch_findings(machine: Machine) -> list[Finding]:
    try:
        torch = importlib.import_module("torch")
    except Exception as error:
        return [Finding("torch", False, f"import torch raised {type(error).__name__}: {error}")]
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    found = [Finding("torch", True, f"torch {torch.__version__}, built for {built}")]
    if machine.gpus and not machine.simulated:
        if torch.version.cuda is None:
            message = "there is a GPU, but this torch is built for the CPU: install a CUDA build of torch"
            found.append(Finding("torch-cuda", False, message))
        else:
            found.append(Finding("torch-cuda", True, "torch is built for CUDA and the driver answers"))
    return found


def _provider_findings(listing: Listing) -> list[Finding]:
    """What the choice itself says: nobody serves, only the reference serves, or the chosen code does not import."""
    found = []
    imported: dict[str, str] = {}
    for device, resolutions in listing.resolutions:
        for resolution in resolutions:
            where = f"{resolution.op} on {device.name}"
            selected = resolution.selected
            if selected is None:
                found.append(Finding("served", False, resolution.explain()))
                continue
            target = selected.implementation.target
            if target not in imported:
                module, _, name = target.partition(":")
                try:
                    getattr(importlib.import_module(module), name)
                    imported[target] = ""
                except (Exception, SystemExit) as error:
                    imported[target] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            slow = device.type == "cuda" and selected.provider.tier is Tier.REFERENCE and not resolution.pinned
            if imported[target]:
                found.append(Finding("import", False, f"{where}: {target} raised {imported[target]}"))
            elif slow:
                found.append(Finding("served", False, f"{where}: only the reference serves it, which is slow"))
            else:
                found.append(Finding("served", True, f"{where}: {selected.name}"))
    return found


def _library_findings(listing: Listing) -> list[Finding]:
    """The libraries that providers adapt: every distribution that has one, and what is wrong with what is installed."""
    found: dict[str, Finding] = {}
    for _, resolutions in listing.resolutions:
        for candidate in (c for r in resolutions for c in r.candidates if c.build is not None):
            build = candidate.build
            assert build is not None
            wrong = "; ".join(f"[{r.code}] {r}" for r in build.reasons)
            if candidate.name not in found or (wrong and found[candidate.name].ok):
                owners = ", ".join(build.owners) or "nothing installed"
                message = f"{candidate.name}: {owners}{f': {wrong}' if wrong and build.owners else ''}"
                found[candidate.name] = Finding("library", not (wrong and build.owners), message)
    return list(found.values())


def doctor(listing: Listing, problem: PolicyError | None) -> list[Finding]:
    """Everything that can be wrong on this machine, looked at one by one."""
    machine = listing.machine
    found = [
        Finding("python", True, f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"),
        Finding("version", True, _versions(machine)),
    ]
    names = sorted(name for name in os.environ if name.startswith(policy.PREFIX))
    if problem is not None:
        found.append(Finding("settings", False, str(problem)))
    else:
        found.append(Finding("settings", True, ", ".join(f"{n}={os.environ[n]}" for n in names) or "no variables set"))
    gpus = ", ".join(device.label for device in machine.devices if device.type == "cuda")
    # A machine without the driver's library is a CPU machine; a driver that refuses is a fault.
    driver_fails = "cuInit" in machine.note or "probe" in machine.note
    note = f" ({machine.note})" if machine.note else ""
    found.append(Finding("gpu", not driver_fails, (gpus or "no GPU") + note))
    found += _torch_findings(machine)
    for plugin in listing.plugins.plugins:
        bad = plugin in listing.plugins.broken
        message = "; ".join(f"[{r.code}] {r}" for r in plugin.problems) or "loaded"
        found.append(Finding("plugin", not bad, f"{plugin.name} of {plugin.origin}: {message}"))
    return found + _library_findings(listing) + _provider_findings(listing)


def doctor_text(findings: Sequence[Finding]) -> str:
    home = str(Path.home())
    bad = sum(not f.ok for f in findings)
    rows = [("ok" if f.ok else "FINDING", f.check, f.message) for f in findings]
    end = f"{bad} finding{'s' * (bad != 1)}" if bad else "nothing found"
    return (table(("", "CHECK", ""), rows) + "\n\n" + end).replace(home, "~")


def doctor_json(findings: Sequence[Finding]) -> dict[str, Any]:
    home = str(Path.home())
    return {
        "schema_version": SCHEMA_VERSION,
        "findings": [{"check": f.check, "ok": f.ok, "message": f.message.replace(home, "~")} for f in findings],
        "ok": all(f.ok for f in findings),
    }


def engine_json(plan: Plan) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "engine": "vllm",
        "version": plan.version,
        "enabled": plan.enabled,
        "device": device_json(plan.device),
        "targets": [
            {
                "module": row.target.module,
                "attribute": row.target.attribute,
                "op": row.target.op,
                "provider": row.provider,
                "state": row.state,
                "reasons": [_reason(r) for r in row.reasons],
                "calls": row.calls,
                "passed_on": row.passed_on,
            }
            for row in plan.rows
        ],
        "notes": list(plan.notes),
        "ok": plan.ok,
    }


def engine_text(plan: Plan) -> str:
    """Every target of an engine's hook, and why any of them would not be replaced."""
    asked = "enabled" if plan.enabled else f"not enabled: set {policy.PREFIX}ENGINE=1 in the engine's environment"
    parts = [f"vllm {plan.version or 'not installed'} on {plan.device.label}; {asked}"]
    rows = [
        (row.target.key, row.target.about, row.provider or "-", row.state, "\n".join(map(str, row.reasons)) or "-")
        for row in plan.rows
    ]
    parts.append(table(("REPLACED IN VLLM", "FOR", "PROVIDER", "STATE", "WHY NOT"), rows))
    return "\n\n".join([*parts, *(f"note: {note}" for note in plan.notes)])


def machine_json(machine: Machine) -> Mapping[str, Any]:
    """For result files: what the numbers were measured on."""
    return {
        "python": platform.python_version(),
        "packages": {n: v for n in ("dsv4-backends", "torch", "triton") if (v := machine.installed.get(n))},
        "devices": [device_json(d) for d in machine.devices],
        "note": machine.note,
        "executable": Path(sys.executable).name,
        "ops": list(OPS),
    }
