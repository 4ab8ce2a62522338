"""Binding: the accepted candidates of an op on a device, imported best first, kept by device and policy."""

from __future__ import annotations

import importlib
import inspect
import logging
import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch

from ..contract import CONTRACTS, OpContract
from ..contract.values import checking
from ..errors import NoProviderError, PolicyError
from ..selection import builds, machine, plugins, policy
from ..selection import preferences as measured
from ..selection.provider import Implementation, Reason
from ..selection.resolve import Candidate, Resolution

_log = logging.getLogger("dsv4_backends")
lock = threading.RLock()


class Bound:
    """One implementation, imported."""

    __slots__ = ("calls", "function", "implementation", "provider", "refuses")

    def __init__(
        self,
        provider: str,
        implementation: Implementation,
        function: Callable[..., Any],
        refuses: Callable[..., Any] | None,
    ) -> None:
        self.provider, self.implementation, self.function, self.refuses = provider, implementation, function, refuses
        self.calls = 0


class Chain:
    """The accepted candidates of one resolution, best first, each imported when the ones before it refuse."""

    def __init__(self, contract: OpContract, resolution: Resolution, check_values: bool = False) -> None:
        self.contract = contract
        self.resolution = resolution
        self.check_values = check_values
        self.bound: list[Bound] = []
        self.waiting = list(resolution.accepted)
        self.warned: set[tuple[str, str]] = set()
        if (first := self.at(0)) is None:
            raise self.failure("no provider can serve")
        # Who serves whatever the shapes are, or None.
        self.head = first if first.refuses is None else None
        self.known: dict[Hashable, Bound] = {}
        self.by_shape: dict[tuple[torch.Size, torch.Size], Bound] = {}
        self.measured: tuple[measured.Preference, ...] = ()
        if resolution.measured:
            while self.at(len(self.bound)) is not None:  # nothing is imported while serving
                pass
            names = [bound.provider for bound in self.bound]
            # An import may have failed since, and left another provider first.
            self.measured = tuple(p for p in resolution.measured if p.over == names[0] and p.prefer in names)
            if self.measured:
                self.head = None

    def at(self, index: int) -> Bound | None:
        """The index-th candidate that imports, or None when there are no more."""
        while len(self.bound) <= index:
            with lock:
                if len(self.bound) > index:
                    break
                if not self.waiting:
                    return None
                candidate = self.waiting.pop(0)
                bound = bind_candidate(self.contract, candidate)
                if isinstance(bound, tuple):
                    self.reject(candidate, bound)
                else:
                    if candidate.warning is not None:
                        self.warn_once(candidate.name, candidate.warning)
                    if self.check_values:
                        bound.function = checking(self.contract, bound.function)
                    self.bound.append(bound)
        return self.bound[index]

    def preferred(self, shapes: tuple[torch.Size, torch.Size]) -> Bound:
        """The candidate that measurements put first for these shapes, else the first one. A pure function of them."""
        found = measured.preferred(self.measured, self.contract.name, shapes)
        bound = self.bound[0] if found is None else next(b for b in self.bound if b.provider == found.prefer)
        if len(self.by_shape) >= 4096:  # more than a server meets in a day; but memory has a bound
            self.by_shape.clear()
        self.by_shape[shapes] = bound
        return bound

    def reject(self, candidate: Candidate, reasons: tuple[Reason, ...]) -> None:
        for reason in reasons:
            self.warn_once(candidate.name, reason)
        self.resolution = replace(
            self.resolution,
            candidates=tuple(replace(c, reasons=reasons) if c is candidate else c for c in self.resolution.candidates),
        )

    def warn_once(self, provider: str, reason: Reason) -> None:
        """Once for each provider and reason: a better candidate does not serve, and why."""
        if (provider, reason.code) not in self.warned:
            self.warned.add((provider, reason.code))
            _log.warning("%s: %s: %s [%s]", self.contract.name, provider, reason, reason.code)

    def choose(self, known: Hashable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        """The candidate for a call: asked for once where the contract has a name for calls like it, ``known``."""
        bound = self.known.get(known)
        if bound is None:
            bound = self.first(args, kwargs)
            if known is not None:
                keep(self.known, known, bound)
        return bound

    def first(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        """The first candidate that takes these shapes. A pure function of what makes a call known."""
        refusals = []
        if self.measured:
            names = list(self.contract.args)
            one, two = (args[i] if args else kwargs[names[i]] for i in measured.CLASSES[self.contract.name].tensors)
            shapes = one.shape, two.shape
            best = self.by_shape.get(shapes) or self.preferred(shapes)
            reason = best.refuses(*args, **kwargs) if best.refuses is not None else None
            if reason is None:
                return best
            self.warn_once(best.provider, reason)
        index = 0
        while (bound := self.at(index)) is not None:
            reason = bound.refuses(*args, **kwargs) if bound.refuses is not None else None
            if reason is None:
                return bound
            self.warn_once(bound.provider, reason)
            refusals.append(f"  {bound.provider}: {reason}")
            index += 1
        raise self.failure("no provider takes these shapes", "\n".join(["", "for this call:", *refusals]))

    def failure(self, what: str, more: str = "") -> NoProviderError:
        return NoProviderError(f"{what} {self.resolution.explain()}{more}", self.resolution)


def keep(kept: dict[Any, Bound], key: Hashable, bound: Bound) -> None:
    if len(kept) >= 256:  # far more than a contract knows at a time; but those that it forgot stay here
        kept.clear()
    kept[key] = bound


def bind_candidate(contract: OpContract, candidate: Candidate) -> Bound | tuple[Reason, ...]:
    """Import a candidate's functions and compare their signatures, or say why that failed."""
    implementation = candidate.implementation
    build = builds.load(candidate.provider).get(contract.name)
    if build is not None and build.reasons:
        return build.reasons
    try:
        function = load_target(implementation.target)
        refuses = load_target(implementation.refuses) if implementation.refuses else None
    except (Exception, SystemExit) as error:
        return (Reason("import-failed", _import_failed(implementation.target, error), candidate.provider.hint),)
    for loaded in filter(None, (function, refuses)):
        if (mismatch := signature_mismatch(contract, loaded)) is not None:
            return (mismatch,)
    return Bound(candidate.name, implementation, function, refuses)


def _import_failed(target: str, error: BaseException) -> str:
    return f"importing {target} raised {type(error).__name__}: {' '.join(str(error).split())}"


def load_target(target: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    return cast("Callable[..., Any]", getattr(importlib.import_module(module), name))


def signature_mismatch(contract: OpContract, function: Callable[..., Any]) -> Reason | None:
    """Compare names, order, kinds and defaults of a function's parameters with the contract's."""

    def shape(signature: inspect.Signature) -> str:
        bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
        return str(inspect.Signature(bare))

    try:
        have = shape(inspect.signature(function))
    except (TypeError, ValueError) as error:
        have = f"no signature ({error})"
    if have == (want := shape(contract.signature)):
        return None
    name = f"{getattr(function, '__module__', '?')}:{getattr(function, '__qualname__', function)}"
    return Reason("signature", f"{name} has {have}, the contract of {contract.name} is {want}")


class Bindings:
    """Chains by op and device under one policy."""

    def __init__(self, wishes: policy.Policy) -> None:
        # Only the environment's deny list keeps a plugin from being imported; a context's works in `resolve`.
        loaded = plugins.load(policy.from_environment().deny, wishes.strict)
        self.policy = wishes.validate(loaded.names)
        self.plugins = loaded
        self.installed = machine.Installed()
        self.chains: dict[tuple[str, torch.device], Chain] = {}

    def resolve(self, op: str, where: machine.Device) -> Resolution:
        return builds.choose(op, where, self.installed, self.plugins.providers, self.policy)

    def bind(self, contract: OpContract, device: torch.device) -> Chain:
        with lock:
            key = (contract.name, device)
            if (chain := self.chains.get(key)) is None:
                where = machine.device_of(device)
                resolution = self.resolve(contract.name, where)
                chain = self.chains[key] = Chain(contract, resolution, self.policy.check_values)
            return chain


_default: Bindings | None = None
fast_path: dict[str, dict[Hashable, Bound]] = {}
"""A cache ``{op: {device or guard: bound provider}}`` for the environment's policy: what dispatch looks into first."""
_scoped: dict[policy.Policy, Bindings] = {}
_last_scoped: tuple[policy.Policy, Bindings] | None = None
"""The same for the policy object that was last active: to compare two policies takes longer than a call may."""


def current() -> Bindings:
    global _default, _last_scoped
    wishes = policy.active()
    if wishes is None:
        if _default is None:
            with lock:
                if _default is None:
                    _default = Bindings(policy.from_environment())
        return _default
    if (last := _last_scoped) is not None and last[0] is wishes:
        return last[1]
    with lock:
        if wishes not in _scoped:
            _scoped[wishes] = Bindings(wishes)
        _last_scoped = wishes, _scoped[wishes]
        return _last_scoped[1]


def is_default(bindings: Bindings) -> bool:
    """Whether these are the environment's: not those of a ``use_providers`` block, nor forgotten by ``reset``."""
    return bindings is _default


def reset() -> None:
    """Forget every binding, plugin and counter: the next call resolves anew, for a changed environment."""
    global _default, _last_scoped
    with lock:
        _default = _last_scoped = None
        _scoped.clear()
        for cached in fast_path.values():
            cached.clear()
        plugins.load.cache_clear()
        builds.forget()


def stats() -> dict[str, dict[str, int]]:
    """Calls since the start (or ``reset``): ``{op: {provider: calls}}``.

    A call that a CUDA graph captured counts once, at capture: a replay does not pass through Python.
    """
    counts: dict[str, dict[str, int]] = {}
    with lock:
        for bindings in (_default, *_scoped.values()):
            for (op, _), chain in bindings.chains.items() if bindings is not None else ():
                for bound in chain.bound:
                    per_op = counts.setdefault(op, {})
                    per_op[bound.provider] = per_op.get(bound.provider, 0) + bound.calls
    return counts


def resolution(op: str, device: torch.device | str | None = None) -> Resolution:
    """Every candidate for ``op`` with its verdict, as calls on ``device`` see it.

    Args:
        op: One of ``dsv4_backends.OPS``.
        device: A torch device that exists; default: the first GPU (or the simulated one), else the CPU.
    """
    if op not in CONTRACTS:
        raise PolicyError(f"unknown op {op!r}. Known: {', '.join(CONTRACTS)}")
    bindings = current()
    if device is None:
        where = machine.probe().devices[0]
    else:
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if (chain := bindings.chains.get((op, device))) is not None:
            return chain.resolution  # with what its imports met
        where = machine.device_of(device)
    return bindings.resolve(op, where)


def resolution_under(wishes: policy.Policy, op: str, device: torch.device) -> Resolution:
    """What ``resolution`` would be under these wishes and no others; for tools."""
    return Bindings(wishes).resolve(op, machine.device_of(device))


def implementation(op: str, device: torch.device | str) -> tuple[str, Callable[..., Any]]:
    """The provider's name and the function that a call of ``op`` on ``device`` would reach, bound on the way.

    For those who have checked their arguments and want the last microsecond, and for tools. Vectors have to be
    contiguous then, numbers Python's, and nothing may require grad. A function that refuses some shapes is returned all
    the same; where measurements choose by shape, it is the one for all other shapes.
    """
    chain = current().bind(CONTRACTS[op], torch.empty(0, device=device).device)
    first = chain.at(0)
    assert first is not None  # a chain without a candidate raises when it is made
    return first.provider, first.function


def serving(op: str, device: torch.device, arguments: dict[str, Any]) -> Bound:
    """Whom a call with these arguments (tensors perhaps on the meta device) would reach on ``device``."""
    contract = CONTRACTS[op]
    chain = current().bind(contract, device)
    return chain.head or chain.first((), arguments)


def who_serves(op: str, arguments: Mapping[str, Any]) -> str:
    """The provider that a call of ``op`` with these arguments reaches under the present settings, bound on the way.

    Args:
        op: One of ``dsv4_backends.OPS``.
        arguments: By name, as the contract wants them.

    Raises:
        ContractError: an argument breaks the contract.
        NoProviderError: nobody serves it.
    """
    return serving(op, CONTRACTS[op].check(**arguments), dict(arguments)).provider


def load_implementation(op: str, target: str) -> Callable[..., Any]:
    """Import one ``package.module:function`` and check its signature; for ``verify`` and the conformance suite.

    Raises:
        NoProviderError: the import failed or the signature is not the contract's.
    """
    try:
        function = load_target(target)
    except (Exception, SystemExit) as error:
        raise NoProviderError(_import_failed(target, error)) from error
    if (mismatch := signature_mismatch(CONTRACTS[op], function)) is not None:
        raise NoProviderError(str(mismatch))
    return function
