"""Engines, each through its plugin mechanism. Importing this package imports no engine and no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ..errors import PolicyError
from ..selection import policy

if TYPE_CHECKING:
    from .base import Engine

ENGINES: dict[str, str] = {
    "vllm": "dsv4_backends.engines.vllm:ENGINE",
    "sglang": "dsv4_backends.engines.sglang:ENGINE",
    "transformers": "dsv4_backends.engines.transformers:ENGINE",
}
"""Every engine by its name, and where its ``Engine`` is, which is imported when it is needed."""

OPTIONS: dict[str, str] = {
    "wo_a_bf16": "vllm on 8.x: the output projection's weight becomes bf16 when it is loaded, for cuBLAS",
    "flashmla_sm120": "vllm on 12.x with the attention backend FLASHMLA_SPARSE_DSV4: attention by these ops, "
    "without FlashInfer",
}
"""What each word in ``DSV4_BACKENDS_ENGINE_OPTIONS`` turns on: the engine, and what it does."""


def load(name: str) -> Engine:
    """The engine of a name in ``ENGINES``."""
    module, _, attribute = ENGINES[name].partition(":")
    engine: Engine = getattr(importlib.import_module(module), attribute)
    return engine


def asked() -> tuple[Engine, ...]:
    """The engines that ``DSV4_BACKENDS_ENGINE`` turns on: those that it names, or every engine if it names none (``1``,
    ``force``). Engines that no variable turns on are left out.

    Raises:
        PolicyError: the variable has an unknown word, or names an engine that no variable turns on; or an option is
            unknown.
    """
    words = policy.engines(known=ENGINES)
    policy.engine_options(OPTIONS)
    if not words:
        return ()
    named = words if set(words) <= ENGINES.keys() else ()
    engines = [load(name) for name in dict.fromkeys(named or ENGINES)]
    for engine in engines:
        if named and not engine.by_variable:
            raise PolicyError(f"{policy.PREFIX}ENGINE does not turn on {engine.name}: {engine.switch}")
    return tuple(engine for engine in engines if engine.by_variable)
