"""``dsv4-backends plugins``: the installed plugins."""

from __future__ import annotations

import argparse

from ..selection import plugins, policy
from ..selection.plugins import Plugins
from .render import SCHEMA_VERSION, plugins_json, table
from .shared import FINDING, OK, AddCommand, show


def add(command: AddCommand) -> None:
    command("plugins", run, "the installed plugins, and what is wrong with the broken ones")


def run(args: argparse.Namespace) -> int:
    loaded = plugins.load(policy.from_environment().deny)
    show(
        args,
        lambda: {"schema_version": SCHEMA_VERSION, "plugins": plugins_json(loaded)},
        lambda: text(loaded),
    )
    return FINDING if loaded.broken else OK


def text(plugins: Plugins) -> str:
    rows = []
    for plugin in plugins.plugins:
        status = "broken" if plugin in plugins.broken else "denied" if plugin.problems else "ok"
        names = ", ".join(spec.name for spec in plugin.providers) or "-"
        why = "\n".join(f"[{r.code}] {r}" for r in plugin.problems) or "-"
        rows.append((plugin.name, plugin.distribution, plugin.version, status, names, why))
    return table(("PLUGIN", "DISTRIBUTION", "VERSION", "STATUS", "PROVIDERS", "PROBLEM"), rows)
