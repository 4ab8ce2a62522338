"""Names of Triton that some of its versions lack."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from types import FunctionType, ModuleType
from typing import Any

_GLUON = "triton.experimental.gluon.language"
_PACKAGE = __name__.partition(".")[0]


class Missing:
    """Replaces a name that this Triton lacks."""

    def __init__(self, why: str) -> None:
        self.why = why


def either(owner: Any, *names: str) -> Any:
    """The first of the names that ``owner`` has. Versions of Triton have different names for it."""
    for name in names:
        if hasattr(owner, name):
            return getattr(owner, name)
    if isinstance(owner, Missing):
        return owner
    return Missing(f"{called(owner)} has no {' or '.join(names)}")


def called(owner: Any) -> str:
    return str(getattr(owner, "__name__", type(owner).__name__))


def unresolved(module: ModuleType) -> Iterator[str]:
    """Names of Triton that do not exist and are used in a module's functions, or in those of this package that they
    call: ``gl.x`` and ``mbarrier.y`` by the modules, ``.z`` of values by all classes of Gluon together, since the text
    does not say what a value is.
    """
    waiting = [f for f in map(_function, vars(module).values()) if f is not None and f.__module__ == module.__name__]
    seen = set(waiting)
    while waiting:
        function = waiting.pop()
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
            value = _value(node, function.__globals__)
            if isinstance(value, Missing):
                yield value.why
            elif (called_here := _function(value)) is not None:
                waiting += {called_here} - seen
                seen.add(called_here)
            elif value is None and isinstance(node, ast.Attribute):
                owner = _value(node.value, function.__globals__)
                if isinstance(owner, ModuleType):
                    yield f"{called(owner)} has no {node.attr}"
                elif node.attr not in _attributes():
                    yield f"no class of Gluon has .{node.attr}"


def _value(node: ast.AST, names: dict[str, Any]) -> Any:
    """The value of a global name or of a module's attribute; None for everything else."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and isinstance(owner := _value(node.value, names), ModuleType):
        return getattr(owner, node.attr, None)
    return None


def _function(value: Any) -> FunctionType | None:
    """The Python function of this package behind a kernel, or behind a function that is evaluated in one."""
    function = getattr(value, "fn", None)
    ours = isinstance(function, FunctionType) and function.__module__.startswith(f"{_PACKAGE}.")
    return function if ours else None


@cache
def _attributes() -> frozenset[str]:
    """The attributes of what a value in these kernels, or its type, may be: a tensor, a tensor map, shared memory, a
    constant. Not those of the plain language's descriptors and of tensor memory, of which some have the same names.
    """
    from triton.language import core

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
