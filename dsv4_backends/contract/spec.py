"""The parts of an op's contract.

A contract is a documented Python function, whose signature is the op's signature, whose docstring is its meaning, and
whose body is its fake: it allocates the outputs. The contract also has the table of arguments, from which the check
before every call and the tables in the docs are made, the cases, the tolerances, the cost, and the traffic.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import ContractError
from . import checker
from .arguments import Args, Rule, TensorArg, Values
from .settings import without_autocast
from .traffic import Traffic

if TYPE_CHECKING:
    import torch

LEVELS = ("smoke", "default", "full")


@dataclass(frozen=True)
class Tolerance:
    """The tolerance of one output against the oracle in fp64, with the reason for each number.

    An element passes if ``|error| <= atol + atol_rms * rms(reference) + rtol * |reference|``. A result passes if all
    elements do and ``calc_diff = 1 - 2<x, y> / (<x, x> + <y, y>)`` stays below its bound. Infinities and NaN must be
    in the same places.
    """

    why: str
    rtol: float = 0.0
    atol: float = 0.0
    atol_rms: float = 0.0
    calc_diff: float = float("inf")


@dataclass(frozen=True)
class Cost:
    """The least work of a call.

    Attributes:
        flops: A multiply-add counts as two.
        bytes: Every needed input read once, every output written once.
        math: Tensor-core type in which the flops can run: ``"bf16"``, ``"fp8"`` or ``"tf32"``.
    """

    flops: float
    bytes: float
    math: str


@dataclass(frozen=True)
class Case:
    """A named set of parameters for one op, from which seeded inputs are made.

    Attributes:
        name: Unique within its op; also the seed.
        level: ``"smoke"``, ``"default"`` or ``"full"``; a level includes the ones before it.
        params: Keyword arguments of the op's ``make`` function.
    """

    name: str
    level: str
    params: Mapping[str, Any]


@dataclass(frozen=True)
class OpContract:
    """Everything that is specified about one op.

    Attributes:
        function: Signature, meaning and fake (see the module's docstring).
        args: Every argument in the order of the signature.
        rules: Relations between arguments.
        values: The values that callers should pass in indices, lengths and bounds, and what other values mean.
        returns: Names of the results; a name that is also an argument is the caller's buffer if one is passed. If
            that argument is required, the op writes in place: it changes the buffer and returns it.
        cases: Test inputs at three levels.
        make: ``make(device, generator, **params)`` builds a case's arguments.
        tolerances: By result name.
        cost: ``cost(**arguments)``; reads shapes, and lengths if the work depends on them.
        oracle: ``"package.module:function"`` that computes the results in fp64.
        traffic: The calls that serving makes of the op.
        partials: The argument that, if passed, makes the results partial sums over a leading dimension.
        read: ``"package.module:function"``: ``read(result_name, tensor, arguments)`` gives a result as the oracle does,
            in fp64, for results that are not numbers to compare, such as bytes or indices. Empty: results are compared
            directly.
        strided: Results whose strides are part of the meaning, as the function's body makes them.
        batch: The argument whose first dimension counts the batch; empty: the first tensor.
    """

    function: Callable[..., Any]
    args: Args
    returns: tuple[str, ...]
    cases: tuple[Case, ...]
    make: Callable[..., dict[str, Any]]
    tolerances: Mapping[str, Tolerance]
    cost: Callable[..., Cost]
    oracle: str
    traffic: Traffic
    rules: tuple[Rule, ...] = ()
    values: tuple[Values, ...] = ()
    partials: str = ""
    read: str = ""
    strided: tuple[str, ...] = ()
    batch: str = ""
    name: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.function.__name__)
        parameters = tuple(inspect.signature(self.function).parameters)
        assert parameters == tuple(self.args), f"{self.name}: table {tuple(self.args)} is not {parameters}"
        assert set(self.tolerances) == set(self.returns)
        assert set(self.strided) <= set(self.returns)
        assert len({self.is_optional(name) for name in self.buffers}) <= 1, f"{self.name}: in place, or not"
        if not self.batch:
            first = next(name for name, arg in self.args.items() if isinstance(arg, TensorArg))
            object.__setattr__(self, "batch", first)
        assert len({case.name for case in self.cases}) == len(self.cases), f"{self.name}: case names repeat"

    def require_names(self, given: Collection[str]) -> None:
        """Raise if a call lacks an argument or has an unknown one.

        Raises:
            ContractError: naming op and arguments.
        """
        parameters = self.signature.parameters.values()
        missing = [p.name for p in parameters if p.default is p.empty and p.name not in given]
        unknown = [str(name) for name in given if name not in self.args]
        for what, found in (("missing", missing), ("unknown", unknown)):
            if found:
                raise ContractError(f"{self.name}: {what} argument{'s' * (len(found) > 1)} {', '.join(found)}")

    @property
    def family(self) -> str:
        """The name of the op's folder in ``contract/``."""
        return self.function.__module__.split(".")[-2]

    @property
    def signature(self) -> inspect.Signature:
        return inspect.signature(self.function)

    def is_keyword(self, name: str) -> bool:
        """Whether an argument is keyword-only."""
        parameter = self.signature.parameters[name]
        return parameter.kind is parameter.KEYWORD_ONLY

    def is_optional(self, name: str) -> bool:
        """Whether an argument may be None."""
        return self.signature.parameters[name].default is None

    @cached_property
    def buffers(self) -> tuple[str, ...]:
        """The result buffers that the caller may pass; all of them or none."""
        return tuple(name for name in self.returns if name in self.args)

    @cached_property
    def in_place(self) -> bool:
        """Whether the buffers are required: the op changes them and leaves what it does not write."""
        return any(not self.is_optional(name) for name in self.buffers)

    @cached_property
    def forms(self) -> tuple[bool, ...]:
        """The op's ``torch.library`` forms: without result buffers (False), with them (True)."""
        return (True,) if self.in_place else (False, True) if self.buffers else (False,)

    def library_name(self, *, with_buffers: bool) -> str:
        """The name of a form in ``torch.ops.dsv4_backends``."""
        return self.name + "_out" if with_buffers and not self.in_place else self.name

    def library_names(self, *, with_buffers: bool) -> tuple[str, ...]:
        """The arguments of the ``torch.library`` form, in its order: result buffers before arguments with a default."""
        names = [name for name in self.args if with_buffers or name not in self.buffers]
        names.sort(key=lambda name: self.is_optional(name) and name not in self.buffers)
        return tuple(names)

    @cached_property
    def schema(self) -> str:
        """The ``torch.library`` schema of the form that allocates its results."""
        return self._schema(with_buffers=False)

    @cached_property
    def out_schema(self) -> str:
        """The schema of the form that writes the caller's buffers and returns the other results."""
        return self._schema(with_buffers=True)

    def _schema(self, *, with_buffers: bool) -> str:
        # All positional: torch.library.custom_op takes no keyword-only tensors.
        parts = []
        for name in self.library_names(with_buffers=with_buffers):
            arg = self.args[name]
            kind = "Tensor" if isinstance(arg, TensorArg) else arg.kind
            if name in self.buffers:
                parts.append(f"Tensor({'abc'[self.buffers.index(name)]}!) {name}")
            elif self.is_optional(name):
                parts.append(f"{kind}? {name}=None")
            else:
                parts.append(f"{kind} {name}")
        count = len(self.returns) - (len(self.buffers) if with_buffers else 0)
        result = "Tensor" if count == 1 else "(" + ", ".join(["Tensor"] * count) + ")"
        return f"({', '.join(parts)}) -> {result}"

    def at_level(self, level: str) -> tuple[Case, ...]:
        """The cases of a level and of the levels before it."""
        allowed = LEVELS[: LEVELS.index(level) + 1]
        return tuple(case for case in self.cases if case.level in allowed)

    def inputs(self, case: Case, device: torch.device | str, variant: int = 0) -> dict[str, Any]:
        """A case's arguments on ``device``, the same for the same case on every machine.

        Another ``variant`` has the same shapes, dtypes and strides with other values.
        """
        import zlib

        import torch

        # Drawn on the CPU: CPU and GPU generators give different numbers, and a case must be the same on both.
        generator = torch.Generator("cpu").manual_seed(zlib.crc32(f"{self.name}/{case.name}/{variant}".encode()))
        with torch.device("cpu"), without_autocast():
            return self.make(torch.device(device), generator, **case.params)

    @cached_property
    def check(self) -> Callable[..., torch.device]:
        """Check everything but the values of a call's tensors, and return their device.

        Raises:
            ContractError: naming op, argument, what was expected and what came.
        """
        return checker.check(self)
