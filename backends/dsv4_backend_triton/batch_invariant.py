"""The ops whose kernel, tile or splits follow from the batch, in the mode where they do not.

What serves a row is then what serves it alone: a row's bits are the same in every batch. The other ops are so in any
mode, and are not here.
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
    """An op's function whose last parameter, ``batch_invariant``, is not in the contract and not in the signature."""
    signature = inspect.signature(function)
    kept = [p for name, p in signature.parameters.items() if name != "batch_invariant"]
    vars(function)["__signature__"] = signature.replace(parameters=kept)
    return function


@cache
def __getattr__(name: str) -> Callable[..., Any]:
    """The function of an op, in the mode."""
    if name not in OPS or OPS[name].batch_invariant:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    function = getattr(importlib.import_module(f"{__package__}.{OPS[name].folder}.op"), name)
    return update_wrapper(partial(function, batch_invariant=True), function)
