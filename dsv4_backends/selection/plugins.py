"""Load the plugins, each on its own, so that a broken one is a row in a table and nothing worse."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from importlib.metadata import EntryPoint
from typing import Any

import pluggy
from packaging.utils import canonicalize_name

from ..errors import PluginError
from ..locks import bindings
from .foreign import identity, raised, run, shown, words
from .hookspecs import PROJECT, Hookspecs
from .provider import API_VERSION, Implementation, ProviderSpec, Reason

GROUP = "dsv4_backends"
IN_TREE = "dsv4-backends"
"""Our own distribution: its providers take their names first."""
_MOST = 256
"""The most items that are read from a hook, which may be an endless generator."""
_HEADER = re.compile(rb"^[ \t]*\[[ \t]*" + GROUP.encode() + rb"[ \t]*(\]?)[ \t\r]*$", re.MULTILINE)
"""The header of our group in ``entry_points.txt``, with or without its closing bracket."""


@dataclass(frozen=True)
class Plugin:
    """One entry point and what became of it."""

    name: str
    target: str
    distribution: str
    version: str
    providers: tuple[ProviderSpec, ...]
    problems: tuple[Reason, ...]

    @property
    def origin(self) -> str:
        return f"{self.distribution} {self.version}".rstrip()


@dataclass(frozen=True)
class Plugins:
    """All plugins of this environment, in a fixed order (ours, then by distribution and name)."""

    plugins: tuple[Plugin, ...]

    @property
    def providers(self) -> tuple[ProviderSpec, ...]:
        return tuple(provider for plugin in self.plugins for provider in plugin.providers)

    @property
    def names(self) -> frozenset[str]:
        """Every name that a user may type: providers, and plugins that gave none."""
        return frozenset(p.name for p in self.providers) | frozenset(p.name for p in self.plugins)

    @property
    def absent(self) -> dict[str, tuple[Reason, ...]]:
        """The plugins that gave no provider, with the reasons: denied, or broken."""
        return {p.name: p.problems for p in self.plugins if p.problems and not p.providers}

    @property
    def broken(self) -> tuple[Plugin, ...]:
        return tuple(p for p in self.plugins if any(r.code != "denied" for r in p.problems))


def load(deny: frozenset[str] = frozenset(), strict: bool = False) -> Plugins:
    """Load every entry point of the group ``dsv4_backends``; done once per process and setting.

    Args:
        deny: Names of plugins whose module is not even imported.
        strict: Raise ``PluginError`` for the first broken plugin instead of recording it.
    """
    with bindings:  # a fork waits, else the child would wait for an import that never ends
        found = _load(deny)
    if strict and found.broken:
        plugin = found.broken[0]
        problem = next(r for r in plugin.problems if r.code != "denied")
        raise PluginError(f"plugin {plugin.name!r} of {plugin.origin}: {problem}")
    return found


def forget() -> None:
    """Forget all plugins: the next call loads them again."""
    _load.cache_clear()


@lru_cache(maxsize=8)
def _load(deny: frozenset[str]) -> Plugins:
    unreadable, points = _entry_points()
    plugins = list(unreadable)
    owners: dict[str, str] = {}
    for point in sorted(points, key=lambda p: (_dist(p)[0] != IN_TREE, _dist(p), p.name)):
        distribution, version = _dist(point)
        origin = f"{distribution} {version}".rstrip()
        specs: list[ProviderSpec] = []
        problems: list[Reason] = []
        if point.name in deny:
            problems.append(Reason("denied", "denied by DSV4_BACKENDS_DENY; it was not imported"))
        else:
            specs, problems = _load_one(point, origin)
        kept = []
        for spec in specs:
            if spec.name in owners:
                problems.append(
                    Reason(
                        "plugin-duplicate",
                        f"provider {spec.name!r} of {origin} is left out: {owners[spec.name]} provides that name",
                        "uninstall one of the two, or ask its author to rename it",
                    )
                )
            else:
                owners[spec.name] = origin
                kept.append(spec)
        plugins.append(Plugin(point.name, point.value, distribution, version, tuple(kept), tuple(problems)))
    return Plugins(tuple(plugins))


def _entry_points() -> tuple[list[Plugin], list[EntryPoint]]:
    """The plugins whose entry points cannot be read, and the entry points of all others.

    ``importlib.metadata.entry_points`` would raise for the first distribution, ours or not, that it cannot read.
    """
    unreadable: list[Plugin] = []
    points: list[EntryPoint] = []
    seen: set[str] = set()
    try:
        for distribution in metadata.distributions():
            name, version = identity(distribution)
            if (canonical := canonicalize_name(name)) in seen:  # the first on the path is the one that is imported
                continue
            seen.add(canonical)
            try:
                ours = distribution.entry_points.select(group=GROUP)
                if not ours and (header := _HEADER.search(_raw(distribution))) and not header[1]:
                    raise ValueError(f"the header [{GROUP} has no closing bracket")
                points += ours
            except Exception as error:
                # A decoding error has the bytes of the file. Files without our group do not matter here.
                raw = error.object if isinstance(error, UnicodeDecodeError) else _raw(distribution)
                if _HEADER.search(raw):
                    message = f"entry_points.txt cannot be read: {words(error)}"
                    hint = f"reinstall {name}, or report it to its author"
                    unreadable.append(Plugin(name, "", name, version, (), (Reason("plugin-metadata", message, hint),)))
    except Exception as error:
        message = f"the list of installed distributions breaks off: {words(error)}"
        unreadable.append(Plugin("-", "", "unknown distribution", "", (), (Reason("plugin-metadata", message),)))
    return unreadable, points


def _raw(distribution: metadata.Distribution) -> bytes:
    try:
        return (distribution.read_text("entry_points.txt") or "").encode("utf-8", "replace")
    except Exception:
        return b""


def _dist(point: EntryPoint) -> tuple[str, str]:
    return identity(point.dist) if point.dist is not None else ("unknown distribution", "")


def _load_one(point: EntryPoint, origin: str) -> tuple[list[ProviderSpec], list[Reason]]:
    """Import one plugin and call its hook. Exactly one of the two results is non-empty, or both for partial faults."""
    author = f"report it to the author of {origin}, or set DSV4_BACKENDS_DENY={point.name}"
    if point.pattern.match(point.value) is None:
        message = f"the entry point {point.value!r} is not module or module:attribute"
        return [], [Reason("plugin-import", message, author)]
    try:
        module = run(point.load)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return [], [Reason("plugin-import", f"importing {point.value} {raised(error)}", author)]
    try:
        # A manager of its own for each plugin: pluggy aborts a whole call when one implementation raises.
        manager = pluggy.PluginManager(PROJECT)
        manager.add_hookspecs(Hookspecs)
        manager.register(module, name=point.name)
        manager.check_pending()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return [], [Reason("plugin-hook", words(error), author)]
    if not manager.hook.dsv4_providers.get_hookimpls():
        message = f"{point.value} has no function dsv4_providers marked with @dsv4_backends.hookimpl"
        return [], [Reason("plugin-hook", message, author)]
    try:
        returned = run(lambda: _returned(manager.hook.dsv4_providers()))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return [], [Reason("plugin-failed", f"dsv4_providers() {raised(error)}", author)]
    specs: list[ProviderSpec] = []
    problems: list[Reason] = []
    if isinstance(returned, str):
        return specs, [Reason("plugin-type", f"dsv4_providers() {returned}", author)]
    for item in returned:
        try:
            problem = _misfit(item)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            problem = Reason("plugin-type", f"dsv4_providers() returned what cannot be used: {words(error)}")
        if problem is None:
            specs.append(item)
        else:
            problems.append(problem if problem.hint else Reason(problem.code, problem.message, author))
    return specs, problems


def _returned(results: list[Any]) -> list[Any] | str:
    """What the hook gave, item by item, or in words what is wrong with all of it. Pluggy leaves out a None."""
    if not results:
        return "returned None, expected ProviderSpec objects (is a `return` or `yield` missing?)"
    (result,) = results
    if isinstance(result, ProviderSpec):
        return [result]
    if isinstance(result, str | bytes | Mapping) or not isinstance(result, Iterable):
        return f"returned {type(result).__name__} {shown(result)}, expected ProviderSpec objects"
    items = list(itertools.islice(result, _MOST + 1))
    return items if len(items) <= _MOST else f"gives more than {_MOST} items"


def _misfit(item: Any) -> Reason | None:
    """What keeps one item from being used. A class derived from ours may have skipped the checks, so they run again."""
    if not isinstance(item, ProviderSpec):
        message = f"dsv4_providers() returned {type(item).__name__} {shown(item)}, expected ProviderSpec"
        return Reason("plugin-type", message)
    if type(item) is not ProviderSpec or any(type(i) is not Implementation for i in item.implementations):
        return Reason("plugin-type", "dsv4_providers() returned classes derived from ProviderSpec or Implementation")
    ProviderSpec.__post_init__(item)
    for implementation in item.implementations:
        Implementation.__post_init__(implementation)
    if item.api > API_VERSION:
        message = f"provider {item.name!r} was written for interface {item.api}, this package has {API_VERSION}"
        return Reason("plugin-api", message, "upgrade dsv4-backends")
    return None
