"""The functions that people call. Each is bound to a provider once per device and policy, then called directly.

Eager calls check the contract and go straight to the bound implementation. Under ``torch.compile`` (and for fake or
other subclassed tensors) the same call is one ``torch.library`` op, ``torch.ops.dsv4_backends.<op>``, or
``<op>_out`` where the caller brings result buffers; schema and fake exist from the import of this module on.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from . import builds, machine, measured, plugins, policy
from .contract import CONTRACTS, OpContract
from .contract import hyper_connection as _hyper_connection
from .contract import indexer as _indexer
from .contract import projection as _projection
from .contract import sparse_mla as _sparse_mla
from .contract.models import Model, from_config
from .errors import NoProviderError, PolicyError
from .provider import Implementation, Reason
from .resolve import Candidate, Resolution
from .serving import Limits, calls

_log = logging.getLogger("dsv4_backends")
_lock = threading.RLock()
_F = TypeVar("_F", bound=Callable[..., Any])


class _Bound:
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


class _Chain:
    """The accepted candidates of one resolution, best first, each imported when the ones before it refuse."""

    def __init__(self, contract: OpContract, resolution: Resolution) -> None:
        self.contract = contract
        self.resolution = resolution
        self.bound: list[_Bound] = []
        self.waiting = list(resolution.accepted)
        self.told: set[tuple[str, str]] = set()
        if (first := self.at(0)) is None:
            raise self.failure("no provider can serve")
        # Who serves whatever the shapes are, or None.
        self.head = first if first.refuses is None else None
        self.known: dict[Hashable, _Bound] = {}
        self.by_shape: dict[tuple[torch.Size, torch.Size], _Bound] = {}
        self.measured: tuple[measured.Preference, ...] = ()
        if resolution.measured:
            while self.at(len(self.bound)) is not None:  # nothing is imported while serving
                pass
            names = [bound.provider for bound in self.bound]
            # An import may have failed since, and left another provider first.
            self.measured = tuple(p for p in resolution.measured if p.over == names[0] and p.prefer in names)
            if self.measured:
                self.head = None

    def at(self, index: int) -> _Bound | None:
        """The index-th candidate that imports, or None when there are no more."""
        while len(self.bound) <= index:
            with _lock:
                if len(self.bound) > index:
                    break
                if not self.waiting:
                    return None
                candidate = self.waiting.pop(0)
                bound = _bind(self.contract, candidate)
                if isinstance(bound, tuple):
                    self.reject(candidate, bound)
                else:
                    if candidate.warning is not None:
                        self.tell(candidate.name, candidate.warning)
                    self.bound.append(bound)
        return self.bound[index]

    def preferred(self, shapes: tuple[torch.Size, torch.Size]) -> _Bound:
        """The candidate that measurements put first for these shapes, else the first one. A pure function of them."""
        found = measured.preferred(self.measured, self.contract.name, shapes)
        bound = self.bound[0] if found is None else next(b for b in self.bound if b.provider == found.prefer)
        if len(self.by_shape) >= 4096:  # more than a server meets in a day; but memory has a bound
            self.by_shape.clear()
        self.by_shape[shapes] = bound
        return bound

    def reject(self, candidate: Candidate, reasons: tuple[Reason, ...]) -> None:
        for reason in reasons:
            self.tell(candidate.name, reason)
        self.resolution = replace(
            self.resolution,
            candidates=tuple(replace(c, reasons=reasons) if c is candidate else c for c in self.resolution.candidates),
        )

    def tell(self, provider: str, reason: Reason) -> None:
        """Once for each provider and reason: a better candidate does not serve, and why."""
        if (provider, reason.code) not in self.told:
            self.told.add((provider, reason.code))
            _log.warning("%s: %s: %s [%s]", self.contract.name, provider, reason, reason.code)

    def choose(self, known: Hashable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Bound:
        """The candidate for a call: asked for once where the contract has a name for calls like it, ``known``."""
        bound = self.known.get(known)
        if bound is None:
            bound = self.first(args, kwargs)
            if known is not None:
                _keep(self.known, known, bound)
        return bound

    def first(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Bound:
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
            self.tell(best.provider, reason)
        index = 0
        while (bound := self.at(index)) is not None:
            reason = bound.refuses(*args, **kwargs) if bound.refuses is not None else None
            if reason is None:
                return bound
            self.tell(bound.provider, reason)
            refusals.append(f"  {bound.provider}: {reason}")
            index += 1
        raise self.failure("no provider takes these shapes", "\n".join(["", "for this call:", *refusals]))

    def failure(self, what: str, more: str = "") -> NoProviderError:
        return NoProviderError(f"{what} {self.resolution.explain()}{more}", self.resolution)


def _keep(kept: dict[Any, _Bound], key: Hashable, bound: _Bound) -> None:
    if len(kept) >= 256:  # far more than a contract knows at a time; but those that it forgot stay here
        kept.clear()
    kept[key] = bound


def _bind(contract: OpContract, candidate: Candidate) -> _Bound | tuple[Reason, ...]:
    """Import a candidate's functions and compare their signatures, or say why that failed."""
    implementation = candidate.implementation
    build = builds.load(candidate.provider).get(contract.name)
    if build is not None and build.reasons:
        return build.reasons
    try:
        function = _load(implementation.target)
        refuses = _load(implementation.refuses) if implementation.refuses else None
    except (Exception, SystemExit) as error:
        return (Reason("import-failed", _import_failed(implementation.target, error), candidate.provider.hint),)
    for loaded in filter(None, (function, refuses)):
        if (mismatch := signature_mismatch(contract, loaded)) is not None:
            return (mismatch,)
    return _Bound(candidate.name, implementation, function, refuses)


def _import_failed(target: str, error: BaseException) -> str:
    return f"importing {target} raised {type(error).__name__}: {' '.join(str(error).split())}"


def _load(target: str) -> Callable[..., Any]:
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


class _Bindings:
    """Chains by op and device under one policy."""

    def __init__(self, wishes: policy.Policy) -> None:
        # Only the environment's deny list keeps a plugin from being imported; a context's works in `resolve`.
        loaded = plugins.load(policy.from_environment().deny, wishes.strict)
        self.policy = wishes.validate(loaded.names)
        self.plugins = loaded
        self.installed = machine.Installed()
        self.chains: dict[tuple[str, torch.device], _Chain] = {}

    def resolve(self, op: str, where: machine.Device) -> Resolution:
        return builds.choose(op, where, self.installed, self.plugins.providers, self.policy)

    def bind(self, contract: OpContract, device: torch.device) -> _Chain:
        with _lock:
            key = (contract.name, device)
            if (chain := self.chains.get(key)) is None:
                where = machine.device_of(device)
                resolution = self.resolve(contract.name, where)
                chain = self.chains[key] = _Chain(contract, resolution)
            return chain


_default: _Bindings | None = None
_default_heads: dict[str, dict[Hashable, _Bound]] = {}
"""What a call under the environment's policy reaches without a further look: by op, then by device, or where shapes
decide by the contract's name for calls like it."""
_scoped: dict[policy.Policy, _Bindings] = {}
_last_scoped: tuple[policy.Policy, _Bindings] | None = None
"""The same for the policy object that was last active: to compare two policies takes longer than a call may."""


def _bindings() -> _Bindings:
    global _default, _last_scoped
    wishes = policy.active()
    if wishes is None:
        if _default is None:
            with _lock:
                if _default is None:
                    _default = _Bindings(policy.from_environment())
        return _default
    if (last := _last_scoped) is not None and last[0] is wishes:
        return last[1]
    with _lock:
        if wishes not in _scoped:
            _scoped[wishes] = _Bindings(wishes)
        _last_scoped = wishes, _scoped[wishes]
        return _last_scoped[1]


def reset() -> None:
    """Forget every binding, plugin and counter: the next call resolves anew, for a changed environment."""
    global _default, _last_scoped
    with _lock:
        _default = _last_scoped = None
        _scoped.clear()
        for heads in _default_heads.values():
            heads.clear()
        plugins.load.cache_clear()
        builds.forget()


def stats() -> dict[str, dict[str, int]]:
    """Calls since the start (or ``reset``): ``{op: {provider: calls}}``.

    A call that a CUDA graph captured counts once, at capture: a replay does not pass through Python.
    """
    counts: dict[str, dict[str, int]] = {}
    with _lock:
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
    bindings = _bindings()
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
    return _Bindings(wishes).resolve(op, machine.device_of(device))


def implementation(op: str, device: torch.device | str) -> tuple[str, Callable[..., Any]]:
    """The provider's name and the function that a call of ``op`` on ``device`` would reach, bound on the way.

    For those who have checked their arguments and want the last microsecond, and for tools. A function that refuses
    some shapes is returned all the same; where measurements choose by shape, it is the one for all other shapes.
    """
    chain = _bindings().bind(CONTRACTS[op], torch.empty(0, device=device).device)
    first = chain.at(0)
    assert first is not None  # a chain without a candidate raises when it is made
    return first.provider, first.function


def _serving(op: str, device: torch.device, arguments: dict[str, Any]) -> _Bound:
    """Whom a call with these arguments (tensors perhaps on the meta device) would reach on ``device``."""
    contract = CONTRACTS[op]
    chain = _bindings().bind(contract, device)
    return chain.head or chain.first((), arguments)


def workspace_bytes(op: str, device: torch.device | str, **arguments: Any) -> int | None:
    """Device memory that a call would allocate beyond its results, from shapes alone; nothing is launched.

    Args:
        op: One of ``dsv4_backends.OPS``.
        device: Where the call would run.
        arguments: The call's arguments; tensors may be on any device, ``meta`` included.

    Returns:
        Bytes, or None where the provider that would serve does not tell.

    Raises:
        ContractError: an argument breaks the contract.
        NoProviderError: nobody would serve the call.
    """
    without_storage = {k: _without_storage(v) for k, v in arguments.items()}
    CONTRACTS[op].check(**without_storage)
    where = torch.empty(0, device=device).device
    bound = _serving(op, where, without_storage)
    target = bound.implementation.workspace
    return None if target is None else int(_load(target)(op, without_storage, where))


def _without_storage(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or value.device.type == "meta":
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def warmup(
    model: str | Path | Model,
    *,
    tp: int = 1,
    limits: Limits | None = None,
    device: torch.device | str | None = None,
    ops: Iterable[str] = tuple(CONTRACTS),
    progress: Callable[[str], None] | None = None,
) -> dict[str, dict[str, int]]:
    """Compile, and load on a device, everything that serving a model within limits can ask of the chosen providers.

    Afterwards nothing compiles while serving, and graphs can be captured at once. What is compiled stays in the
    provider's own cache on disk, so that the next process only loads it.

    Args:
        model: ``"flash"``, ``"pro"``, a ``config.json`` or its folder, or a ``contract.models.Model``.
        tp: Tensor parallel size.
        limits: How far the server goes; default: ``serving.Limits()``.
        device: Default: the current GPU, or the CPU.
        ops: Only these.
        progress: Gets a line of text before each op.

    Returns:
        By op, the kernels that each provider made ready. A provider that compiles nothing ahead is there with 0.

    Raises:
        ValueError: not a model, or its heads do not divide by ``tp``.
        NoProviderError: a call within the limits would find no provider.
    """
    rank = (model if isinstance(model, Model) else from_config(model)).rank(tp)
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    where = torch.empty(0, device=device).device
    here = machine.device_of(where).capability
    packed = here is not None and here.major >= 10
    ready: dict[str, dict[str, int]] = {}
    for op in ops:
        if progress is not None:
            progress(f"warming up {op}")
        wanted = calls(op, rank, limits or Limits(), packed_scales=packed)
        if (head := _bindings().bind(CONTRACTS[op], where).head) is not None:
            by_provider: dict[_Bound, Iterable[dict[str, Any]]] = {head: wanted}
        else:
            shared: dict[_Bound, list[dict[str, Any]]] = {}
            for arguments in wanted:
                shared.setdefault(_serving(op, where, arguments), []).append(arguments)
            by_provider = {**shared}
        made = ready[op] = {}
        for bound, theirs in by_provider.items():
            target = bound.implementation.warmup
            made[bound.provider] = 0 if target is None else int(_load(target)(op, theirs, where))
    return ready


def who_serves(op: str, arguments: Mapping[str, Any]) -> str:
    """The provider that a call of ``op`` with these arguments reaches under the present settings, bound on the way.

    Args:
        op: One of ``dsv4_backends.OPS``.
        arguments: By name, as the contract wants them.

    Raises:
        ContractError: an argument breaks the contract.
        NoProviderError: nobody serves it.
    """
    return _serving(op, CONTRACTS[op].check(**arguments), dict(arguments)).provider


def load_implementation(op: str, target: str) -> Callable[..., Any]:
    """Import one ``package.module:function`` and check its signature; for ``verify`` and the conformance suite.

    Raises:
        NoProviderError: the import failed or the signature is not the contract's.
    """
    try:
        function = _load(target)
    except (Exception, SystemExit) as error:
        raise NoProviderError(_import_failed(target, error)) from error
    if (mismatch := signature_mismatch(CONTRACTS[op], function)) is not None:
        raise NoProviderError(str(mismatch))
    return function


def _define(function: _F) -> _F:
    """Make the public function of one contract, and its two ``torch.library`` ops."""
    contract = CONTRACTS[function.__name__]
    names = tuple(contract.args)
    passed = ", ".join(f"{n}={n}" if contract.is_keyword(n) else n for n in names)
    heads = _default_heads[contract.name] = {}

    def choose(where: Hashable, known: Hashable, device: torch.device, *args: Any, **kwargs: Any) -> _Bound:
        bindings = _bindings()
        chain = bindings.chains.get((contract.name, device)) or bindings.bind(contract, device)
        bound, key = (chain.choose(known, args, kwargs), known) if chain.head is None else (chain.head, where)
        if key is not None:
            with _lock:
                if bindings is _default:  # neither of a block's policy, nor forgotten by `reset` meanwhile
                    _keep(heads, key, bound)
        return bound

    # The usual call passes through the check and these lines only: a provider bound under the default policy, which
    # takes every shape or was asked about a call like this one.
    dispatch = (
        "bound = heads.get(where) or heads.get(known)",
        "if bound is None or scope() is not None:",
        f"    bound = choose(where, known, {names[0]}.device, {passed})",
        "bound.calls += 1",
        f"return bound.function({passed})",
    )
    scope: dict[str, Any] = {"heads": heads, "scope": policy.active, "choose": choose}
    functional, with_buffers = _library_ops(contract, contract.checked_function((), dispatch, scope))
    buffers = contract.buffers
    functional_names = contract.library_names(with_buffers=False)
    buffer_names = contract.library_names(with_buffers=True)

    def as_library_op(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        if all(given.get(buffer) is None for buffer in buffers):
            return functional(*[given.get(name) for name in functional_names])
        others = with_buffers(*[given.get(name) for name in buffer_names])
        rest = iter(others if isinstance(others, tuple) else (others,))
        results = tuple(given[name] if name in buffers else next(rest) for name in contract.returns)
        return results if len(results) > 1 else results[0]

    # Other tracers than Dynamo bring tensors of their own class.
    scope |= {"as_library_op": as_library_op, "is_compiling": torch.compiler.is_dynamo_compiling}
    subclassed = f"type({names[0]}) is not Tensor and isinstance({names[0]}, Tensor)"
    by_library = f"if is_compiling() or ({subclassed}): return as_library_op({passed})"
    call = contract.checked_function((by_library,), dispatch, scope)
    return cast("_F", functools.update_wrapper(call, function))


def _library_ops(contract: OpContract, dispatch: Callable[..., Any]) -> tuple[Any, Any]:
    def with_names(run: Callable[..., Any], *, with_buffers: bool) -> Callable[..., Any]:
        names = contract.library_names(with_buffers=with_buffers)

        def results_of(values: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
            results = run(**dict(zip(names, values, strict=False)))  # trailing defaults may be missing
            return results if isinstance(results, tuple) else (results,)

        def call(*values: Any) -> Any:
            # A provider may pad rows; compiled code counts on the fake's strides.
            results = tuple(result.contiguous() for result in results_of(values))
            return results if len(results) > 1 else results[0]

        def write(*values: Any) -> Any:
            results = results_of(values)
            others = [r for r, name in zip(results, contract.returns, strict=True) if name not in contract.buffers]
            return tuple(others) if len(others) > 1 else others[0] if others else None

        return write if with_buffers else call

    name = f"dsv4_backends::{contract.name}"
    for suffix, schema, buffers in (
        ("", contract.schema, ()),
        ("_out", contract.out_schema, contract.buffers),
    ):
        run = with_names(dispatch, with_buffers=bool(buffers))
        defined = torch.library.custom_op(name + suffix, run, mutates_args=buffers, schema=schema)
        defined.register_fake(with_names(contract.function, with_buffers=bool(buffers)))
    namespace = torch.ops.dsv4_backends
    return getattr(namespace, contract.name), getattr(namespace, f"{contract.name}_out")


sparse_mla_prefill = _define(_sparse_mla.sparse_mla_prefill)
sparse_mla_decode = _define(_sparse_mla.sparse_mla_decode)
mqa_logits = _define(_indexer.mqa_logits)
paged_mqa_logits = _define(_indexer.paged_mqa_logits)
fp8_einsum = _define(_projection.fp8_einsum)
hc_prenorm_gemm = _define(_hyper_connection.hc_prenorm_gemm)

__all__ = [
    "fp8_einsum",
    "hc_prenorm_gemm",
    "implementation",
    "mqa_logits",
    "paged_mqa_logits",
    "reset",
    "resolution",
    "sparse_mla_decode",
    "sparse_mla_prefill",
    "stats",
    "who_serves",
]
