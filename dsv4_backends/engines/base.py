"""What every engine has: the version gate, the plan, and for those with hooks apply, undo, counters and log lines.

An engine is data and a few functions, like a provider. ``Engine`` says what would be replaced, and by which provider.
``HookedEngine`` replaces functions: in modules that have been imported at once, in the others when the engine imports
them. Nothing of an engine is imported here, and CUDA is not initialised.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from .. import compat
from ..contract import OPS
from ..errors import PolicyError
from ..selection import machine, policy
from ..selection.capability import Support, describe, support
from ..selection.machine import Device
from ..selection.provider import Reason, Tier
from ..selection.requirements import version_of
from ..selection.resolve import Resolution, Served
from ..selection.survey import survey
from . import ENGINES, OPTIONS, hook, patching
from .patching import FAILED, NOT_NEEDED, PLANNED, REFUSED, REPLACED, UNDONE, Patches, Row, Target

_log = logging.getLogger("dsv4_backends")
ENTRY_POINT = "dsv4_backends"
"""Our name in every engine's group of entry points, and in the engine's own list of plugins."""


@dataclass(frozen=True)
class Plan:
    """What is, or would be, replaced in one process.

    Attributes:
        engine: The engine's name.
        version: Its version; empty for a source tree without one, None if the engine is not installed.
        devices: The kinds of GPU that the choice is for.
        rows: Every target. A target that is refused on one kind of GPU is refused on all.
        enabled: Whether ``DSV4_BACKENDS_ENGINE`` turns it on.
        switch: How to turn it on, as text for the user.
        notes: More text for the user: GPUs that are left out, a version that is no release, what the engine lacks on
            these devices.
        left_out: Why the engine will not load this plugin at all; empty if it will.
        refusal: Why every target is refused, if the reason is the engine or the machine and not a target.
    """

    engine: str
    version: str | None
    devices: tuple[Device, ...]
    rows: tuple[Row, ...]
    enabled: bool
    switch: str
    notes: tuple[str, ...] = ()
    left_out: str = ""
    refusal: Reason | None = None

    @property
    def ok(self) -> bool:
        """Whether no target is refused or has failed and, if the engine is turned on, it will load this plugin."""
        return not any(row.state in (REFUSED, FAILED) for row in self.rows) and not (self.enabled and self.left_out)

    @property
    def name(self) -> str:
        """The engine and its version, as text."""
        return f"{self.engine} not installed" if self.version is None else _named(self.engine, self.version)


class Verdict(NamedTuple):
    """What is to be done with a target on one kind of GPU.

    Attributes:
        state: planned, refused or not needed.
        reason: Why it is not planned.
        served: The provider of its op there, if the verdict depends on it.
    """

    state: str
    reason: Reason | None = None
    served: Served | None = None


Judge = Callable[[Target, Device, Served | None], Verdict | None]
"""An engine's own rule for a target on one kind of GPU. Its third argument is the provider of the target's op there, or
None if the target has no op. If it returns None, the rules of all engines decide."""
_Choices = Sequence[tuple[Device, Mapping[str, Resolution]]]


def _named(engine: str, found: str) -> str:
    return f"{engine} {found}" if found else f"{engine} without a version"


def _is_release(found: str) -> bool:
    """Whether the version identifies the code: not for a build from source (0.1.dev15830+g8d59) or a fork (dev)."""
    try:
        return not Version(found).is_devrelease
    except InvalidVersion:
        return False


@dataclass(eq=False, repr=False, kw_only=True)
class Engine:
    """An engine, and the plan of what is replaced in it.

    Attributes:
        name: As in ``ENGINES``; its package is importable under this name.
        targets: What is replaced.
        distributions: The names of its distributions; default: ``name``.
        supported: The releases that it was tested with; None: ``gate`` alone decides.
        requirement: What a hint tells pip to install; default: its name, in the releases that are supported.
        capability: The compute capabilities on which it has bfloat16, which the ops take, as a claim
            (``selection/capability.py``); empty: all.
        gate: Returns why the installed engine is refused, whatever its release; None if it is not.
        judge: The engine's own rule for a target.
        notes: Returns what the engine lacks on these devices, as text for the user.
        switch: How to turn it on, as text for the user.
    """

    name: str
    targets: tuple[Target, ...]
    distributions: tuple[str, ...] = ()
    supported: SpecifierSet | None = None
    requirement: str = ""
    capability: tuple[str, ...] = ()
    gate: Callable[[], Reason | None] = lambda: None
    judge: Judge = lambda target, where, served: None
    notes: Callable[[Sequence[Device]], Sequence[str]] = lambda devices: ()
    switch: str = f"set {policy.PREFIX}ENGINE=1 in the engine's environment"
    by_variable: ClassVar[bool] = False
    """Whether ``DSV4_BACKENDS_ENGINE`` turns it on."""

    def __post_init__(self) -> None:
        for target in self.targets:
            if target.option and target.option not in OPTIONS:
                expected = f"expected a word of dsv4_backends.engines.OPTIONS ({', '.join(OPTIONS)})"
                raise ValueError(f"engine {self.name}: {target.key}: option: {expected}, got {target.option!r}")

    def __repr__(self) -> str:
        return f"<engine {self.name}>"

    def version(self) -> str | None:
        """The installed version; empty for a source tree without one, None if the engine is not installed."""
        for name in self.distributions or (self.name,):
            try:
                found: str | None = metadata.version(name)
            except Exception:  # not installed, or its metadata cannot be read: look for its source
                continue
            if found:  # importlib.metadata returns None for a directory without metadata
                return found
        return None if patching.source_of(self.name) is None else version_of(self.name) or ""

    def plan(self, device: str | None = None, *, force: bool = False) -> Plan:
        """What is replaced, where, and by which provider; after ``apply()`` the state in this process.

        CUDA is not initialised.

        Args:
            device: Choose as if the GPU were this one (``"sm_90"``); default: every kind of GPU of this machine.
            force: Accept any version of the engine, as ``DSV4_BACKENDS_ENGINE=force`` does. The names and parameters
                are still checked.

        Raises:
            PolicyError: a setting is wrong.
        """
        return self._plan(device, force, load=not self._standing())

    def _standing(self) -> tuple[Row, ...]:
        """The rows of what has been replaced in this process."""
        return ()

    def _left_out(self) -> str:
        return ""

    def _switch(self) -> str:
        """How to turn it on, as text for the user. The engines that ``DSV4_BACKENDS_ENGINE`` names stay on."""
        others = policy.engines(known=ENGINES) if self.by_variable else ()
        return f"set {policy.PREFIX}ENGINE={','.join((*others, self.name))}" if others else self.switch

    def _asked(self) -> str:
        """The word in ``DSV4_BACKENDS_ENGINE`` that turns this engine on: 1, force or its name; empty if none does."""
        words = policy.engines(known=ENGINES) if self.by_variable else ()
        return next((word for word in words if word in ("1", "force", self.name)), "")

    def _plan(self, device: str | None, force: bool, load: bool) -> Plan:
        asked = self._asked()
        policy.engine_options(OPTIONS)
        found = self.version()
        surveyed = survey(device, load=load)
        choices = [(where, {made.op: made for made in resolutions}) for where, resolutions in surveyed.resolutions]
        devices = tuple(where for where, _ in choices)
        lacking = [where for where in devices if not self._runs_on(where)]
        if len(lacking) < len(devices):  # the engine uses only the others; these may be for a display
            choices = [(where, made) for where, made in choices if where not in lacking]
        standing = self._standing()
        refusal = None
        rows = standing or tuple(Row(target) for target in self.targets if not self._stands_in_for_nothing(target))
        if not standing:
            refusal = self._refusal(found, force or asked == "force", surveyed.machine.simulated)
            if refusal is None and lacking and len(lacking) == len(devices):
                refusal = Reason("engine-arch", self._no_bfloat16(lacking[0]))
            for row in rows:
                if refusal is not None:
                    row.refuse(refusal)
                elif (unasked := self._unasked(row.target, found)) is not None:
                    row.refuse(unasked, state=NOT_NEEDED)
                else:
                    self._judge(row, choices)
            follow(rows)
        notes = []
        if found is not None and self.supported is not None and not _is_release(found):
            notes.append(
                f"{_named(self.name, found)} is not a release, so its version does not identify the code. Names and "
                "parameters are checked one by one; the whole is untested."
            )
        if len(lacking) < len(devices):
            notes += [f"{where.name} is left out: {self._no_bfloat16(where)}" for where in lacking]
        notes += self.notes([where for where in devices if where not in lacking])
        left_out = "" if standing else self._left_out()
        switch = self.switch if asked else self._switch()
        return Plan(self.name, found, devices, rows, bool(asked), switch, tuple(notes), left_out, refusal)

    def _runs_on(self, where: Device) -> bool:
        if not self.capability or where.capability is None:
            return True
        return support(self.capability, where.capability) is not Support.UNSUPPORTED

    def _no_bfloat16(self, where: Device) -> str:
        return (
            f"the ops take bfloat16, which {self.name} does not have on compute capability {where.capability}: "
            f"expected {describe(self.capability)}"
        )

    def _refusal(self, found: str | None, force: bool, simulated: bool) -> Reason | None:
        """Why nothing is replaced; None if something may be."""
        if found is None:
            wanted = self.requirement or f"{self.name}{self.supported or ''}"
            return Reason("engine-missing", f"{self.name} is not installed", f"pip install '{wanted}'")
        if not (self.supported is None or force or not _is_release(found)) and not self.supported.contains(
            found, prereleases=True
        ):
            hint = f"{policy.PREFIX}ENGINE=force replaces what fits, untested"
            return Reason("engine-version", f"{self.name} {found} is installed, tested with {self.supported}", hint)
        if (reason := self.gate()) is not None:
            return reason
        if not simulated and (hip := machine.rocm()):
            return Reason("device-type", f"torch is built for ROCm (HIP {hip}), and no provider serves AMD GPUs")
        return None

    def _stands_in_for_nothing(self, target: Target) -> bool:
        """Whether a target is only for machines without a package that this one has. The plan does not list it."""
        return bool(target.without) and not target.lacking and patching.source_of(target.without) is not None

    def _unasked(self, target: Target, found: str | None) -> Reason | None:
        """Why a target is not replaced on any GPU: another release, or an option that is off. None if neither."""
        released = bool(target.releases and found and _is_release(found))
        if released and not SpecifierSet(target.releases).contains(found or "", prereleases=True):
            return Reason("engine-served", f"only {self.name} {target.releases} has it, and {found} is installed")
        if target.option and target.option not in policy.engine_options(OPTIONS):
            hint = f"{target.option} in {policy.PREFIX}ENGINE_OPTIONS turns it on"
            return Reason("engine-option", f"off by default: {OPTIONS[target.option]}", hint)
        return None

    def _judge(self, row: Row, choices: _Choices) -> None:
        """Set a row's state by the source of the target's module, and by the verdict for each kind of GPU.

        A replacement applies to the whole process, which may run on any of the GPUs: a refusal on one refuses it.
        """
        if (misfit := patching.misfit(row.target)) is not None:
            row.refuse(misfit)
            return
        verdicts = [(where, self._verdict(row.target, where, found)) for where, found in choices]
        states = {verdict.state for _, verdict in verdicts}
        row.state = next(s for s in (REFUSED, PLANNED, NOT_NEEDED) if s in states)
        several = len(verdicts) > 1
        row.reasons = tuple(
            replace(reason, message=f"{where.name} ({where.capability}): {reason.message}") if several else reason
            for where, (state, reason, _) in verdicts
            if reason is not None and state == row.state
        )
        serving = [(where, served) for where, (_, _, served) in verdicts if served is not None]
        row.provider = ", ".join(dict.fromkeys(served.provider for _, served in serving))
        texts = list(dict.fromkeys(served.summary for _, served in serving))
        row.serves = ", ".join(
            texts if len(texts) < 2 else (f"{s.summary} on {where.capability}" for where, s in serving)
        )

    def _verdict(self, target: Target, where: Device, choices: Mapping[str, Resolution]) -> Verdict:
        served = choices[target.op].serves() if target.op else None
        if (reason := self._works(target, where, served)) is not None:
            return Verdict(NOT_NEEDED, reason)
        if (verdict := self.judge(target, where, served)) is not None:
            return verdict
        if served is not None and served.candidate is None:
            return Verdict(REFUSED, Reason("no-provider", " ".join(choices[target.op].explain().split())))
        return Verdict(PLANNED, served=served)

    def _works(self, target: Target, where: Device, served: Served | None) -> Reason | None:
        """Why nothing needs to be replaced on a device: the engine's own works there. None if it does not."""
        if not (target.lacking or target.without) or (served is not None and served.by_user):
            return None
        if target.without and patching.source_of(target.without) is None:
            return None
        if where.capability is None or support(target.lacking, where.capability) is Support.SUPPORTED:
            return None
        return Reason(
            "engine-served", f"{self.name}'s own serves; replaced on compute capability {describe(target.lacking)}"
        )


def keeps_library(engine: str, target: Target, where: Device, served: Served | None) -> Verdict | None:
    """A rule that engines share: the reference does not replace a native library on the GPUs that it is made for."""
    major = where.capability.major if where.capability is not None else 0
    if served is None or served.candidate is None or served.by_user or major not in (9, 10, 12):
        return None
    if served.candidate.provider.tier is not Tier.REFERENCE:
        return None
    message = f"only the reference serves {target.op}, and {engine}'s own library serves this GPU"
    better = "; ".join(f"{c.name}: {r}" for c in served.passed_over for r in c.reasons)
    return Verdict(REFUSED, Reason("engine-reference", message, better), served)


def unlisted(engine: str, variable: str, read: Callable[[str], Sequence[str] | None]) -> str:
    """Why an engine does not load this plugin: the engine's own variable lists plugins, but not this one. Empty if it
    does load it.

    Args:
        read: Returns the names in the variable's text, as the engine reads it; None if it loads every plugin.
    """
    text = os.environ.get(variable)
    names = None if text is None else read(text)
    if names is None or ENTRY_POINT in names:
        return ""
    return f"{variable}={text} does not name {ENTRY_POINT}, so {engine} does not load it and nothing is replaced"


def follow(rows: Sequence[Row]) -> None:
    """Do not replace a target that goes with another one that is not replaced."""
    by_name = {row.target.attribute: row for row in rows}
    for row in rows:
        leader = by_name.get(row.target.goes_with)
        if leader is None or leader.state in (PLANNED, REPLACED) or row.state != PLANNED:
            continue
        reason = Reason("engine-served", f"goes with {leader.target.attribute}, which is not replaced")
        row.refuse(reason, state=NOT_NEEDED)


# ------------------------------------------------------------------------------------------- in this process


@dataclass(eq=False, repr=False, kw_only=True)
class HookedEngine(Engine):
    """An engine whose functions are replaced by an import hook, which its entry point ``register`` sets.

    Attributes:
        left_out: Returns why the engine will not load this plugin; empty if it will.
        look: The engine's own rule for a target whose module has been imported, given the original.
        replacers: By module, the function that replaces its targets; default: ``replace`` for each.
        rows: The targets after ``apply``.
        patches: What has been replaced, with the originals.
    """

    left_out: Callable[[], str] = lambda: ""
    look: Callable[[Target, Any], Verdict | None] = lambda target, original: None
    replacers: Mapping[str, Callable[[HookedEngine, ModuleType], None]] = field(default_factory=dict)
    rows: tuple[Row, ...] = field(default=(), init=False)
    patches: Patches = field(default_factory=Patches, init=False)
    _announced: bool = field(default=False, init=False)
    _fronts: list[str] = field(default_factory=list, init=False)
    by_variable: ClassVar[bool] = True

    def _standing(self) -> tuple[Row, ...]:
        return self.rows

    def _left_out(self) -> str:
        return self.left_out()

    def apply(self, *, force: bool = False) -> Plan:
        """Replace what the plan says: at once in modules that have been imported, in the others when they are.

        A second call changes nothing. On an error the originals are restored, and the rows give the error.

        Args:
            force: As for ``plan``.

        Raises:
            PolicyError: a setting is wrong.
        """
        # The engine's start does not wait for a child process that imports the libraries. If one does not load, the
        # first call says so.
        made = self._plan(None, force, load=False)
        if self.rows:
            return made
        self.rows = made.rows
        if made.refusal is not None:
            _log.error("%s: nothing is replaced: %s", self.name, made.refusal)
        for row in made.rows:
            if row.state == REFUSED and made.refusal is None:
                self._not_replaced(row)
        planned = [row.target for row in made.rows if row.state == PLANNED]
        try:
            for library in dict.fromkeys(target.module for target in planned if target.within):
                self._put_front(library)
            for module in dict.fromkeys(target.module for target in planned):
                hook.when_imported(module, self._on_import)
        except Exception as error:
            self._put_back()
            for row in self.rows:
                if row.state in (PLANNED, REPLACED):
                    self._fail(row, error)
            raise
        return made

    def _put_front(self, library: str) -> None:
        """Put our module behind ``import`` of a native library. Only planned targets are ours; all else is its own."""
        if compat.installed(library):
            return
        compat.install(library)
        self._fronts.append(library)
        for row in self.rows:
            if row.target.module == library and row.state != PLANNED:
                vars(sys.modules[library]).pop(row.target.attribute, None)

    def _put_back(self) -> list[str]:
        hook.forget(self._on_import)
        others = self.patches.undo()
        if self._fronts:  # without names, uninstall() takes all
            compat.uninstall(*self._fronts)
            self._fronts.clear()
        return others

    def undo(self) -> list[str]:
        """Restore the originals of what ``apply()`` has replaced in this process.

        Returns:
            The names that other code has replaced since. They are left as they are.
        """
        others = self._put_back()
        for row in self.rows:
            if row.state in (PLANNED, REPLACED):
                row.state = UNDONE
        self.rows, self._announced = (), False
        return others

    def register(self) -> None:
        """The entry point: ``apply()`` if ``DSV4_BACKENDS_ENGINE`` turns it on. Never raises; may be called again."""
        try:
            if self._asked() and not self.rows:
                self.apply()
        except PolicyError as error:
            _log.error("%s: nothing is replaced: %s", self.name, error)
        except Exception:
            _log.exception("%s: nothing is replaced because of this error; please report it", self.name)

    def planned(self, module: ModuleType) -> Iterator[Row]:
        """The targets of a module that are still to be replaced."""
        return (row for row in self.rows if row.target.module == module.__name__ and row.state == PLANNED)

    def attempt(self, module: ModuleType, replacer: Callable[[Row, ModuleType], None]) -> None:
        """Call ``replacer`` for every planned target of a module. An error is logged and becomes the row's reason."""
        for row in self.planned(module):
            try:
                replacer(row, module)
            except Exception as error:
                self._fail(row, error)
            follow(self.rows)

    def replace(self, row: Row, module: ModuleType) -> None:
        """Replace the target by ``Target.ours``, unless ``look`` objects or the parameters differ."""
        original = patching.standing(module, row.target.attribute)
        if (verdict := self.look(row.target, original)) is not None and verdict.reason is not None:
            row.refuse(verdict.reason, state=verdict.state)
            return
        ours = row.target.function()
        stands = functools.partial(ours, original) if row.target.around else ours
        if (mismatch := patching.takes(original, stands)) is not None:
            row.refuse(mismatch)
            self._not_replaced(row)
            return
        if row.target.within:
            self.put(row, module, ours, None, functools.partial(compat.own, module.__name__, row.target.attribute))
        else:
            self.put(row, module, ours, original)

    def put(
        self,
        row: Row,
        module: ModuleType,
        ours: Callable[..., Any],
        native: Callable[..., Any] | None,
        find: Callable[[], Callable[..., Any] | None] | None = None,
    ) -> None:
        """Replace a target by ours, and count its calls.

        Args:
            native: The function for calls that no op covers, if there is one.
            find: Returns that function at such a call; default: ``native``.
        """
        find = find or (lambda: native)
        self.patches.replace(module, row.target.attribute, self._counted(row, ours, native, find))
        row.state = REPLACED

    def _on_import(self, module: ModuleType) -> None:
        replacer = self.replacers.get(module.__name__)
        if replacer is None:
            self.attempt(module, self.replace)
            return
        try:
            replacer(self, module)
        except Exception as error:
            for row in self.planned(module):
                self._fail(row, error)
            follow(self.rows)

    def _fail(self, row: Row, error: Exception) -> None:
        reason = Reason("engine-failed", f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}")
        row.refuse(reason, state=FAILED)
        self._not_replaced(row)

    def _not_replaced(self, row: Row) -> None:
        _log.error("%s: %s is not replaced: %s", self.name, row.target.key, "; ".join(map(str, row.reasons)))

    def _counted(
        self,
        row: Row,
        ours: Callable[..., Any],
        native: Callable[..., Any] | None,
        find: Callable[[], Callable[..., Any] | None],
    ) -> Callable[..., Any]:
        """Ours, and the engine's own function for a call that no op covers. Calls of both are counted."""

        def pass_on() -> Callable[..., Any] | None:
            if (found := find()) is not None:
                row.passed_on += 1
            return found

        if row.target.around:

            def own(*args: Any, **kwargs: Any) -> Any:
                row.passed_on += 1
                return native(*args, **kwargs)  # type: ignore[misc]  # never None if ours wraps it

            ours = functools.partial(ours, own)
        call = compat.or_native(ours, pass_on, f"{self.name}'s {row.target.attribute}")

        @functools.wraps(ours)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            row.calls += 1
            if not self._announced:
                self._announce()
            return call(*args, **kwargs)

        return replacement

    def _announce(self) -> None:
        """Log one line at the first call, in the worker: the provider of each op, and what was refused."""
        self._announced = True
        served = {row.target.op: row.serves for row in self.rows if row.target.op and row.serves}
        parts = [f"{op} {served[op]}" for op in OPS if op in served]
        refused = [
            f"{row.target.attribute}: {row.reasons[0]}"
            for state in (REFUSED, FAILED)
            for row in self.rows
            if row.state == state
        ]
        tail = f"; not replaced: {'; '.join(refused)}" if refused else ""
        name = _named(self.name, self.version() or "")
        _log.warning("%s runs on dsv4_backends: %s%s", name, ", ".join(parts) or "no op", tail)


__all__ = ["Engine", "HookedEngine", "Plan", "Verdict", "follow", "keeps_library", "unlisted"]
