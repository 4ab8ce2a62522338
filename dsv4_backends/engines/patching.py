"""What is to be replaced in an engine, what has been, and the way back."""

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
    """One name in an engine's module.

    Attributes:
        module: The module that looks it up when it is called.
        attribute: The name; ``Class.method`` for a method.
        op: The op behind the replacement; empty where there is none.
        about: What it is to the engine, for people.
        ours: What stands there instead, as ``module:function``; imported when it is put there.
        goes_with: The attribute of the target beside which alone it makes sense.
        caller: A function of the module that calls it, and ``signatures``: the parameters it may have. A version of
            the engine whose caller has others is not guessed at.
        within: The engine's module that imports ``module`` when it calls it, where that is a native library
            (``compat.LIBRARIES``): ours goes in front of the library, which need not be installed. ``caller`` is in
            this module.
        around: Ours gets what stood there as its first argument, and calls it for what is not ours. Several targets
            may then stand around one name.
        releases: The engine's releases that have it, as specifiers; empty: all that are supported.
        lacking: The compute capabilities on which the engine's own does not work, as a claim
            (``selection/capability.py``); empty: on all. Elsewhere it is replaced only where the user asks for a
            provider of its op.
        without: A package that the engine's own needs: where it is missing, the engine's own works nowhere. With
            ``lacking`` empty, ours is for that alone.
        option: The word of ``DSV4_BACKENDS_ENGINE_OPTIONS`` without which it is left alone.
        kernels: The engine's own kernels, by class, that nothing calls once it is replaced: an engine that compiles
            ahead need not compile them.
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
        """What ``ours`` names."""
        module, _, name = self.ours.partition(":")
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return function


@dataclass
class Row:
    """One target and its state in this process.

    Attributes:
        target: What is replaced.
        provider: Who serves its op in general; empty where there is no op or no provider. Where the machine has
            several kinds of GPU, and different providers serve them, all of these.
        serves: The same with why and who else does, for people.
        state: planned, replaced, refused, failed, not needed, or undone.
        reasons: Why it is not replaced.
        calls: Calls of the replacement in this process.
        passed_on: Calls that no op stands for, and that the engine's own function got.
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
        """Put back the original; False if other code has replaced it since: then nothing changes."""
        last = len(self.done) - 1
        index = next(last - i for i, done in enumerate(reversed(self.done)) if done[:2] == (module, attribute))
        _, _, original, replacement = self.done.pop(index)
        holder, name = held(module, attribute)
        if vars(holder).get(name) is not replacement:
            return False
        setattr(holder, name, original)
        return True

    def undo(self) -> list[str]:
        """Put back everything; the names that other code has replaced since are left alone."""
        names = [(module, attribute) for module, attribute, _, _ in reversed(self.done)]
        return [f"{module.__name__}:{attribute}" for module, attribute in names if not self.put_back(module, attribute)]


def held(module: ModuleType, attribute: str) -> tuple[Any, str]:
    """What holds an attribute, the module or one of its classes, and the name that it has there."""
    owner, _, name = attribute.rpartition(".")
    return (getattr(module, owner) if owner else module), name


def standing(module: ModuleType, attribute: str) -> Any:
    """The present value; of a method the function, as its class holds it.

    Raises:
        AttributeError: nothing does. A method that is only inherited stands in another class.
    """
    holder, name = held(module, attribute)
    if not isinstance(holder, type):
        return getattr(holder, name)
    if name not in vars(holder):
        raise AttributeError(f"{holder.__qualname__} has no {name} of its own")
    return vars(holder)[name]


def source_of(module: str) -> Path | None:
    """The file of a module that need not be imported, found from its top-level package; None where there is none."""
    package, _, rest = module.partition(".")
    loaded = sys.modules.get(package)
    spec = getattr(loaded, "__spec__", None)
    if loaded is None:
        try:
            spec = importlib.util.find_spec(package)  # imports nothing: it has no parents
        except (ImportError, ValueError):
            return None
    for place in (spec.submodule_search_locations or ()) if isinstance(spec, importlib.machinery.ModuleSpec) else ():
        base = Path(place, *rest.split(".")) if rest else Path(place)
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return path
    return None


def structure(path: Path) -> dict[str, tuple[str, ...] | None]:
    """The names that a module's source defines at its top level, and its classes' methods; for a function, its
    parameters.

    Read without running it, so it can be asked about an engine whose import would need a GPU.
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
    """Why a target cannot be where it is expected, by the source of its module; None where it can."""
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
    """Why ours cannot replace a function: a parameter that ours does not have; None where it can."""
    try:
        theirs = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None  # nothing to compare: its callers decide
    known = inspect.signature(ours).parameters
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if set(variadic) <= {p.kind for p in known.values()}:
        return None
    unknown = [p.name for p in theirs if p.kind not in variadic and p.name not in known]
    if unknown:
        name = f"{function.__module__}.{function.__qualname__}"
        return Reason("engine-target", f"{name} has parameters that we do not know: {', '.join(unknown)}")
    return None
