"""The modules of Gluon kernels, each imported when first asked for, and whether this Triton has what they use.

Gluon is experimental: its names come, go and change between versions of Triton. A name that is missing costs the
variants whose kernels use it; the plain kernels serve in their place, and a log line and ``explain`` say so.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import logging
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from types import FunctionType, ModuleType
from typing import Any

import triton
from triton.language import core

VARIANTS = {
    "sparse_mla_prefill": ("prefill_hopper", "prefill_ampere"),
    "sparse_mla_decode": ("decode_hopper", "decode_ampere"),
    "mqa_logits": ("logits_hopper",),
    "paged_mqa_logits": (),
    "fp8_einsum": ("einsum_hopper",),
    "hc_prenorm_gemm": ("hyper_connection_hopper",),
}
"""By op, the modules with kernels that go before its plain one."""

_GLUON = "triton.experimental.gluon.language"
_log = logging.getLogger("dsv4_backends")
_logged: set[str] = set()


class Missing:
    """In place of a name that this Triton lacks."""

    def __init__(self, why: str) -> None:
        self.why = why


def either(owner: Any, *names: str) -> Any:
    """The first of the names that ``owner`` has: what it is called in one version of Triton and in another."""
    for name in names:
        if hasattr(owner, name):
            return getattr(owner, name)
    if isinstance(owner, Missing):
        return owner
    return Missing(f"{_called(owner)} has no {' or '.join(names)}")


def _called(owner: Any) -> str:
    return str(getattr(owner, "__name__", type(owner).__name__))


@cache
def variant(name: str) -> Any:
    """A module of this package with Gluon kernels, or None where this Triton lacks a name that they use."""
    if why := missing(name):
        if why not in _logged:
            _logged.add(why)
            _log.warning("triton %s: %s; slower plain kernels serve in place of %s", triton.__version__, why, name)
        return None
    return importlib.import_module(f"{__package__}.{name}")


@cache
def missing(name: str) -> str:
    """What a module of Gluon kernels cannot have from this Triton, in words; empty where all is there."""
    try:
        module = importlib.import_module(f"{__package__}.{name}")
        return next(_unresolved(module), "")
    except Exception as error:  # whatever an experimental interface raises when it has changed
        said = " ".join(str(error).split())
        if found := re.match(r"cannot import name '(\w+)' from '([\w.]+)'", said):
            return f"{found[2]} has no {found[1]}"
        if isinstance(error, ModuleNotFoundError) and error.name:
            return "{} has no {}".format(*error.name.rpartition(".")[::2])
        if isinstance(error, AttributeError) and error.obj is not None:
            return f"{_called(error.obj)} has no {error.name}"
        return f"{type(error).__name__}: {said}"


def _unresolved(module: ModuleType) -> Iterator[str]:
    """Names that are used in a module's functions, and in those of this package that they call, and do not exist."""
    waiting = [f for f in map(_function, vars(module).values()) if f is not None and f.__module__ == module.__name__]
    seen = set(waiting)
    while waiting:
        function = waiting.pop()
        visitor = _Names(function.__globals__)
        visitor.visit(_tree(function))
        yield from visitor.unresolved
        for called in visitor.called - seen:
            seen.add(called)
            waiting.append(called)


def _function(value: Any) -> FunctionType | None:
    """The Python function of this package behind a kernel, or behind a function that is evaluated in one."""
    function = getattr(value, "fn", None)
    ours = isinstance(function, FunctionType) and function.__module__.startswith(f"{__package__}.")
    return function if ours else None


def _tree(function: Callable[..., Any]) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(function)))


class _Names(ast.NodeVisitor):
    """What a function's text uses of Triton: ``gl.x`` and ``mbarrier.y`` by the modules, ``.z`` of values by all
    classes of Gluon together, since what a value is cannot be told from the text.
    """

    def __init__(self, names: dict[str, Any]) -> None:
        self.names = names
        self.unresolved: list[str] = []
        self.called: set[FunctionType] = set()

    def visit_Name(self, node: ast.Name) -> None:
        value = self.names.get(node.id)
        if isinstance(value, Missing):
            self.unresolved.append(value.why)
        elif (function := _function(value)) is not None:
            self.called.add(function)

    def visit_If(self, node: ast.If) -> None:
        # `if PRIVATE:` over a constant of the module has one branch for each version of Triton.
        known = self.names.get(node.test.id) if isinstance(node.test, ast.Name) else None
        if known is None:
            self.generic_visit(node)
        else:
            for child in node.body if getattr(known, "value", known) else node.orelse:
                self.visit(child)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = self._value(node.value)
        if owner is None:
            if node.attr not in _attributes():
                self.unresolved.append(f"no class of Gluon has .{node.attr}")
            self.visit(node.value)
        elif _called(owner).startswith("triton") and not hasattr(owner, node.attr):
            self.unresolved.append(f"{_called(owner)} has no {node.attr}")

    def _value(self, node: ast.AST) -> Any:
        """The module that an expression names, or None."""
        if isinstance(node, ast.Name):
            value = self.names.get(node.id)
        elif isinstance(node, ast.Attribute) and (owner := self._value(node.value)) is not None:
            value = getattr(owner, node.attr, None)
        else:
            return None
        return value if isinstance(value, ModuleType) else None


@cache
def _attributes() -> frozenset[str]:
    """The attributes of what a value in these kernels, or its type, may be: a tensor, a tensor map, shared memory, a
    constant. Not those of the plain language's descriptors and of tensor memory, of which some have the same names.
    """
    found: set[str] = set()
    modules = (m for name, m in list(sys.modules.items()) if name.startswith(("triton.language.core", _GLUON)))
    for kind in {
        value for m in modules if isinstance(m, ModuleType) for value in vars(m).values() if isinstance(value, type)
    }:
        plain = kind.__module__ == core.__name__ and kind.__name__.startswith(("tensor_descriptor", "tuple"))
        if issubclass(kind, (core.base_value, core.base_type)) and not plain and "tensor_memory" not in kind.__name__:
            made = vars(kind).get("__init__")
            found.update(dir(kind), made.__code__.co_names if isinstance(made, FunctionType) else ())
    return frozenset(found)
