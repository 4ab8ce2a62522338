"""What a provider declares: frozen data, no code.

A provider's hook returns ``ProviderSpec`` objects. They name functions by strings (``"package.module:function"``)
that are imported last, when an op is bound, so every provider can be listed on every machine.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

from . import capability as cc
from .foreign import shown, words

API_VERSION = 1
"""Version of the provider interface. It grows when a field or hook changes meaning."""


class Tier(enum.IntEnum):
    """The first key of the order of candidates; lower comes first."""

    NATIVE = 0
    """A library hand-written for an architecture (DeepGEMM, FlashMLA)."""
    PORTABLE = 1
    """One code base for many architectures (Triton)."""
    EXPERIMENTAL = 2
    """Only when asked for: by a pin, an order, an allow list, or ``DSV4_BACKENDS_EXPERIMENTAL=1``."""
    REFERENCE = 3
    """Written to be read, not to be fast."""

    @property
    def label(self) -> str:
        return self.name.lower()


REASONS: dict[str, str] = {
    "capability": "The implementation was not built for this GPU's compute capability.",
    "device-type": "The implementation runs on another type of device (an NVIDIA GPU, or the CPU).",
    "distribution-missing": "A distribution that the provider needs is not installed.",
    "distribution-version": "A distribution that the provider needs is installed in a version that does not fit.",
    "module-missing": "The package that holds the implementation cannot be found.",
    "import-failed": "The implementation was found but its import raised; the exception is in the message.",
    "signature": "The implementation's Python signature is not the contract's.",
    "library-owners": "Two installed distributions own the library's module; one has overwritten the other's files.",
    "library-kernels": "The installed build of the library has no kernels, or no cache format, for the op.",
    "library-load": "The library is installed but does not load here; the error is in the message.",
    "library-symbol": "The library loads and lacks a function that the adapter calls.",
    "library-signature": "A function of the library has parameters that the adapter does not know.",
    "compiler-missing": "The library compiles its kernels when they are first used, and there is no nvcc.",
    "probe-failed": "The provider's probe of its library failed.",
    "untested": "The GPU is a newer part of a family that the implementation names. Not a refusal: it comes last.",
    "batch-variant": "DSV4_BACKENDS_BATCH_INVARIANT=1, and the implementation does not claim it. Not a refusal.",
    "slower-kernels": "The installed compiler lacks what some kernels need; slower ones serve. Not a refusal.",
    "cache-unusable": "The compiler cannot keep its kernels on disk: the first call of each kernel will fail.",
    "notices-failed": "The provider's `notices` function failed. Not a refusal.",
    "experimental": "The provider is experimental and was not asked for.",
    "denied": "DSV4_BACKENDS_DENY (or use_providers(deny=...)) names the provider.",
    "not-allowed": "DSV4_BACKENDS_ALLOW (or use_providers(allow=...)) is set and does not name the provider.",
    "not-pinned": "The op is pinned to another provider.",
    "device": "The library serves one GPU in a process, and an earlier call was on another.",
    "shape": "The implementation refuses this call's shapes; the next provider serves the call.",
    "refuses-failed": "The implementation's `refuses` raised, or returned neither Reason nor None.",
    "shape-unknown": "`check` could not run `refuses` for these shapes. Not a refusal: the call itself will.",
    "no-provider": "No provider serves the op here, so the engine's own function stays.",
    "engine-missing": "The engine is not installed.",
    "engine-version": "The engine is installed in a version that its hook was not tested with.",
    "engine-target": "The engine's module lacks what would be replaced, or calls it with other arguments.",
    "engine-arch": "On this architecture the engine needs something that no op covers.",
    "engine-reference": "Only the slow reference serves the op, and the engine's own library serves this GPU.",
    "engine-served": "Nothing to replace: the engine has what it needs. Not a refusal.",
    "engine-option": "Off by default; a variable turns it on. Not a refusal.",
    "engine-failed": "Replacing it raised; the engine's own function stays.",
    "plugin-metadata": "The distribution's entry points, or the list of distributions, cannot be read.",
    "plugin-import": "The plugin's module raised while it was imported, or did not finish.",
    "plugin-hook": "The plugin has no known hook, a misspelt one, or one with wrong arguments.",
    "plugin-failed": "The plugin's hook raised, or did not finish.",
    "plugin-type": "The plugin's hook returned something that is not ProviderSpec objects.",
    "plugin-duplicate": "Another plugin already provides a provider of that name.",
    "plugin-api": "The plugin was written for a later version of the provider interface.",
    "engine-source": "The installed engine's code is not the one that the integration was made for.",
    "engine-model": "The model is not one that the integration supports.",
    "engine-dtype": "No op takes this part of the model in its dtype, or with these settings.",
    "engine-mode": "The engine uses a feature that the ops do not have.",
    "engine-state": "The model is enabled already, or not yet, or other code has changed it.",
}
"""Every reason code of the core. A provider's own ``refuses`` function may use further codes."""

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_CODE = re.compile(r"[a-z][a-z0-9-]*")
_TARGET = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def _want(where: str, field: str, value: Any, kind: type, what: str) -> None:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where}: {field} must be {what}, got {shown(value)}")


def _want_each(where: str, field: str, value: Any, kind: type, what: str) -> None:
    if not isinstance(value, tuple) or not all(isinstance(item, kind) for item in value):
        raise ValueError(f"{where}: {field} must be a tuple of {what}, got {shown(value)}")


def _want_target(where: str, field: str, value: Any) -> None:
    if not isinstance(value, str) or not _TARGET.fullmatch(value):
        raise ValueError(f"{where}: {field} must be 'package.module:function', got {shown(value)}")


def _want_claim(where: str, value: Any) -> None:
    """A claim is judged and put into words once, so that neither raises later."""
    if not isinstance(value, tuple) or not value or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{where}: capability must be a tuple of specifier sets, got {shown(value)}")
    try:
        cc.support(value, Version("9.0"))
        cc.describe(value)
    except Exception as error:
        raise ValueError(
            f"{where}: capability must be a tuple of specifier sets, got {value!r}: {words(error)}"
        ) from None


@dataclass(frozen=True)
class Reason:
    """Why something was not chosen: the rule with the value observed, and the next step."""

    code: str
    message: str
    hint: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.code, str) or not _CODE.fullmatch(self.code):
            raise ValueError(f"Reason: code must look like 'some-code', got {shown(self.code)}")
        if not self.message:
            raise ValueError(f"Reason {self.code}: message must not be empty")
        _want(f"Reason {self.code}", "message", self.message, str, "text")
        _want(f"Reason {self.code}", "hint", self.hint, str, "text")

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


@dataclass(frozen=True, kw_only=True)
class Build:
    """What the probe of a provider found of the library that it adapts, for one op.

    Attributes:
        name: The build in words, e.g. ``"sgl-flash-mla 1.0.0"``; empty where nothing is installed.
        owners: Every distribution that has the library, with its version.
        capability: What the build was made for, as in ``Implementation``; it must match as well. Without a build: what
            the builds that are known were made for. None: the probe cannot find out, and only the implementation's own
            claim counts.
        reasons: Why it cannot be used.
    """

    name: str = ""
    owners: tuple[str, ...] = ()
    capability: tuple[str, ...] | None = None
    reasons: tuple[Reason, ...] = ()

    def __post_init__(self) -> None:
        _want("Build", "name", self.name, str, "text")
        _want_each("Build", "owners", self.owners, str, "text")
        _want_each("Build", "reasons", self.reasons, Reason, "Reason")
        if self.capability is not None:
            _want_claim("Build", self.capability)


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One function that serves one op.

    Attributes:
        op: The contract's name, e.g. ``"sparse_mla_decode"``.
        target: ``"package.module:function"`` with the contract's exact signature. Arguments have been checked
            against the contract before the function sees them.
        devices: Device types it runs on, a subset of ``("cuda", "cpu")``.
        capability: Claim over compute capability, any of which may match (see ``capability.py``); ignored on CPU.
        refuses: Optional ``"package.module:function"`` with the same signature that returns a ``Reason`` for a call
            it cannot serve, else None. It may look at shapes, dtypes and strides, never at values or addresses: its
            answer is kept for calls that differ in nothing else.
        warmup: Optional ``"package.module:function"``, called as ``function(op, calls, device)`` with an iterable of
            the op's arguments whose tensors are on the meta device; compiles and loads on ``device`` what these calls
            would, and returns the number of kernels.
        workspace: Optional ``"package.module:function"``, called as ``function(op, arguments, device)`` with such
            arguments; returns the bytes that the call allocates on the device beyond its results.
        priority: Within a tier, higher comes first.
        deterministic: Claims that the same inputs give the same bits.
        batch_invariant: Claims that a row's result does not depend on the other rows of the call.
        only_batch_invariant: Serves only where ``DSV4_BACKENDS_BATCH_INVARIANT=1`` asks for the claim above, in place
            of the provider's implementation that does not make it.
        notices: Optional ``"package.module:function"``, called as ``function(op)``; returns Reasons that keep it from
            nothing but are worth knowing here, e.g. that slower code serves. ``explain`` and ``doctor`` show them.
        note: One line that ``explain`` shows.
    """

    op: str
    target: str
    devices: tuple[str, ...] = ("cuda",)
    capability: tuple[str, ...] = (">=0",)
    refuses: str | None = None
    warmup: str | None = None
    workspace: str | None = None
    priority: int = 0
    deterministic: bool = True
    batch_invariant: bool = False
    only_batch_invariant: bool = False
    notices: str | None = None
    note: str = ""

    def __post_init__(self) -> None:
        where = f"Implementation of {shown(self.op)}"
        if not isinstance(self.op, str) or not _NAME.fullmatch(self.op):
            raise ValueError(f"{where}: op must be an identifier in lower case")
        _want_target(where, "target", self.target)
        for field in ("refuses", "warmup", "workspace", "notices"):
            if (text := getattr(self, field)) is not None:
                _want_target(where, field, text)
        _want_each(where, "devices", self.devices, str, "'cuda' and 'cpu'")
        if not self.devices or not set(self.devices) <= {"cuda", "cpu"}:
            raise ValueError(f"{where}: devices must be a tuple of 'cuda' and 'cpu', got {self.devices!r}")
        _want_claim(where, self.capability)
        _want(where, "priority", self.priority, int, "an int")
        for field in ("deterministic", "batch_invariant", "only_batch_invariant"):
            _want(where, field, getattr(self, field), bool, "True or False")
        _want(where, "note", self.note, str, "text")


@dataclass(frozen=True, kw_only=True)
class ProviderSpec:
    """A provider: its name, its tier, what it needs, and the ops it serves.

    Attributes:
        name: Lower-case identifier that users type.
        summary: One line for people.
        tier: See ``Tier``.
        implementations: One per op and claim; several for one op are allowed where their claims or their ``refuses``
            differ.
        requires: PEP 508 requirements, all of which must be installed, e.g. ``("triton>=3.6",)``.
        hint: The next step for a user who lacks what ``requires`` names, e.g. ``"pip install triton"``.
        probe: Optional ``"package.module:function"`` for a library that comes in several distributions or builds.
            ``function(load)`` returns a ``Build`` for each op. Without ``load`` it reads metadata and files only; with
            it, it imports the library last and looks at its functions.
        api: The ``API_VERSION`` the provider was written for.
    """

    name: str
    summary: str
    tier: Tier
    implementations: tuple[Implementation, ...]
    requires: tuple[str, ...] = ()
    hint: str = ""
    probe: str | None = None
    api: int = API_VERSION

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ValueError(f"ProviderSpec: name must be an identifier in lower case, got {shown(self.name)}")
        where = f"ProviderSpec {self.name!r}"
        _want(where, "summary", self.summary, str, "text")
        _want(where, "hint", self.hint, str, "text")
        _want(where, "tier", self.tier, Tier, "a Tier")
        _want(where, "api", self.api, int, "an int")
        _want_each(where, "implementations", self.implementations, Implementation, "Implementation")
        _want_each(where, "requires", self.requires, str, "requirements")
        seen: set[tuple[object, ...]] = set()
        for made in self.implementations:
            claim = (made.deterministic, made.batch_invariant, made.only_batch_invariant)
            key = (made.op, frozenset(made.devices), frozenset(made.capability), claim, made.refuses)
            if key in seen:
                message = (
                    f"expected one implementation of {made.op!r} for a claim, got two with the same claim and refuses"
                )
                raise ValueError(f"{where}: {message}")
            seen.add(key)
        if self.probe is not None:
            _want_target(where, "probe", self.probe)
        for text in self.requires:
            try:
                requirement = Requirement(text)
                if requirement.marker is not None:
                    requirement.marker.evaluate()  # some raise only then
            except Exception as error:
                message = f"requires must be PEP 508 requirements, got {text!r}: {words(error)}"
                raise ValueError(f"{where}: {message}") from None
