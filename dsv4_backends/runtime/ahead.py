"""What can be done before serving: compile kernels, and find how much memory a call takes. Nothing is launched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..contract import CONTRACTS
from ..contract.config import from_config
from ..contract.models import Model
from ..contract.traffic import Limits, packed_scales
from ..errors import PluginError, PolicyError
from ..selection import machine, policy
from ..selection.foreign import shown
from . import bind
from .serving import calls


def workspace_bytes(op: str, device: torch.device | str, **arguments: Any) -> int | None:
    """Device memory that a call would allocate beyond its results, from shapes alone; nothing is launched.

    Args:
        op: One of ``dsv4_backends.OPS``.
        device: Where the call would run.
        arguments: The call's arguments; tensors may be on any device, ``meta`` included.

    Returns:
        Bytes, or None where the provider that would serve does not state it.

    Raises:
        PolicyError: an unknown op, or no such device.
        ContractError: an argument breaks the contract.
        NoProviderError: no provider would serve the call.
    """
    contract, where = CONTRACTS[policy.known_op(op)], machine.torch_device(device)
    contract.require_names(arguments)
    without_storage = {k: _without_storage(v) for k, v in arguments.items()}
    contract.check(**without_storage)
    bound = bind.serving(op, where, without_storage)
    target = bound.implementation.workspace
    return None if target is None else _number(target, "bytes", op, without_storage, where)


def _number(target: str, what: str, *args: Any) -> int:
    """The number that a provider's function returns.

    Raises:
        PluginError: it is no number.
    """
    answer = bind.load_target(target)(*args)
    if isinstance(answer, bool) or not isinstance(answer, int) or answer < 0:
        raise PluginError(f"{target} returned {shown(answer)}, expected the number of {what}")
    return answer


def _without_storage(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or value.device.type == "meta":
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def warmup(
    model: str | Path | Mapping[str, Any] | Model,
    *,
    tp: int = 1,
    limits: Limits | None = None,
    device: torch.device | str | None = None,
    ops: Iterable[str] = tuple(CONTRACTS),
    progress: Callable[[str], None] | None = None,
) -> dict[str, dict[str, int]]:
    """Compile, and load on a device, everything that serving a model within limits can ask of the chosen providers.

    Afterwards nothing compiles while serving, and graphs can be captured at once. What is compiled stays in the
    provider's own cache on disk, so that the next process only loads it.

    Args:
        model: ``"flash"``, ``"pro"``, a ``config.json``, its folder or its contents, or a ``contract.models.Model``.
        tp: Tensor parallel size.
        limits: How far the server goes; default: ``Limits()``.
        device: Default: the current GPU, or the CPU.
        ops: Only these.
        progress: Gets a line of text before each op.

    Returns:
        By op, the kernels that each provider made ready. A provider that compiles nothing ahead is there with 0.

    Raises:
        ValueError: not a model, or its heads do not divide by ``tp``. ``PolicyError``, which is one: an unknown op, no
            such device, or an argument of another kind.
        OSError: the model's configuration cannot be read.
        NoProviderError: a call within the limits would find no provider.
    """
    wanted_ops = [policy.known_op(op) for op in policy.names("ops", ops)]
    if not isinstance(tp, int) or isinstance(tp, bool):
        raise PolicyError(f"tp: expected an int, got {tp!r}")
    if limits is not None and not isinstance(limits, Limits):
        raise PolicyError(f"limits: expected dsv4_backends.Limits, got {limits!r}")
    if not isinstance(model, str | Path | Mapping | Model):
        raise PolicyError(f"model: expected flash, pro, a path, or a Model, got {model!r}")
    rank = (model if isinstance(model, Model) else from_config(model)).rank(tp)
    where = machine.torch_device(device)
    packed = packed_scales(machine.device_of(where).capability)
    ready: dict[str, dict[str, int]] = {}
    for op in wanted_ops:
        if progress is not None:
            progress(f"warming up {op}")
        wanted = calls(op, rank, limits or Limits(), packed_scales=packed)
        if (always := bind.current().bind(CONTRACTS[op], where).always) is not None:
            by_provider: dict[bind.Bound, Iterable[dict[str, Any]]] = {always: wanted}
        else:
            shared: dict[bind.Bound, list[dict[str, Any]]] = {}
            for arguments in wanted:
                shared.setdefault(bind.serving(op, where, arguments), []).append(arguments)
            by_provider = {**shared}
        made = ready[op] = {}
        for bound, their_calls in by_provider.items():
            target = bound.implementation.warmup
            made[bound.provider] = 0 if target is None else _number(target, "kernels", op, their_calls, where)
    return ready
