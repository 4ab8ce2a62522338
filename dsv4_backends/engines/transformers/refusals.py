"""Why the integration does not serve a model or a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import DSV4Error
from ...selection.provider import Reason


class EngineError(DSV4Error, RuntimeError):
    """The integration does not serve this; ``reason`` says why."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(f"{reason} [{reason.code}]")
        self.reason = reason


def refuse_gradients(*values: Any) -> None:
    if any(isinstance(value, Tensor) and value.requires_grad for value in values):
        raise EngineError(Reason("engine-mode", "the ops have no backward", "use torch.no_grad()"))


def refuse_autocast(device: torch.device, dtype: torch.dtype) -> None:
    """Raise under autocast, except to bfloat16 for a bfloat16 model: transformers' own layers would mix dtypes."""
    if not torch.is_autocast_enabled(device.type):
        return
    if (target := torch.get_autocast_dtype(device.type)) is dtype is torch.bfloat16:
        return
    cast = f"torch.autocast to {target} is on and the model is {dtype}: expected a bfloat16 model and autocast to"
    raise EngineError(Reason("engine-mode", f"{cast} bfloat16, or no autocast", "leave torch.autocast"))
