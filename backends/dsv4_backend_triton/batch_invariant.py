"""The batch-invariant functions of ops whose kernel, tile or splits otherwise depend on the batch.

In this mode they do not, so a row's bits are the same in every batch. The functions of the other ops are always batch
invariant, and are not here.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import cache, partial, update_wrapper
from typing import Any, TypeVar

from . import ahead
from .variants import OPS

warmup = partial(ahead.warmup, home="batch_invariant")
workspace = partial(ahead.workspace, home="batch_invariant")
_F = TypeVar("_F", bound=Callable[..., Any])


def has_mode(function: _F) -> _F:
    """Hide ``batch_invariant``, the last parameter of an op's function, which the contract does not have."""
    signature = inspect.signature(function)
    kept = [p for name, p in signature.parameters.items() if name != "batch_invariant"]
    vars(function)["__signature__"] = signature.replace(parameters=kept)
    return function


@cache
def __getattr__(name: str) -> Callable[..., Any]:
    """The batch-invariant function of an op."""
    if name not in OPS or OPS[name].batch_invariant:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    function = getattr(importlib.import_module(f"{__package__}.{OPS[name].folder}.op"), name)
    return update_wrapper(partial(function, batch_invariant=True), function)
