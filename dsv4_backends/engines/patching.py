"""Names in an engine's modules: what is to replace them, what has replaced them, and their originals."""

from __future__ import annotations

import ast
import importlib
import importlib.machinery
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from ..selection.provider import Reason

PLANNED, REPLACED, REFUSED, FAILED, NOT_NEEDED, UNDONE = (
    "planned",
    "replaced",
    "refused",
    "failed",
    "not needed",
    "undone",
)


@dataclass(frozen=True)
class Target:
    """One name in an engine's module, and its replacement.

    Attributes:
        module: The module that looks it up when it is called.
        attribute: The name; ``Class.method`` for a method.
        op: The op that the replacement calls; empty if it calls none.
        about: Its role in the engine, as text for the user.
        ours: The replacement, as ``module:function``; imported when it is put in place.
        goes_with: The attribute of another target. This one is replaced only if that one is.
        caller: A function of the module that calls it. If its parameters are not in ``signatures``, the target is
            refused.
        signatures: The parameters that ``caller`` may have.
        within: If ``module`` is a native library (``compat.LIBRARIES``): the engine's module that imports it inside its
            functions, and has ``caller``. Our module is put behind the import, so the library need not be installed.
        around: Ours gets the original as its first argument, and calls it if the op does not cover the call. Several
            targets may wrap one name.
        releases: The engine's releases that have it, as specifiers; empty: all that are supported.
        lacking: The compute capabilities on which the engine's own does not work, as a claim
            (``selection/capability.py``). On others it is replaced only if the user asks for a provider of its op.
            Empty: it is replaced on all.
        without: A package that the engine's own needs. Without the package it is replaced on all capabilities; with
            the package and an empty ``lacking`` it is not replaced.
        option: The word in ``DSV4_BACKENDS_ENGINE_OPTIONS`` that turns it on; empty: it is always on.
        kernels: The classes of the engine's kernels that nothing calls after the replacement. The engine's warm-up
            does not compile them.
    """

    module: str
    attribute: str
    op: str
    about: str
    ours: str = ""
    goes_with: str = ""
    caller: str = ""
    signatures: tuple[tuple[str, ...], ...] = ()
    around: bool = False
    releases: str = ""
    lacking: tuple[str, ...] = ()
    without: str = ""
    option: str = ""
    kernels: tuple[str, ...] = ()
    within: str = ""

    @property
    def key(self) -> str:
        return f"{self.module}:{self.attribute}"

    def function(self) -> Callable[..., Any]:
        """The function that ``ours`` names, imported now."""
        module, _, name = self.ours.partition(":")
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return function


@dataclass
class Row:
    """One target and its state in this process.

    Attributes:
        target: What is replaced.
        provider: The provider of its op in general, or the providers if those of several kinds of GPU differ; empty if
            there is no op or no provider.
        serves: The same as text for the user, with what chose it and which other providers serve some shapes.
        state: planned, replaced, refused, failed, not needed, or undone.
        reasons: Why it is not replaced.
        calls: Calls of the replacement in this process.
        passed_on: Calls that no op covers, which the engine's own function got.
    """

    target: Target
    provider: str = ""
    serves: str = ""
    state: str = PLANNED
    reasons: tuple[Reason, ...] = ()
    calls: int = 0
    passed_on: int = 0

    def refuse(self, *reasons: Reason, state: str = REFUSED) -> None:
        self.state, self.reasons = state, reasons


@dataclass
class Patches:
    """Attributes that have been replaced in this process, each with the original."""

    done: list[tuple[ModuleType, str, Any, Any]] = field(default_factory=list)

    def replace(self, module: ModuleType, attribute: str, replacement: Any) -> None:
        holder, name = held(module, attribute)
        self.done.append((module, attribute, standing(module, attribute), replacement))
        setattr(holder, name, replacement)

    def put_back(self, module: ModuleType, attribute: str) -> bool:
        """Restore the original. Returns False, and changes nothing, if other code has replaced it since."""
        last = len(self.done) - 1
        index = next(last - i for i, done in enumerate(reversed(self.done)) if done[:2] == (module, attribute))
        _, _, original, replacement = self.done.pop(index)
        holder, name = held(module, attribute)
        if vars(holder).get(name) is not replacement:
            return False
        setattr(holder, name, original)
        return True

    def undo(self) -> list[str]:
        """Restore everything. Returns the names that other code has replaced since, which stay as they are."""
        names = [(module, attribute) for module, attribute, _, _ in reversed(self.done)]
        return [f"{module.__name__}:{attribute}" for module, attribute in names if not self.put_back(module, attribute)]


def held(module: ModuleType, attribute: str) -> tuple[Any, str]:
    """The object that has an attribute, the module or one of its classes, and the attribute's name in it."""
    owner, _, name = attribute.rpartition(".")
    return (getattr(module, owner) if owner else module), name


def standing(module: ModuleType, attribute: str) -> Any:
    """The current value of an attribute; for a method, the function in its class.

    Raises:
        AttributeError: there is none. A method that the class only inherits counts as missing.
    """
    holder, name = held(module, attribute)
    if not isinstance(holder, type):
        return getattr(holder, name)
    if name not in vars(holder):
        raise AttributeError(f"{holder.__qualname__} has no {name} of its own")
    return vars(holder)[name]


def source_of(module: str) -> Path | None:
    """The source file of a module, found without importing it; None if there is none."""
    package, _, rest = module.partition(".")
    loaded = sys.modules.get(package)
    spec = getattr(loaded, "__spec__", None)
    if loaded is None:
        try:
            spec = importlib.util.find_spec(package)  # imports nothing, since a top-level package has no parents
        except (ImportError, ValueError):
            return None
    for place in (spec.submodule_search_locations or ()) if isinstance(spec, importlib.machinery.ModuleSpec) else ():
        base = Path(place, *rest.split(".")) if rest else Path(place)
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return path
    return None


def structure(path: Path) -> dict[str, tuple[str, ...] | None]:
    """The names that a module's source defines at its top level and in its classes, with the parameters of functions.

    The source is parsed, not run, since importing an engine may need a GPU.
    """
    names: dict[str, tuple[str, ...] | None] = {}

    def visit(statements: list[ast.stmt], within: str = "") -> None:
        for statement in statements:
            if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
                arguments = statement.args
                parts = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
                parts += [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
                names[within + statement.name] = tuple(a.arg for a in parts)
            elif isinstance(statement, ast.ClassDef):
                names[within + statement.name] = None
                visit(statement.body, f"{within}{statement.name}.")
            elif isinstance(statement, (ast.Import, ast.ImportFrom)):
                found = ((a.asname or a.name.partition(".")[0]) for a in statement.names)
                names.update(dict.fromkeys(within + name for name in found))
            elif isinstance(statement, ast.Assign):
                names.update(dict.fromkeys(within + t.id for t in statement.targets if isinstance(t, ast.Name)))
            elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                names[within + statement.target.id] = None
            elif isinstance(statement, (ast.If, ast.Try)):
                visit(statement.body, within)
                visit(statement.orelse, within)
                for handler in getattr(statement, "handlers", ()):
                    visit(handler.body, within)

    visit(ast.parse(path.read_text(encoding="utf-8")).body)
    return names


def misfit(target: Target) -> Reason | None:
    """Why a target cannot be replaced, judged by the source of its module; None if it can."""
    module = target.within or target.module
    path = source_of(module)
    if path is None:
        return Reason("engine-target", f"there is no module {module}")
    names = structure(path)
    if not target.within and target.attribute not in names:
        return Reason("engine-target", f"{target.module} has no {target.attribute}")
    if not target.caller:
        return None
    parameters = names.get(target.caller)
    if parameters is None or parameters not in target.signatures:
        known = " or ".join("(" + ", ".join(signature) + ")" for signature in target.signatures)
        got = "no such function" if parameters is None else "(" + ", ".join(parameters) + ")"
        return Reason("engine-target", f"{module}.{target.caller}: expected {known}, got {got}")
    return None


def takes(function: Callable[..., Any], ours: Callable[..., Any]) -> Reason | None:
    """Why ours cannot replace a function: it has a parameter that ours lacks. None if it can."""
    try:
        theirs = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None  # it has no signature to compare
    known = inspect.signature(ours).parameters
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if set(variadic) <= {p.kind for p in known.values()}:
        return None
    unknown = [p.name for p in theirs if p.kind not in variadic and p.name not in known]
    if unknown:
        name = f"{function.__module__}.{function.__qualname__}"
        return Reason("engine-target", f"{name} has parameters that we do not know: {', '.join(unknown)}")
    return None
