"""The kernels of every op, and why one of them cannot serve: as data.

A kernel is a variant of its op: a file in the op's folder, named after the instruction that it multiplies with. It has

* ``plan(shape)``: its launch configuration for calls of a shape, or None where another kernel is better or must serve;
* ``takes(call)``, where strides or addresses can rule it out: whether it can serve the call;
* ``launch(call, config)``.

Gluon is experimental: its names come, go and change between versions of Triton. A name that is missing costs the
variants that use it; the next in the list serve in their place, and a log line and ``explain`` say so.
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
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache
from types import FunctionType, ModuleType
from typing import Any

from dsv4_backends.provider import Support, support

from .lib.names import Missing, called


@dataclass(frozen=True)
class Variant:
    """One kernel of an op.

    Attributes:
        name: Of its file in the op's folder.
        needs: Compute capabilities, as in ``Implementation``.
        gluon: Written in Gluon: not for Triton's interpreter, and only where this Triton has the names that it uses.
    """

    name: str
    needs: tuple[str, ...] = (">=8.0",)
    gluon: bool = True


@dataclass(frozen=True)
class Op:
    """Where an op is, and its kernels, best first. The last is plain Triton and takes every call.

    Attributes:
        folder: With dots, in this package. Its ``op.py`` has the provider's function.
        batch_invariant: No kernel, tile or split follows from the batch; else a function more has that, see
            ``batch_invariant.py``.
    """

    folder: str
    variants: tuple[Variant, ...]
    batch_invariant: bool = False


_SM_90 = ("==9.0",)
_PORTABLE = Variant("portable", gluon=False)

OPS = {
    "sparse_mla_prefill": Op(
        "sparse_mla.prefill",
        (Variant("wgmma", _SM_90), Variant("mma_sync", ("==8.*", "==12.*")), _PORTABLE),
        batch_invariant=True,
    ),
    "sparse_mla_decode": Op(
        "sparse_mla.decode",
        (
            Variant("mma_sync", ("==8.*", "==9.0", "==12.*")),
            Variant("wgmma", _SM_90),
            Variant("staged", gluon=False),
            _PORTABLE,
        ),
    ),
    "gather_dequant_kv": Op("sparse_mla.gather", (_PORTABLE,), batch_invariant=True),
    "mqa_logits": Op("indexer.mqa_logits", (Variant("wgmma", _SM_90), _PORTABLE)),
    "paged_mqa_logits": Op("indexer.paged_mqa_logits", (_PORTABLE,), batch_invariant=True),
    "indexer_q_rope_quant": Op("indexer.indexer_q_rope_quant", (_PORTABLE,), batch_invariant=True),
    "compress_norm_rope_insert": Op("compressor", (_PORTABLE,), batch_invariant=True),
    "indexer_compress_insert": Op("compressor", (_PORTABLE,), batch_invariant=True),
    "fp8_einsum": Op("projection.fp8_einsum", (Variant("wgmma_few", _SM_90), Variant("wgmma", _SM_90), _PORTABLE)),
    "inverse_rope_quant": Op("projection.inverse_rope_quant", (_PORTABLE,), batch_invariant=True),
    "inverse_rope": Op("projection.inverse_rope", (_PORTABLE,), batch_invariant=True),
    "hc_prenorm_gemm": Op("hyper_connection.hc_prenorm_gemm", (Variant("wgmma", _SM_90), _PORTABLE)),
}

_GLUON = "triton.experimental.gluon.language"
_log = logging.getLogger("dsv4_backends")
_logged: set[str] = set()


_forced: ContextVar[tuple[str, str, Any] | None] = ContextVar("dsv4_backend_triton_forced", default=None)


@contextmanager
def forced(op: str, name: str, config: Any) -> Iterator[None]:
    """Within the block, calls of an op are served by one variant with one configuration: for tools/sweep.py."""
    token = _forced.set((op, name, config))
    try:
        yield
    finally:
        _forced.reset(token)


def run(op: str, call: Any) -> None:
    """Launch the first kernel of an op that takes a call. ``call.shape``: all that a plan may look at, hashable."""
    given = _forced.get()
    if given is not None and given[0] == op:
        load(op, given[1]).launch(call, given[2])
        return
    for takes, launch, config in _choices(op, call.shape):
        if takes is None or takes(call):
            launch(call, config)
            return


def choices(op: str, shape: Any) -> Iterator[tuple[str, Any]]:
    """The variants for calls of a shape, best first, each with its configuration."""
    for variant in OPS[op].variants:
        if (module := usable(op, variant, shape.arch)) and (config := module.plan(shape)) is not None:
            yield variant.name, config


@lru_cache(maxsize=4096)
def _choices(op: str, shape: Any) -> tuple[tuple[Any, Any, Any], ...]:
    made = [(load(op, name), config) for name, config in choices(op, shape)]
    return tuple((getattr(module, "takes", None), module.launch, config) for module, config in made)


def kernels(op: str) -> str:
    """The variants of an op in words, best first."""
    return ", ".join(f"{v.name} ({' or '.join(v.needs)})" for v in OPS[op].variants)


def load(op: str, name: str) -> Any:
    """The file of a variant."""
    return importlib.import_module(f"{__package__}.{OPS[op].folder}.{name}")


@cache
def usable(op: str, variant: Variant, arch: Any) -> Any:
    """The file of a variant, or None where the machine or this Triton rules it out."""
    if support(variant.needs, arch.capability) is not Support.SUPPORTED or (variant.gluon and arch.interpret):
        return None
    if why := missing(op, variant):
        if why not in _logged:
            _logged.add(why)
            _log.warning(slower(op, variant))
        return None
    return load(op, variant.name)


def slower(op: str, variant: Variant) -> str:
    """What it costs that a variant is missing, in words; empty where it is not."""
    import triton

    why = missing(op, variant)
    file = f"{OPS[op].folder}.{variant.name}"
    return why and f"triton {triton.__version__}: {why}; slower plain kernels serve in place of {file}"


@cache
def missing(op: str, variant: Variant) -> str:
    """What a variant cannot have from this Triton, in words; empty where all is there."""
    if not variant.gluon:
        return ""
    try:
        module = load(op, variant.name)
        return next(_unresolved(module), "")
    except Exception as error:  # whatever an experimental interface raises when it has changed
        said = " ".join(str(error).split())
        if found := re.match(r"cannot import name '(\w+)' from '([\w.]+)'", said):
            return f"{found[2]} has no {found[1]}"
        if isinstance(error, ModuleNotFoundError) and error.name:
            return "{} has no {}".format(*error.name.rpartition(".")[::2])
        if isinstance(error, AttributeError) and error.obj is not None:
            return f"{called(error.obj)} has no {error.name}"
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
        waiting += visitor.calls - seen
        seen |= visitor.calls


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
        self.calls: set[FunctionType] = set()

    def visit_Name(self, node: ast.Name) -> None:
        value = self.names.get(node.id)
        if isinstance(value, Missing):
            self.unresolved.append(value.why)
        elif (function := _function(value)) is not None:
            self.calls.add(function)

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
        elif called(owner).startswith("triton") and not hasattr(owner, node.attr):
            self.unresolved.append(f"{called(owner)} has no {node.attr}")

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
