"""Replace a module's ``forward`` on the instance, and restore its class's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...contract.settings import without_autocast
from .refusals import refuse_gradients


@dataclass(frozen=True)
class Mode:
    fp8: bool
    previous: str  # the model's attn_implementation before enable


class Replaced:
    """A ``forward`` set on an instance; its type shows that it is ours."""

    def __init__(self, function: Callable[..., Any], module: nn.Module, mode: Mode, *state: Any) -> None:
        self.function, self.module, self.mode, self.state = function, module, mode, state

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            refuse_gradients(*args, *kwargs.values(), *self.module.parameters(recurse=False))
        with without_autocast():
            return self.function(self.module, self.mode, *self.state, *args, **kwargs)
