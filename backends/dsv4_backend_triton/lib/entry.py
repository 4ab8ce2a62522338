"""Entry points of kernels, each compiled once for all numbers that it is given: nothing compiles while serving."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any


def entry(jit: Callable[..., Any], first: str, *, any_alignment: Sequence[str] = ()) -> Callable[[Any], Any]:
    """``triton.jit`` or ``gluon.jit`` that specialises a kernel on no number.

    Args:
        first: The first parameter that is a number. All after it are numbers too, but for the constants.
        any_alignment: Tensors on whose alignment it is not specialised either.
    """

    def made(kernel: Any) -> Any:
        parameters = inspect.signature(kernel).parameters.values()
        names = [p.name for p in parameters if "constexpr" not in str(p.annotation)]
        numbers = names[names.index(first) :]
        return jit(kernel, do_not_specialize=numbers, do_not_specialize_on_alignment=list(any_alignment))

    return made
