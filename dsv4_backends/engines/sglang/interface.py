"""Replaces the functions of SGLang's module around FlashMLA. They still get the calls that no op covers."""

from __future__ import annotations

import functools
from types import ModuleType, SimpleNamespace

from ... import compat
from ..base import HookedEngine
from ..patching import Row

_NAMES = ("flash_mla_sparse_fwd", "flash_mla_with_kvcache", "get_mla_metadata")


def arm(engine: HookedEngine, module: ModuleType) -> None:
    """Replace the planned functions. SGLang's own functions never get our schedule: they get one of their own."""
    library = SimpleNamespace(**{name: getattr(module, name) for name in _NAMES})
    engine.attempt(module, functools.partial(_replace, engine, library))


def _replace(engine: HookedEngine, library: SimpleNamespace, row: Row, module: ModuleType) -> None:
    name = row.target.attribute
    engine.put(row, module, row.target.function(), compat.flash_mla.own(library, name))
