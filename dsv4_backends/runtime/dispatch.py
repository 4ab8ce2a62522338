"""Dispatch: the check of a call's arguments and the jump to the bound provider, as one generated function per op.

Eager calls check the contract and go straight to the bound implementation. Under ``torch.compile`` (and for fake or
other subclassed tensors) the same call is one ``torch.library`` op, ``torch.ops.dsv4_backends.<op>``, or
``<op>_out`` where the caller brings result buffers. An op that writes in place has one form, which mutates.

The ops are for inference. Where grad mode is on and an argument requires grad, a call raises ``ContractError``,
whichever provider would serve it: there is no backward, and nothing is detached silently. Results never require grad.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch

from .. import locks
from ..contract import OpContract
from ..contract.arguments import TensorArg
from ..contract.checker import checked_function, forward_ad, needs_no_grad, needs_no_tangent, transformed
from ..errors import ContractError
from ..selection import policy
from . import bind


def define(contract: OpContract) -> Callable[..., Any]:
    """Make the dispatch of one op, which has the contract's signature, and its two ``torch.library`` ops."""
    names = tuple(contract.args)
    passed = ", ".join(f"{n}={n}" if contract.is_keyword(n) else n for n in names)
    fast_path = bind.fast_path[contract.name] = {}

    def choose(where: Hashable, guard: Hashable, device: torch.device, *args: Any, **kwargs: Any) -> bind.Bound:
        bindings = bind.current()
        chain = bindings.chains.get((contract.name, device)) or bindings.bind(contract, device)
        always = chain.always
        bound, key = (chain.choose(guard, args, kwargs), guard) if always is None else (always, where)
        if key is not None:
            with locks.bindings:
                if bind.is_default(bindings):  # neither of a block's policy, nor forgotten by `reset` meanwhile
                    bind.keep(fast_path, key, bound)
        return bound

    # The usual call passes through the check and these lines only: a provider bound under the default policy, which
    # takes every shape or was asked about a call like this one.
    dispatch = (
        "bound = fast_path.get(where) or fast_path.get(guard)",
        "if bound is None or scope() is not None:",
        f"    bound = choose(where, guard, {names[0]}.device, {passed})",
        "bound.calls += 1",
        f"return bound.function({passed})",
    )
    scope: dict[str, Any] = {"fast_path": fast_path, "scope": policy.active, "choose": choose}
    library = checked_function(contract, (), dispatch, scope, what="check and dispatch, torch.library")
    library_ops = _library_ops(contract, library)
    buffers = contract.buffers
    functional_names = contract.library_names(with_buffers=False)
    buffer_names = contract.library_names(with_buffers=True)
    codes = _e8m0_arguments(contract)

    def as_library_op(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        if all(given.get(buffer) is None for buffer in buffers):
            return library_ops[False](*[given.get(name) for name in functional_names])
        for name in codes:  # Inductor cannot take an op apart that mutates one tensor and is given another as E8M0
            if given[name].dtype is torch.float8_e8m0fnu:
                given[name] = given[name].view(torch.uint8)
        others = library_ops[True](*[given.get(name) for name in buffer_names])
        rest = iter(others if isinstance(others, tuple) else (others,))
        results = tuple(given[name] if name in buffers else next(rest) for name in contract.returns)
        return results if len(results) > 1 else results[0]

    # Other tracers than Dynamo bring tensors of their own class, or are dispatch modes.
    scope |= {"as_library_op": as_library_op, "is_compiling": torch.compiler.is_dynamo_compiling}
    by_library = f"return as_library_op({passed})"
    before = (f"if is_compiling(): {by_library}",)
    call = checked_function(contract, before, dispatch, scope, by_library, what="check and dispatch")
    functools.update_wrapper(call, contract.function)
    call.__module__ = f"{__package__.rpartition('.')[0]}.ops"  # where pickle finds it
    return call


def _e8m0_arguments(contract: OpContract) -> tuple[str, ...]:
    """The arguments that may be E8M0. The library op with buffers takes their bytes as uint8 besides."""
    args = contract.args.items()
    return tuple(n for n, a in args if isinstance(a, TensorArg) and any("e8m0" in form.dtypes for form in a.forms))


def _for_inference(contract: OpContract, name: str, names: tuple[str, ...]) -> None:
    """Let a ``torch.library`` op refuse what requires grad, dual tensors and ``vmap``, as an eager call does."""
    library = torch.library.Library("dsv4_backends", "IMPL")
    _libraries.append(library)  # forgotten, it takes its kernels with it
    levels = forward_ad()
    for key in ("AutogradCPU", "AutogradCUDA"):
        kernel = torch.library.get_kernel(name, key)

        def refuse(keyset: Any, *values: Any, kernel: Any = kernel) -> Any:
            given = dict.fromkeys(contract.args) | dict(zip(names, values, strict=False))
            if torch.is_grad_enabled():
                needs_no_grad(contract, given)
            if levels._current_level >= 0:
                needs_no_tangent(contract, given)
            return kernel.call_boxed(keyset, *values)

        library.impl(name.partition("::")[2], refuse, key, with_keyset=True)

    def batched(info: Any, dims: tuple[Any, ...], *values: Any) -> Any:
        argument = next(n for n, dim in zip(names, dims, strict=False) if dim is not None)
        raise ContractError(transformed(contract, argument, "vmap"))

    torch.library.register_vmap(name, batched, lib=library)


_libraries: list[torch.library.Library] = []


def _library_ops(contract: OpContract, dispatch: Callable[..., Any]) -> dict[bool, Any]:
    """The forms that allocate their results (False) and that write the caller's buffers (True), as far as there are."""
    codes = _e8m0_arguments(contract)

    def with_names(run: Callable[..., Any], *, with_buffers: bool) -> Callable[..., Any]:
        names = contract.library_names(with_buffers=with_buffers)

        def results_of(values: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
            given = dict(zip(names, values, strict=False))  # trailing defaults may be missing
            for name in codes if with_buffers else ():
                if given[name].dtype is torch.uint8:
                    given[name] = given[name].view(torch.float8_e8m0fnu)
            results = run(**given)
            return results if isinstance(results, tuple) else (results,)

        def call(*values: Any) -> Any:
            # A provider may pad rows; compiled code counts on the fake's strides.
            found = zip(contract.returns, results_of(values), strict=True)
            results = tuple(result if name in contract.strided else result.contiguous() for name, result in found)
            return results if len(results) > 1 else results[0]

        def write(*values: Any) -> Any:
            results = results_of(values)
            others = [r for r, name in zip(results, contract.returns, strict=True) if name not in contract.buffers]
            return tuple(others) if len(others) > 1 else others[0] if others else None

        return write if with_buffers else call

    defined: dict[bool, Any] = {}
    for buffers in contract.forms:
        name = contract.library_name(with_buffers=buffers)
        schema, mutated = (contract.out_schema, contract.buffers) if buffers else (contract.schema, ())
        run = with_names(dispatch, with_buffers=buffers)
        op = torch.library.custom_op(f"dsv4_backends::{name}", run, mutates_args=mutated, schema=schema)
        op.register_fake(with_names(contract.function, with_buffers=buffers))
        _for_inference(contract, f"dsv4_backends::{name}", contract.library_names(with_buffers=buffers))
        defined[buffers] = getattr(torch.ops.dsv4_backends, name)
    return defined
