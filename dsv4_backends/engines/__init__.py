"""Engines that reach the ops through their own door. Importing this package imports no engine and no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ..errors import PolicyError
from ..selection import policy

if TYPE_CHECKING:
    from .base import Engine

ENGINES: dict[str, str] = {
    "vllm": "dsv4_backends.engines.vllm:ENGINE",
    "transformers": "dsv4_backends.engines.transformers:ENGINE",
}
"""Every engine by its name, and where its ``Engine`` is; imported when it is asked for."""


def load(name: str) -> Engine:
    """The engine of a name in ``ENGINES``."""
    module, _, attribute = ENGINES[name].partition(":")
    engine: Engine = getattr(importlib.import_module(module), attribute)
    return engine


def asked() -> tuple[Engine, ...]:
    """The engines that ``DSV4_BACKENDS_ENGINE`` turns on: those that it names, or all that it can where it names none.

    Raises:
        PolicyError: it cannot be understood, or names an engine that no variable turns on.
    """
    words = policy.engines(known=ENGINES)
    if not words:
        return ()
    named = words if set(words) <= ENGINES.keys() else ()
    engines = [load(name) for name in named or ENGINES]
    for engine in engines:
        if named and not engine.by_variable:
            raise PolicyError(f"{policy.PREFIX}ENGINE does not turn on {engine.name}: {engine.switch}")
    return tuple(engine for engine in engines if engine.by_variable)
