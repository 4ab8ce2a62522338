"""Replaces the names under which vLLM keeps DeepGEMM's functions, right after vLLM has set them.

vLLM sets them in ``_lazy_init``, when it first needs one. If any name is set before, ``_lazy_init`` returns at once and
leaves the others unset. And the library must not be imported earlier than by vLLM.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

from ... import compat
from ..base import HookedEngine
from ..patching import Row

_INIT = "_lazy_init"
_SCHEDULE = "get_paged_mqa_logits_metadata"


def arm(engine: HookedEngine, module: ModuleType) -> None:
    """Have the names replaced once, after ``_lazy_init`` has run."""
    resolve: Callable[[], None] = getattr(module, _INIT)

    @functools.wraps(resolve)
    def lazy_init() -> None:
        resolve()
        engine.attempt(module, functools.partial(_replace, engine))
        engine.patches.put_back(module, _INIT)

    engine.patches.replace(module, _INIT, lazy_init)


def _replace(engine: HookedEngine, row: Row, module: ModuleType) -> None:
    """Set one name to ours. DeepGEMM's own function gets the calls that no op covers, with arguments in its form."""
    original, ours = getattr(module, row.target.attribute), row.target.function()
    native = None
    if original is not None:
        schedule = getattr(module, f"_{_SCHEDULE}_impl", None)
        library = SimpleNamespace(get_num_sms=module.get_num_sms, **{_SCHEDULE: schedule, ours.__name__: original})
        native = compat.deep_gemm.own(library, ours.__name__)
    engine.put(row, module, ours, native)
