"""Binding: the accepted candidates of an op on a device, imported best first, kept by device and policy."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch

from ..contract import CONTRACTS, OpContract
from ..contract.values import checking
from ..errors import NoProviderError
from ..locks import bindings as lock
from ..selection import builds, machine, plugins, policy
from ..selection import preferences as measured
from ..selection.foreign import raised, run, shown
from ..selection.provider import Implementation, ProviderSpec, Reason
from ..selection.resolve import Candidate, Resolution, Served
from ..selection.survey import choose

_log = logging.getLogger("dsv4_backends")


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

    def refusal(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Reason | None:
        """Why it does not take a call of these shapes. A ``refuses`` that is broken refuses."""
        if self.refuses is None:
            return None
        target = self.implementation.refuses
        try:
            reason = self.refuses(*args, **kwargs)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return Reason("refuses-failed", f"{target} {raised(error)}")
        if reason is None or isinstance(reason, Reason):
            return reason
        return Reason("refuses-failed", f"{target} returned {shown(reason)}, expected a Reason or None")


class Chain:
    """The candidates of one resolution, each imported when a call first asks it."""

    def __init__(self, contract: OpContract, resolution: Resolution, check_values: bool = False) -> None:
        self.contract = contract
        self.resolution = resolution
        self.check_values = check_values
        self.bound: list[Bound] = []
        self.by_implementation: dict[int, Bound] = {}
        self.failed: dict[int, Candidate] = {}
        self.warned: set[tuple[str, str]] = set()
        self.by_guard: dict[Hashable, Bound] = {}
        self.by_shape: dict[tuple[torch.Size, torch.Size], tuple[Served, Bound]] = {}
        if resolution.measured:
            for candidate in resolution.accepted:  # nothing is imported while serving
                self.bind(candidate)
        served = self.resolution.serves(ask=self.bind)
        if served.candidate is None:
            raise self.failure("no provider can serve", served.resolution)
        bound = self.bound_of(served)
        self.general = served, bound
        """The provider that serves unless the shapes of a call or a refusal change it."""
        by_shape = served.by == "measured" or bool(served.unless)
        self.always = None if by_shape or bound.refuses is not None else bound
        """The provider that serves all shapes, or None."""

    def bind(self, candidate: Candidate) -> Candidate:
        """Import a candidate, once. It comes back with reasons where that fails."""
        key = id(candidate.implementation)  # valid as long as the resolution
        if key in self.by_implementation:
            return candidate
        with lock:
            if key in self.by_implementation:
                return candidate
            if key in self.failed:
                return self.failed[key]
            found = bind_candidate(self.contract, candidate)
            if isinstance(found, Bound):
                if candidate.warning is not None:
                    self.warn_once(candidate.name, candidate.warning)
                if self.check_values:
                    found.function = checking(self.contract, found.function)
                self.bound.append(found)
                self.by_implementation[key] = found
                return candidate
            for reason in found:
                self.warn_once(candidate.name, reason)
            failed = self.failed[key] = replace(candidate, reasons=found)
            candidates = (failed if c is candidate else c for c in self.resolution.candidates)
            self.resolution = replace(self.resolution, candidates=tuple(candidates))
            return failed

    def bound_of(self, served: Served) -> Bound:
        assert served.candidate is not None
        return self.by_implementation[id(served.candidate.implementation)]

    def by_shapes(self, shapes: tuple[torch.Size, torch.Size]) -> tuple[Served, Bound]:
        """The provider that is tried first for these shapes. A pure function of them."""
        served = self.resolution.serves(shapes, self.bind)
        if len(self.by_shape) >= 4096:  # more shapes than a server has in a day; this bounds the memory
            self.by_shape.clear()
        self.by_shape[shapes] = served, self.bound_of(served)
        return self.by_shape[shapes]

    def warn_once(self, provider: str, reason: Reason) -> None:
        """Log that a better candidate does not serve, and why; once for each provider and reason."""
        if (provider, reason.code) not in self.warned:
            self.warned.add((provider, reason.code))
            _log.warning("%s: %s: %s [%s]", self.contract.name, provider, reason, reason.code)

    def choose(self, guard: Hashable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        """The candidate for a call: found once for all calls that share a guard; None: the call has none."""
        bound = self.by_guard.get(guard)
        if bound is None:
            bound = self.first(args, kwargs)
            if guard is not None:
                keep(self.by_guard, guard, bound)
        return bound

    def first(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        """The first candidate that takes these shapes. A pure function of what a guard compares."""
        if self.resolution.measured:
            shapes = deciding_shapes(self.contract, args, kwargs)
            served, bound = self.by_shape.get(shapes) or self.by_shapes(shapes)
        else:
            served, bound = self.general
        reason = bound.refusal(args, kwargs)
        return bound if reason is None else self.after(served, bound, reason, args, kwargs)

    def after(
        self, served: Served, first: Bound, refused: Reason, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Bound:
        """The first candidate that takes these shapes, where the one that would serve has refused them."""

        def ask(candidate: Candidate) -> Candidate:
            candidate = self.bind(candidate)
            if not candidate.accepted:
                return candidate
            bound = self.by_implementation[id(candidate.implementation)]
            reason = refused if bound is first else bound.refusal(args, kwargs)
            if reason is None:
                return candidate
            self.warn_once(candidate.name, reason)
            return replace(candidate, reasons=(reason,))

        served = served.asked(ask)
        if served.candidate is None:
            raise self.failure("no provider takes these shapes", served.resolution)
        return self.bound_of(served)

    def failure(self, what: str, resolution: Resolution) -> NoProviderError:
        return NoProviderError(f"{what} {resolution.explain()}", resolution)


def deciding_shapes(
    contract: OpContract, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[torch.Size, torch.Size]:
    """The shapes of a call that ``Resolution.serves`` looks at."""
    names = list(contract.args)
    one, two = (args[i] if args else kwargs[names[i]] for i in measured.CLASSES[contract.name].tensors)
    return one.shape, two.shape


def ask(
    contract: OpContract,
    candidate: Candidate,
    arguments: Mapping[str, Any] | None = None,
    load: Callable[[ProviderSpec], builds.Builds] = builds.load,
) -> Candidate:
    """What a call would meet: the candidate, with reasons where it does not import or refuses these arguments.

    Args:
        arguments: Tensors perhaps on the meta device; None: only the import is asked about. A provider that cannot be
            asked with them gets the warning ``shape-unknown``.
        load: As for ``bind_candidate``.
    """
    bound = bind_candidate(contract, candidate, load)
    if isinstance(bound, tuple):
        return replace(candidate, reasons=bound)
    if arguments is None or bound.refuses is None:
        return candidate
    reason = bound.refusal((), arguments)
    if reason is not None and reason.code == "refuses-failed":  # it may want a GPU
        message = f"could not be asked about these shapes: {reason.message}"
        return replace(candidate, warning=Reason("shape-unknown", message))
    return candidate if reason is None else replace(candidate, reasons=(reason,))


def keep(kept: dict[Any, Bound], key: Hashable, bound: Bound) -> None:
    if len(kept) >= 256:  # far more than a contract keeps at a time; those that it dropped are still here
        kept.clear()
    kept[key] = bound


def bind_candidate(
    contract: OpContract, candidate: Candidate, load: Callable[[ProviderSpec], builds.Builds] = builds.load
) -> Bound | tuple[Reason, ...]:
    """Import a candidate's functions and compare their signatures, or say why that failed.

    Args:
        load: How the library behind it is asked; ``builds.load_apart`` does not import it in this process.
    """
    implementation = candidate.implementation
    build = load(candidate.provider).get(contract.name)
    if build is not None and build.reasons:
        return build.reasons
    try:
        function = run(lambda: load_target(implementation.target))
        refuses = run(lambda: load_target(cast("str", implementation.refuses))) if implementation.refuses else None
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return (Reason("import-failed", _import_failed(implementation.target, error), candidate.provider.hint),)
    for loaded in filter(None, (function, refuses)):
        if (mismatch := signature_mismatch(contract, loaded)) is not None:
            return (mismatch,)
    return Bound(candidate.name, implementation, function, refuses)


def _import_failed(target: str, error: BaseException) -> str:
    return f"importing {target} {raised(error)}"


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

    def __init__(self, user_policy: policy.Policy) -> None:
        # Only the environment's deny list keeps a plugin from being imported; a context's works in `resolve`.
        loaded = plugins.load(policy.from_environment().deny, user_policy.strict)
        self.policy = user_policy.validate(loaded.names)
        self.plugins = loaded
        self.installed = machine.Installed()
        self.chains: dict[tuple[str, torch.device], Chain] = {}

    def resolve(
        self, op: str, where: machine.Device, ask: Callable[[ProviderSpec], builds.Builds] | None = None
    ) -> Resolution:
        loaded = self.plugins
        return choose(op, where, self.installed, loaded.providers, self.policy, ask, loaded.absent)

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
    user_policy = policy.active()
    if user_policy is None:
        if _default is None:
            with lock:
                if _default is None:
                    _default = Bindings(policy.from_environment())
        return _default
    if (last := _last_scoped) is not None and last[0] is user_policy:
        return last[1]
    with lock:
        if user_policy not in _scoped:
            _scoped[user_policy] = Bindings(user_policy)
        _last_scoped = user_policy, _scoped[user_policy]
        return _last_scoped[1]


def is_default(bindings: Bindings) -> bool:
    """Whether these are the environment's: not those of a ``use_providers`` block, nor forgotten by ``reset``."""
    return bindings is _default


def reset() -> None:
    """Forget every binding, plugin and counter: the next call resolves again, for a changed environment."""
    global _default, _last_scoped
    with lock:
        _default = _last_scoped = None
        _scoped.clear()
        for cached in fast_path.values():
            cached.clear()
        plugins.forget()
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
        device: A torch device that exists, or a GPU to choose for as ``--device`` does, such as ``"sm_86"``;
            default: the first GPU (or the simulated one), else the CPU.

    Raises:
        PolicyError: an unknown op, or no such device.
    """
    op = policy.known_op(op)
    bindings = current()
    if device is None:
        where = machine.probe().devices[0]
    elif isinstance(device, str) and not _names_torch_device(device):
        return bindings.resolve(op, machine.simulate(device).devices[0], builds.load_apart)
    else:
        exact = machine.torch_device(device)
        if (chain := bindings.chains.get((op, exact))) is not None:
            return chain.resolution  # with what its imports met
        where = machine.device_of(exact)
    return bindings.resolve(op, where)


def _names_torch_device(text: str) -> bool:
    try:
        torch.device(text)
    except RuntimeError:
        return False
    return True


def resolution_under(user_policy: policy.Policy, op: str, device: torch.device) -> Resolution:
    """What ``resolution`` would be under this policy alone; for tools."""
    return Bindings(user_policy).resolve(policy.known_op(op), machine.device_of(device))


def implementation(op: str, device: torch.device | str) -> tuple[str, Callable[..., Any]]:
    """The provider's name and the function that a call of ``op`` on ``device`` would reach, bound on the way.

    Raises:
        PolicyError: an unknown op, or no such device.
        NoProviderError: no provider serves it.

    For those who have checked their arguments and want the last microsecond, and for tools. Vectors have to be
    contiguous then, numbers Python's, and nothing may require grad. A function that refuses some shapes is returned all
    the same; where measurements choose by shape, it is the one that `list` names.
    """
    chain = current().bind(CONTRACTS[policy.known_op(op)], machine.torch_device(device))
    _, bound = chain.general
    return bound.provider, bound.function


def serving(op: str, device: torch.device, arguments: dict[str, Any]) -> Bound:
    """The provider that a call with these arguments (tensors may be on the meta device) would reach on ``device``."""
    contract = CONTRACTS[policy.known_op(op)]
    chain = current().bind(contract, device)
    return chain.always or chain.first((), arguments)


def who_serves(op: str, arguments: Mapping[str, Any]) -> str:
    """The provider that a call of ``op`` with these arguments reaches under the present settings, bound on the way.

    Args:
        op: One of ``dsv4_backends.OPS``.
        arguments: By name, as the contract wants them.

    Raises:
        PolicyError: an unknown op.
        ContractError: an argument breaks the contract.
        NoProviderError: no provider serves it.
    """
    contract = CONTRACTS[policy.known_op(op)]
    contract.require_names(arguments)
    return serving(op, contract.check(**arguments), dict(arguments)).provider


def load_implementation(op: str, target: str) -> Callable[..., Any]:
    """Import one ``package.module:function`` and check its signature; for ``verify`` and the conformance suite.

    Raises:
        PolicyError: an unknown op.
        NoProviderError: the import failed or the signature is not the contract's.
    """
    contract = CONTRACTS[policy.known_op(op)]
    try:
        function = load_target(target)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise NoProviderError(_import_failed(target, error)) from error
    if (mismatch := signature_mismatch(contract, function)) is not None:
        raise NoProviderError(str(mismatch))
    return function
