"""For authors of probes: who owns a module, and which parameters a function has. Neither imports the module."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from .foreign import words
from .provider import Reason


@dataclass(frozen=True)
class Library:
    """Where a module was found.

    Attributes:
        module: What to import; empty where it was not found.
        folder: Its files.
        build: Distribution and version, or how else it came here.
        owners: Every distribution that has the module.
        reasons: What metadata and files say against it.
    """

    module: str = ""
    folder: Path | None = None
    build: str = ""
    owners: tuple[str, ...] = ()
    reasons: tuple[Reason, ...] = ()


def _folder(package: str) -> Path | None:
    """The files of a top-level package, which is not imported."""
    try:
        spec = importlib.util.find_spec(package)
    except Exception:  # finders are other people's too
        return None
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0]) if places else None


def _version(folder: Path) -> str:
    """What the files of a package say of its version, in words that begin with a space; empty if nothing."""
    for name, pattern in (("__init__.py", r"^__version__ = ['\"]([^'\"]+)"), ("VERSION", r"^\s*(\S+)")):
        path = folder / name
        if path.is_file() and (
            match := re.search(pattern, path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        ):
            return f" {match[1]}"
    return ""


def find_library(module: str, distributions: Mapping[str, str], vendored: Mapping[str, str], hint: str) -> Library:
    """Find a module that several distributions own.

    Args:
        module: A top-level package.
        distributions: Those known to own it, with the versions that fit, e.g. ``{"tokenspeed-deepgemm": ">=2.5"}``.
            Their versions cannot be compared with each other.
        vendored: Distributions that bring a copy under a name of their own, to that name. Used where nothing owns the
            module itself.
        hint: What to install where there is nothing.
    """
    versions = {}
    for name in (*distributions, *vendored):
        try:
            found: str | None = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        except Exception as error:
            found = f"of a version that cannot be read ({words(error)})"
        if found is not None:  # a folder without metadata
            versions[name] = found
    owners = [name for name in distributions if name in versions]
    copies = {}
    for name, path in vendored.items():
        package, *inner = path.split(".")
        place = _folder(package) if name in versions else None
        if place is not None and place.joinpath(*inner).is_dir():
            copies[name] = place.joinpath(*inner)
    sources = (*(f"{name} {versions[name]}" for name in owners), *(f"the copy in {n} {versions[n]}" for n in copies))
    folder = _folder(module)
    if folder is not None:
        build = f"{owners[0]} {versions[owners[0]]}" if owners else f"{module}{_version(folder)} without a distribution"
        sources = sources if owners else (build, *sources)
        return Library(module, folder, build, sources, _objections(module, owners, versions, distributions))
    if owners:
        message = f"{sources[0]} is installed and the package {module} cannot be found"
        reason = Reason("module-missing", message, f"pip install --force-reinstall {owners[0]}")
        return Library(build=sources[0], owners=sources, reasons=(reason,))
    for name, place in copies.items():
        return Library(vendored[name], place, f"{module} in {name} {versions[name]}", sources)
    return Library(reasons=(Reason("distribution-missing", f"{module} is not installed", hint),))


def _objections(
    module: str, owners: list[str], versions: Mapping[str, str], distributions: Mapping[str, str]
) -> tuple[Reason, ...]:
    if len(owners) > 1:
        both = " and ".join(f"{name} {versions[name]}" for name in owners)
        message = f"{both} both own the module {module}, and the files of one have overwritten the other's"
        return (Reason("library-owners", message, f"pip uninstall {' '.join(owners)}, then install one of them"),)
    for name in owners:
        try:
            fits = SpecifierSet(distributions[name]).contains(Version(versions[name]), prereleases=True)
        except InvalidVersion:
            fits = False
        if not fits:
            message = f"{name} {versions[name]} is installed, needs {distributions[name]}"
            return (Reason("distribution-version", message, f"pip install -U '{name}{distributions[name]}'"),)
    return ()


@dataclass(frozen=True)
class Parameter:
    """One parameter of a library's function."""

    name: str
    required: bool


def parameters(function: Callable[..., Any]) -> tuple[Parameter, ...] | None:
    """The parameters of a Python function, a ``torch.ops`` function, or a pybind11 function; None if they are unknown.

    A pybind11 function has no signature that ``inspect`` can read; the first line of its docstring is one.
    """
    schema = getattr(getattr(function, "default", function), "_schema", None)
    if schema is not None:
        return tuple(Parameter(a.name, not a.has_default_value()) for a in schema.arguments)
    try:
        found = inspect.signature(function).parameters.values()
        rest = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        return tuple(Parameter(p.name, p.default is p.empty and p.kind not in rest) for p in found)
    except (TypeError, ValueError):
        pass
    name = re.escape(getattr(function, "__name__", ""))
    match = re.match(rf"{name}\((.*)\) -> [^\n]*", (function.__doc__ or "").partition("\n")[0])
    if not match or match[1].startswith("*args"):  # overloads
        return None
    parts, depth, quoted = [""], 0, ""
    for character in match[1]:
        if quoted:
            quoted = "" if character == quoted else quoted
        elif character in "'\"":
            quoted = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += character
    pieces = [part.strip() for part in parts if part.strip()]
    return tuple(Parameter(re.split(r"[:=\s]", piece)[0], " = " not in piece) for piece in pieces)


def accepts(function: Callable[..., Any], *forms: tuple[str, ...]) -> str:
    """Whether a function can be called with one of these lists of leading arguments; if not, what it has, in words."""
    have = parameters(function)
    if have is None:
        return "no signature that can be read"
    names = tuple(p.name for p in have)
    for form in forms:
        if names[: len(form)] == form and not any(p.required for p in have[len(form) :]):
            return ""
    return f"({', '.join(names)})"


__all__ = ["Library", "Parameter", "accepts", "find_library", "parameters", "words"]
