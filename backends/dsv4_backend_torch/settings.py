"""Keeps PyTorch's settings from changing the reference's numbers; see ``dsv4_backends.contract.settings``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from dsv4_backends.contract import CONTRACTS
from dsv4_backends.contract.settings import without_autocast

_F = TypeVar("_F", bound=Callable[..., Any])


def under_any_setting(function: _F) -> _F:
    """Run an op without autocast and gradients, so that it can write buffers that were made in inference mode."""

    contract = CONTRACTS[function.__name__]

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(contract.args, args, strict=False)) | kwargs
        buffers = (given.get(name) for name in contract.buffers)
        inference = any(buffer is not None and buffer.is_inference() for buffer in buffers)
        with without_autocast(), torch.inference_mode() if inference else torch.no_grad():
            return function(*args, **kwargs)

    return cast("_F", run)
