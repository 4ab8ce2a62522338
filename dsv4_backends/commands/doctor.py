"""``dsv4-backends doctor``: look for everything that can be wrong on this machine."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import PolicyError
from ..selection import builds, policy
from ..selection.foreign import words
from ..selection.machine import Machine, rocm
from ..selection.provider import Tier
from ..selection.resolve import Candidate, Resolution
from ..selection.survey import Survey, survey
from .render import SCHEMA_VERSION, home_relative, table, terminal_width, versions
from .shared import DEVICE, FINDING, OK, AddCommand, show


def add(command: AddCommand) -> None:
    command("doctor", run, "look for everything that can be wrong on this machine").add_argument("--device", **DEVICE)


def run(args: argparse.Namespace) -> int:
    problem: list[PolicyError] = []
    findings = doctor(survey(args.device, problem), problem[0] if problem else None, args.device)
    show(args, lambda: as_json(findings), lambda: text(findings, terminal_width(0)))
    return OK if all(f.ok for f in findings) else FINDING


@dataclass(frozen=True)
class Finding:
    """One thing that ``doctor`` checked."""

    check: str
    ok: bool
    message: str


def _torch_findings(machine: Machine) -> list[Finding]:
    try:
        torch = importlib.import_module("torch")
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return [Finding("torch", False, f"import torch raised {words(error)}")]
    hip = rocm()
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm (HIP {hip})" if hip else "CPU only"
    found = [Finding("torch", True, f"torch {torch.__version__}, built for {built}")]
    if hip:
        found.append(Finding("torch-rocm", False, "no provider serves AMD GPUs: ops raise on their tensors"))
    if machine.gpus and not machine.simulated:
        if torch.version.cuda is None:
            message = "there is a GPU, but this torch is built for the CPU: install a CUDA build of torch"
            found.append(Finding("torch-cuda", False, message))
        else:
            found.append(Finding("torch-cuda", True, "torch is built for CUDA and the driver answers"))
    return found


def _provider_findings(surveyed: Survey, torch_imports: bool) -> list[Finding]:
    """The provider that serves, after the tests of a first call: its import, and its signature."""
    found = []
    for device, resolutions in surveyed.resolutions:
        for resolution in resolutions:
            where = f"{resolution.op} on {device.name}"
            if torch_imports:
                resolution, failed = _bound(resolution)
                found += [Finding(r.code, False, f"{where}: {c.name}: {r}") for c in failed for r in c.reasons]
            served = resolution.serves()
            if served.candidate is None:
                found.append(Finding("served", False, resolution.explain()))
            elif device.type == "cuda" and served.candidate.provider.tier is Tier.REFERENCE and not served.by_user:
                found.append(Finding("served", False, f"{where}: only the reference serves it, which is slow"))
            else:
                found.append(Finding("served", True, f"{where}: {served.summary}"))
    return found


def _bound(resolution: Resolution) -> tuple[Resolution, list[Candidate]]:
    """The choice with what binding every accepted candidate said, and those that it refused."""
    from ..contract import CONTRACTS
    from ..runtime.bind import ask

    contract = CONTRACTS[resolution.op]
    asked = [ask(contract, c, load=builds.load_apart) if c.accepted else c for c in resolution.candidates]
    failed = [c for c, before in zip(asked, resolution.candidates, strict=True) if c is not before]
    return replace(resolution, candidates=tuple(asked)), failed


def _library_findings(surveyed: Survey) -> list[Finding]:
    """The libraries that providers adapt: every distribution that has one, and what is wrong with what is installed."""
    found: dict[str, Finding] = {}
    for _, resolutions in surveyed.resolutions:
        for candidate in (c for r in resolutions for c in r.candidates if c.build is not None):
            build = candidate.build
            assert build is not None
            # Without a library there is nothing that can be wrong; but a probe that failed has not found out.
            wrong = [r for r in build.reasons if build.owners or r.code != "distribution-missing"]
            if candidate.name not in found or (wrong and found[candidate.name].ok):
                owners = ", ".join(build.owners) or ("what is installed is not known" if wrong else "nothing installed")
                message = f"{candidate.name}: {owners}"
                if wrong:
                    message += f": {'; '.join(f'[{r.code}] {r}' for r in wrong)}"
                found[candidate.name] = Finding("library", not wrong, message)
    return list(found.values())


def _notices(surveyed: Survey) -> list[Finding]:
    """What the providers that serve say of themselves here; the same words for several ops once."""
    found: dict[str, list[str]] = {}
    for _, resolutions in surveyed.resolutions:
        for resolution in resolutions:
            selected = resolution.selected
            for reason in builds.notices(selected.implementation) if selected is not None else ():
                assert selected is not None
                ops = found.setdefault(f"{selected.name}: [{reason.code}] {reason}", [])
                if resolution.op not in ops:
                    ops.append(resolution.op)
    return [Finding("provider", False, f"{message} ({', '.join(ops)})") for message, ops in found.items()]


def _engine_findings(device: str | None) -> list[Finding]:
    """Whether the engines that the settings turn on will run over the ops."""
    from ..engines import asked
    from ..engines.patching import PLANNED, REFUSED, REPLACED

    try:
        words, engines = policy.engines(), asked()
    except PolicyError as error:
        return [Finding("settings", False, str(error))]
    plans = [engine.plan(device) for engine in engines]
    named = bool(set(words) & {engine.name for engine in engines})
    installed = [plan for plan in plans if plan.version is not None]
    if plans and not installed and not named:
        names = ", ".join(plan.engine for plan in plans)
        message = f"{policy.PREFIX}ENGINE={words[0]}, but no engine that it turns on is installed: {names}"
        return [Finding("engine", False, message)]
    found = []
    if installed:  # engines seldom share an environment, and one setting may be for several
        if named:
            found = [Finding("engine", True, plan.name) for plan in plans if plan.version is None]
        plans = installed
    for plan in plans:
        replaced = 0 if plan.left_out else sum(row.state in (PLANNED, REPLACED) for row in plan.rows)
        wrong = [plan.left_out] if plan.left_out else []
        wrong += dict.fromkeys(str(reason) for row in plan.rows if row.state == REFUSED for reason in row.reasons)
        message = f"{plan.name}: {replaced} of {len(plan.rows)} names are replaced"
        found.append(Finding("engine", plan.ok, "; ".join((message, *wrong, *plan.notes))))
    return found


def doctor(surveyed: Survey, problem: PolicyError | None, device: str | None = None) -> list[Finding]:
    """Everything that can be wrong on this machine, looked at one by one."""
    machine = surveyed.machine
    found = [
        Finding("python", True, f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"),
        Finding("version", True, versions(machine)),
    ]
    names = sorted({n for n in os.environ if n.startswith(policy.PREFIX)} - set(policy.of_a_service(os.environ)))
    if problem is not None:
        found.append(Finding("settings", False, str(problem)))
    else:
        found.append(Finding("settings", True, ", ".join(f"{n}={os.environ[n]}" for n in names) or "no variables set"))
    if ignored := policy.of_a_service(os.environ):
        message = f"ignored, set by Kubernetes for services named dsv4-backends*: {', '.join(ignored)}"
        found.append(Finding("settings", True, message))
    gpus = ", ".join(device.label for device in machine.devices if device.type == "cuda")
    # A machine without the driver's library is a CPU machine; a driver that refuses is a fault.
    note = f" ({machine.note})" if machine.note else ""
    found.append(Finding("gpu", not machine.fault, (gpus or "no GPU") + note))
    torch_found = _torch_findings(machine)
    found += torch_found
    for plugin in surveyed.plugins.plugins:
        bad = plugin in surveyed.plugins.broken
        message = "; ".join(f"[{r.code}] {r}" for r in plugin.problems) or "loaded"
        found.append(Finding("plugin", not bad, f"{plugin.name} of {plugin.origin}: {message}"))
    if problem is None and torch_found[0].ok:
        found += _engine_findings(device)
    return found + _library_findings(surveyed) + _provider_findings(surveyed, torch_found[0].ok) + _notices(surveyed)


def text(findings: Sequence[Finding], width: int = 0) -> str:
    bad = sum(not f.ok for f in findings)
    rows = [("ok" if f.ok else "FINDING", f.check, f.message) for f in findings]
    end = f"{bad} finding{'s' * (bad != 1)}" if bad else "nothing found"
    return home_relative(table(("", "CHECK", ""), rows, width) + "\n\n" + end)


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "findings": [{"check": f.check, "ok": f.ok, "message": home_relative(f.message)} for f in findings],
        "ok": all(f.ok for f in findings),
    }
