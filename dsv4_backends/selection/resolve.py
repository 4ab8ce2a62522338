"""Choose a provider: a pure function of the op, the device, the packages, the providers and the policy.

Nothing is imported here and nothing is probed, so the choice for every machine can be tested on any other. The result
keeps every candidate with its reasons. What is printed, what is bound and what an error has are the same objects.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from ..contract.traffic import Shape
from . import capability as cc
from . import preferences as measured
from .machine import Device
from .policy import ESSENTIAL, Policy
from .preferences import Preference
from .provider import Build, Implementation, ProviderSpec, Reason, Tier
from .requirements import unmet


@dataclass(frozen=True)
class Candidate:
    """One implementation and the reasons against it. Without reasons it can serve."""

    provider: ProviderSpec
    implementation: Implementation
    reasons: tuple[Reason, ...]
    warning: Reason | None = None
    build: Build | None = None

    def __repr__(self) -> str:
        return f"<Candidate {self.name}: {'; '.join(r.code for r in self.reasons) or 'can serve'}>"

    @property
    def name(self) -> str:
        return self.provider.name

    @property
    def accepted(self) -> bool:
        return not self.reasons


@dataclass(frozen=True)
class Unless:
    """Where another provider serves than the one that serves in general.

    Attributes:
        provider: That provider.
        where: On which shapes, in words.
        measured: Measurements put it there; otherwise the default order does.
    """

    provider: str
    where: str
    measured: bool


@dataclass(frozen=True)
class Served:
    """The provider that serves an op: in general, or for a call of given shapes.

    Attributes:
        resolution: The choice, its candidates in the order in which a call asks them, with what they answered.
        by: What decided: ``"pin"``, ``"measured"``, ``"order"`` (the user's) or ``"default"``; empty if none serves.
        unless: Where another provider serves; nothing for given shapes.
    """

    resolution: Resolution
    by: str
    unless: tuple[Unless, ...] = ()

    @functools.cached_property
    def candidate(self) -> Candidate | None:
        return next((c for c in self.resolution.candidates if c.accepted), None)

    @property
    def provider(self) -> str:
        """The provider's name; empty where no provider serves."""
        return "" if (candidate := self.candidate) is None else candidate.name

    @property
    def by_user(self) -> bool:
        """Whether the user put the provider there."""
        return self.by in ("pin", "order")

    @property
    def passed_over(self) -> tuple[Candidate, ...]:
        """The refused candidates that would have come before the one that serves."""
        return tuple(itertools.takewhile(lambda c: not c.accepted, self.resolution.candidates))

    @property
    def shown(self) -> str:
        """The provider and whether measurements put it there: ``triton (measured)``."""
        return f"{self.provider or 'none'} (measured)" if self.by == "measured" else self.provider or "none"

    @property
    def summary(self) -> str:
        """The same with who else serves: ``triton (measured, else flash_mla)``."""
        others = " or ".join(name for name in dict.fromkeys(u.provider for u in self.unless) if name != self.provider)
        if not others:
            return self.shown
        how = f"measured, else {others}" if self.by == "measured" else f"{others} where measured"
        return f"{self.provider} ({how})"

    def asked(self, ask: Callable[[Candidate], Candidate]) -> Served:
        """The same after asking the candidates in turn, until one takes it.

        Args:
            ask: Gives the candidate back, with reasons if it does not serve: its import fails, or it refuses a call.
        """
        candidates: list[Candidate] = []
        for place, candidate in enumerate(self.resolution.candidates):
            if candidate.accepted:
                answer = ask(candidate)
                if answer is not candidate:
                    candidates = candidates or list(self.resolution.candidates)
                    candidates[place] = answer
                if answer.accepted:
                    break
        if not candidates:
            return self
        resolution = replace(self.resolution, candidates=tuple(candidates))
        first = next((c for c in candidates if c.accepted), None)
        same = first is not None and first.name == self.provider
        return Served(resolution, self.by if same else resolution.origin_of(first), self.unless if same else ())


@dataclass(frozen=True)
class Resolution:
    """The choice for one op on one device, best candidate first."""

    op: str
    device: Device
    candidates: tuple[Candidate, ...]
    pinned: str | None = None
    measured: tuple[Preference, ...] = ()
    """Where the shapes of a call change the choice: among the accepted, one provider goes before another."""
    order: tuple[str, ...] = ()
    """The user's."""
    absent: tuple[tuple[str, tuple[Reason, ...]], ...] = ()
    """Plugins that gave no provider, denied or broken, with the reasons: what they implement is not known."""

    def __repr__(self) -> str:
        verdicts = ", ".join(f"{c.name} {'can serve' if c.accepted else 'refused'}" for c in self.candidates)
        return f"<Resolution of {self.op} on {self.device.name}: {verdicts or 'no provider'}>"

    def __str__(self) -> str:
        """What the command ``explain`` prints."""
        from .explanation import explanation  # asks the providers, which the choice itself does not

        return explanation(self)

    @property
    def accepted(self) -> tuple[Candidate, ...]:
        return tuple(c for c in self.candidates if c.accepted)

    @property
    def selected(self) -> Candidate | None:
        """The candidate that serves in general; ``serves`` returns it for given shapes."""
        return self.serves().candidate

    @property
    def passed_over(self) -> tuple[Candidate, ...]:
        """The refused candidates that would have come before the selected one."""
        return self.serves().passed_over

    def serves(
        self, shapes: tuple[Shape, Shape] | None = None, ask: Callable[[Candidate], Candidate] | None = None
    ) -> Served:
        """The provider that serves. Calls, commands and engines all use this function, and nothing else, to find it.

        Args:
            shapes: Those of the two tensors of a call that ``preferences.CLASSES`` names. None: in general, which is
                the first by default, or the one that measurements put before it on most classes of shapes.
            ask: See ``Served.asked``; None: no provider is asked.
        """
        accepted = self.accepted
        first = accepted[0] if accepted else None
        names = {c.name for c in accepted}
        # An import may have failed since, and left another provider first.
        holding = [p for p in self.measured if first is not None and p.over == first.name and p.prefer in names]
        if shapes is None:
            prefer = measured.general(holding)
        else:
            found = measured.preferred(holding, self.op, shapes)
            prefer = "" if found is None else found.prefer
        candidates = list(self.candidates)
        if first is not None and prefer:
            best = next(place for place, c in enumerate(candidates) if c.accepted and c.name == prefer)
            candidates.insert(next(place for place, c in enumerate(candidates) if c is first), candidates.pop(best))
        unless: tuple[Unless, ...] = ()
        if shapes is None and holding:
            unless = tuple(Unless(*found) for found in measured.elsewhere(holding, prefer))
        # The result must not apply measurements a second time.
        resolution = replace(self, candidates=tuple(candidates), measured=())
        served = Served(resolution, "measured" if prefer else self.origin_of(first), unless)
        return served if ask is None else served.asked(ask)

    def origin_of(self, candidate: Candidate | None) -> str:
        """What put a candidate there, measurements aside; see ``Served.by``."""
        if candidate is None:
            return ""
        return "pin" if self.pinned is not None else "order" if candidate.name in self.order else "default"

    @property
    def pin_text(self) -> str:
        """What the pin means here, in words; empty without one."""
        if self.pinned is None:
            return ""
        if any(candidate.name == self.pinned for candidate in self.candidates):
            return f"pinned to {self.pinned}, so no other provider may serve it"
        if reasons := dict(self.absent).get(self.pinned):
            return f"pinned to {self.pinned}, whose plugin gives no provider: {'; '.join(map(str, reasons))}"
        return f"pinned to {self.pinned}, which does not implement it"

    def explain(self) -> str:
        """All reasons as text, for errors."""
        lines = [f"{self.op} on {self.device.label}:"]
        if self.pinned:
            lines.append(f"  {self.pin_text}")
        for candidate in self.candidates:
            verdict = "; ".join(str(r) for r in candidate.reasons) or "can serve"
            lines.append(f"  {candidate.name}: {verdict}")
        if not self.candidates:
            lines.append("  no installed provider implements it")
        lines += [f"  plugin {name}: {'; '.join(map(str, reasons))}" for name, reasons in self.absent]
        return "\n".join(lines)


_SEVERITY = (cc.Support.SUPPORTED, cc.Support.UNTESTED, cc.Support.UNSUPPORTED)


def _findable(module: str) -> bool:
    # Only the top-level package: find_spec of a submodule would import its parents.
    try:
        return importlib.util.find_spec(module.partition(".")[0]) is not None
    except (ImportError, ValueError):
        return False


def resolve(
    op: str,
    device: Device,
    installed: Mapping[str, str],
    providers: Iterable[ProviderSpec],
    policy: Policy,
    *,
    preferences: Iterable[Preference] = (),
    builds: Mapping[str, Mapping[str, Build]] | None = None,
    absent: Mapping[str, tuple[Reason, ...]] | None = None,
    findable: Callable[[str], bool] = _findable,
) -> Resolution:
    """Judge every implementation of ``op``, and put them in order.

    ``builds`` is what the providers' probes found, by provider and op; a provider that is not in it is judged by its
    own claims alone. ``absent`` has the plugins that gave no provider.

    The order: the user's, tested before untested, tier, priority, name. In the batch-invariant mode, what does not
    claim it counts as untested. A pin removes all other candidates. Of ``preferences``, those are kept that change this
    order and nothing that the user set.
    """
    pinned = policy.pins.get(op)
    judged = []
    for provider in providers:
        for implementation in _in_mode(op, provider, policy):
            build = (builds or {}).get(provider.name, {}).get(op)
            reasons, warning = _judge(provider, implementation, build, device, installed, policy, pinned, findable)
            judged.append(Candidate(provider, implementation, reasons, warning, build))

    def key(candidate: Candidate) -> tuple[int, bool, int, int, str, str]:
        order = policy.order
        place = order.index(candidate.name) if candidate.name in order else len(order)
        implementation = candidate.implementation
        return (
            place,
            candidate.warning is not None,
            int(candidate.provider.tier),
            -implementation.priority,
            candidate.name,
            implementation.target,
        )

    ordered = tuple(sorted(judged, key=key))
    # Batch invariance ends where the size of the batch chooses the kernel.
    wanted = policy.measured and not policy.batch_invariant and pinned is None
    kept = tuple(p for p in preferences if p.op == op and _changes(p, ordered, policy)) if wanted else ()
    return Resolution(op, device, ordered, pinned, kept, policy.order, tuple((absent or {}).items()))


def _in_mode(op: str, provider: ProviderSpec, policy: Policy) -> list[Implementation]:
    """A provider's implementations of an op, as the batch-invariant mode or its absence leaves them."""
    found = [i for i in provider.implementations if i.op == op]
    if not policy.batch_invariant:
        return [i for i in found if not i.only_batch_invariant]
    return [i for i in found if i.batch_invariant] or found


def _changes(preference: Preference, ordered: Iterable[Candidate], policy: Policy) -> bool:
    """Whether the provider that would be called was measured to be slower than another, and the user set neither.

    Where a third comes first, the user's or a third party's, nothing was measured against it.
    """
    accepted = [c for c in ordered if c.accepted]
    free = [c.name for c in accepted if c.warning is None and c.name not in policy.order]
    first = accepted[0].name if accepted else ""
    return first == preference.over and {first, preference.prefer} <= set(free)


def _judge(
    provider: ProviderSpec,
    implementation: Implementation,
    build: Build | None,
    device: Device,
    installed: Mapping[str, str],
    policy: Policy,
    pinned: str | None,
    findable: Callable[[str], bool],
) -> tuple[tuple[Reason, ...], Reason | None]:
    reasons: list[Reason] = []
    warning = None
    name = provider.name
    asked_for = name == pinned or name in policy.order or name in (policy.allow or ())

    if pinned is not None and name != pinned:
        reasons.append(Reason("not-pinned", f"the op is pinned to {pinned}"))
    if name in policy.deny:
        reasons.append(Reason("denied", "denied by the user's settings"))
    if policy.allow is not None and name not in policy.allow and name != ESSENTIAL:
        allowed = ", ".join(sorted({*policy.allow, ESSENTIAL}))
        reasons.append(Reason("not-allowed", f"the user's settings allow only {allowed}"))
    if provider.tier is Tier.EXPERIMENTAL and not (policy.experimental or asked_for):
        message = "experimental providers serve only when asked for"
        reasons.append(Reason("experimental", message, "DSV4_BACKENDS_EXPERIMENTAL=1, or pin it"))

    fits = True
    if device.type not in implementation.devices:
        fits = False
        needs = " or ".join({"cuda": "an NVIDIA GPU", "cpu": "the CPU"}[d] for d in implementation.devices)
        here = "the CPU" if device.type == "cpu" else device.name
        reasons.append(Reason("device-type", f"runs on {needs}, this is {here}"))
    elif device.capability is not None:
        # Both must match: what the library was built for, and what the implementation is written for.
        claims = [(implementation.capability, "needs")]
        if build is not None and build.capability is not None:
            claims.insert(0, (build.capability, f"{build.name} was built for" if build.name else "needs"))
        verdicts = [cc.support(claim, device.capability) for claim, _ in claims]
        verdict = max(verdicts, key=_SEVERITY.index)
        claim, needs = claims[verdicts.index(verdict)]
        named = cc.describe(claim)
        if verdict is cc.Support.UNSUPPORTED:
            fits = False
            reasons.append(Reason("capability", f"{needs} compute capability {named}, not {device.capability}"))
        elif verdict is cc.Support.UNTESTED:
            message = f"tested on compute capability {named}, this GPU is the newer {device.capability}"
            warning = Reason("untested", message, f"pin another provider if {name} misbehaves")

    if policy.batch_invariant and not implementation.batch_invariant and warning is None:
        message = "does not claim to be batch-invariant, which DSV4_BACKENDS_BATCH_INVARIANT=1 asks for"
        warning = Reason("batch-variant", message)

    if fits:  # else to install it would change nothing
        reasons += filter(None, (unmet(text, installed, provider.hint) for text in provider.requires))

    if build is not None and not reasons:
        reasons += build.reasons

    if not reasons:  # it touches the file system
        module = implementation.target.partition(":")[0]
        if not findable(module):
            package = module.partition(".")[0]
            reasons.append(Reason("module-missing", f"the package {package} cannot be found", provider.hint))
    return tuple(reasons), warning
