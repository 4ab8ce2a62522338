"""The check of values of indices, lengths and bounds on the device: ``DSV4_BACKENDS_CHECK_VALUES=1``, for debugging.

Each contract says which values a caller should pass, and what other values mean (``OpContract.values``). This check
finds other values. It waits for the device.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ContractError
from .arguments import TensorArg, Values
from .spec import OpContract

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger("dsv4_backends")
_FUNCTIONS = {"__builtins__": {}, "min": min, "ceil": lambda a, b: -(-a // b)}


def _sizes(contract: OpContract, arguments: Mapping[str, Any]) -> dict[str, int]:
    """The sizes that the forms of the arguments name."""
    found: dict[str, int] = {}
    for name, arg in contract.args.items():
        value = arguments.get(name)
        if isinstance(arg, TensorArg) and value is not None:
            form = next(form for form in arg.forms if len(form.dims) == value.dim())
            found |= {dim: size for dim, size in zip(form.dims, value.shape, strict=True) if dim.isidentifier()}
    return found


def _wrong(values: Values, value: Tensor, names: Mapping[str, Any]) -> tuple[Tensor, Any, Any]:
    """A mask of the entries out of bounds, and the bounds."""
    import torch

    low, high = (eval(bound, _FUNCTIONS, dict(names)) for bound in (values.low, values.high))
    wrong = (value < low) | (value > high)
    used = eval(values.used, _FUNCTIONS, dict(names)) if values.used else None
    if used is not None:
        counts = used.reshape(value.shape[0], -1).amax(1)
        column = torch.arange(value.shape[-1], device=value.device)
        wrong &= column < counts.view(-1, *[1] * (value.dim() - 1))
    return wrong, low, high


def check_values(contract: OpContract, arguments: Mapping[str, Any]) -> None:
    """Check the values of a call that passed the contract's check. Waits for the device.

    Raises:
        ContractError: a value that callers should not pass; names op, argument, row and value.
    """
    import torch

    # 64 bits: a bound may exceed int32.
    looked_at = {values.argument for values in contract.values}
    names: dict[str, Any] = {**_sizes(contract, arguments), **{name: arguments.get(name) for name in contract.args}}
    names |= {name: names[name].long() for name in looked_at if names[name] is not None}
    for values in contract.values:
        value = names[values.argument]
        if value is None or value.numel() == 0:
            continue
        wrong, low, high = _wrong(values, value, names)
        if not bool(wrong.any()):
            continue
        places = wrong.nonzero()
        place = tuple(places[0].tolist())
        low, high = (int(bound[place]) if isinstance(bound, torch.Tensor) else bound for bound in (low, high))
        row, column = (place, "") if value.dim() == 1 else (place[:-1], f", column {place[-1]}")
        more = f" ({len(places)} such values in all)" if len(places) > 1 else ""
        raise ContractError(
            f"{contract.name}: argument {values.argument}: row {', '.join(map(str, row))}{column}: expected {low} to "
            f"{high} ({values.low} to {values.high}), got {int(value[place])}{more}; without "
            f"DSV4_BACKENDS_CHECK_VALUES: {values.otherwise}"
        )


def checking(contract: OpContract, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which has the contract's signature, with ``check_values`` before each call.

    A call cannot wait while a CUDA graph is captured. It is then not checked, which is logged once for each op.
    """
    import torch

    if not contract.values:
        return function
    logged = False

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal logged
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            if not logged:
                logged = True
                _log.warning("%s: values are not checked while a CUDA graph is captured", contract.name)
        else:
            given = dict(zip(contract.args, args, strict=False)) | kwargs
            if not next(iter(given.values())).is_meta:
                check_values(contract, given)
        return function(*args, **kwargs)

    return call
