"""The core decides nothing by a provider's or an engine's name: the names are data, in plugins and in ``ENGINES``."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from paths import ROOT

from dsv4_backends.contract import FAMILIES, OPS
from dsv4_backends.engines import ENGINES
from dsv4_backends.selection import plugins, policy

CORE = ROOT / "dsv4_backends"
PACKAGES = {("commands/render.py", "triton"), ("bench/provenance.py", "triton")}
"""Versions that are printed: the compiler, not the provider."""


def named(names: set[str]) -> Iterator[tuple[str, str]]:
    """The files of the core, without the engines and the libraries' own names, in which a string is one of these."""
    for path in sorted(CORE.rglob("*.py")):
        file = path.relative_to(CORE).as_posix()
        if not file.startswith(("engines/", "compat/")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and node.value in names:
                    yield file, str(node.value)


def test_no_name_of_a_provider_or_an_engine() -> None:
    providers = {spec.name for spec in plugins.load().providers}
    assert {"triton", "deep_gemm", "flash_mla", policy.ESSENTIAL} <= providers
    assert set(named(providers - {policy.ESSENTIAL} | set(ENGINES))) == PACKAGES


def test_no_name_of_an_op() -> None:
    """Tables over op names are made from the contract: only the folders of its families and ``ops.py`` have them."""
    home = ("ops.py", *(f"contract/{family}/" for family in FAMILIES))
    assert [(file, op) for file, op in named(set(OPS)) if not file.startswith(home)] == []
