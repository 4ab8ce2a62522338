"""Load the plugins, each on its own, so that a broken one is a row in a table and nothing worse."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points

import pluggy

from ..errors import PluginError
from .hookspecs import PROJECT, Hookspecs
from .provider import API_VERSION, ProviderSpec, Reason

GROUP = "dsv4_backends"
IN_TREE = "dsv4-backends"
"""Our own distribution: its providers take their names first."""


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
        return f"{self.distribution} {self.version}"


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


@lru_cache(maxsize=8)
def load(deny: frozenset[str] = frozenset(), strict: bool = False) -> Plugins:
    """Load every entry point of the group ``dsv4_backends``; done once per process and setting.

    Args:
        deny: Names of plugins whose module is not even imported.
        strict: Raise ``PluginError`` for the first broken plugin instead of recording it.
    """
    return load_entry_points(entry_points(group=GROUP), deny=deny, strict=strict)


def load_entry_points(found: Iterable[EntryPoint], *, deny: Container[str] = (), strict: bool = False) -> Plugins:
    """The same from explicit entry points."""
    plugins: list[Plugin] = []
    owners: dict[str, str] = {}
    for point in sorted(found, key=lambda p: (_dist(p)[0] != IN_TREE, _dist(p), p.name)):
        distribution, version = _dist(point)
        origin = f"{distribution} {version}"
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
        if strict and problems and problems[0].code != "denied":
            raise PluginError(f"plugin {point.name!r} of {origin}: {problems[0]}")
        plugins.append(Plugin(point.name, point.value, distribution, version, tuple(kept), tuple(problems)))
    return Plugins(tuple(plugins))


def _dist(point: EntryPoint) -> tuple[str, str]:
    dist = point.dist
    return (dist.name, dist.version) if dist is not None else ("unknown distribution", "")


def _load_one(point: EntryPoint, origin: str) -> tuple[list[ProviderSpec], list[Reason]]:
    """Import one plugin and call its hook. Exactly one of the two results is non-empty, or both for partial faults."""
    author = f"report it to the author of {origin}, or set DSV4_BACKENDS_DENY={point.name}"
    try:
        module = point.load()
    except (Exception, SystemExit) as error:
        return [], [Reason("plugin-import", f"importing {point.value} raised {_words(error)}", author)]

    # A manager of its own for each plugin: pluggy aborts a whole call when one implementation raises.
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(Hookspecs)
    try:
        manager.register(module, name=point.name)
        manager.check_pending()
    except Exception as error:
        return [], [Reason("plugin-hook", _words(error), author)]
    if not manager.hook.dsv4_providers.get_hookimpls():
        message = f"{point.value} has no function dsv4_providers marked with @dsv4_backends.hookimpl"
        return [], [Reason("plugin-hook", message, author)]
    try:
        returned = [
            item
            for result in manager.hook.dsv4_providers()
            for item in ([result] if isinstance(result, ProviderSpec) else result)
        ]
    except (Exception, SystemExit) as error:
        return [], [Reason("plugin-failed", f"dsv4_providers() raised {_words(error)}", author)]

    specs: list[ProviderSpec] = []
    problems: list[Reason] = []
    for item in returned:
        if not isinstance(item, ProviderSpec):
            message = f"dsv4_providers() returned {type(item).__name__} {item!r}, expected ProviderSpec"
            problems.append(Reason("plugin-type", message, author))
        elif item.api > API_VERSION:
            message = f"provider {item.name!r} was written for interface {item.api}, this package has {API_VERSION}"
            problems.append(Reason("plugin-api", message, "upgrade dsv4-backends"))
        else:
            specs.append(item)
    return specs, problems


def _words(error: BaseException) -> str:
    """An exception's type and own words on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
