"""The table of an op's arguments, from which the check and the docs are made."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """One dtype set and shape that a tensor may have.

    Attributes:
        dtypes: Names in ``torch``, separated by spaces.
        shape: Dimensions separated by commas. A name is bound by its first use and compared afterwards; a number or
            an expression over bound names must be equal. ``ceil(a, b)`` is a rounded up to multiples of b, over b.
        when: Expression over the arguments under which the form applies; empty: always.
    """

    dtypes: str
    shape: str
    when: str = ""

    @property
    def dims(self) -> list[str]:
        return [dim.strip() for dim in re.split(r",(?![^(]*\))", self.shape) if dim.strip()]


@dataclass(frozen=True)
class TensorArg:
    """A tensor argument: its forms, its layout, and its meaning in a few words.

    Attributes:
        forms: Tried in order; the first with a matching dtype, rank and ``when`` gives the expected sizes.
        layout: ``"last"``: the last dimension is contiguous, other strides are free. ``"page"``: within a page
            (dimension 0) the bytes are contiguous, the page stride is free. ``"any"``: no rule. ``"vector"``: no
            rule for callers, ``"last"`` for providers: the check passes a contiguous copy if it is not.
        about: For the docs.
    """

    forms: tuple[Form, ...]
    layout: str = "last"
    about: str = ""


@dataclass(frozen=True)
class ScalarArg:
    """A number or a bool.

    A number is Python's, or one of ``numbers`` (NumPy's scalars and arrays without dimensions too), which is converted
    to Python's. It is not a bool and not a tensor. A float is finite in fp32, an int is at most 2^31 - 1. A bool is
    Python's or NumPy's.

    Attributes:
        kind: ``"float"``, ``"int"`` or ``"bool"``.
        minimum: Smallest value; None for no bound.
    """

    kind: str
    minimum: int | None = None
    about: str = ""


Args = Mapping[str, TensorArg | ScalarArg]
"""The arguments of an op, in the order of its signature."""


def tensor(dtypes: str, shape: str, about: str, *, layout: str = "last") -> TensorArg:
    """A tensor argument; alternatives in ``shape`` are separated by ``|``."""
    return TensorArg(tuple(Form(dtypes, part) for part in shape.split("|")), layout, about)


@dataclass(frozen=True)
class Rule:
    """A relation between an argument and those before it. The error names ``argument``."""

    argument: str
    expression: str
    expected: str


@dataclass(frozen=True)
class Values:
    """The values that callers should pass in an argument with indices, lengths or bounds.

    No other value faults: ``otherwise`` says what it means. ``DSV4_BACKENDS_CHECK_VALUES=1`` finds such values
    (``contract/values.py``); without it they are not looked for.

    Attributes:
        low, high: Expressions over sizes and arguments, both included.
        otherwise: What any other value means.
        used: The number of entries of a row that are read, an expression too; empty, or an argument not given: all.
    """

    argument: str
    low: str
    high: str
    otherwise: str
    used: str = ""
