"""One GPU a process: DeepGEMM loads a kernel once, for the current GPU, and cannot launch it on another."""

from __future__ import annotations

from torch import Tensor

from dsv4_backends.provider import NoProviderError, Reason

from .probe import DeepGEMM, deep_gemm

_served: int | None = None
"""The GPU of the first call."""


def refuses_device(tensor: Tensor) -> Reason | None:
    """Why calls on a tensor's GPU cannot be served: an earlier call was on another GPU. None if they can."""
    index = tensor.get_device()
    if index < 0 or _served is None or index == _served:
        return None
    message = f"DeepGEMM serves one GPU in a process, here cuda:{_served}; this call is on cuda:{index}"
    return Reason("device", message, "a process for each GPU")


def library_for(tensor: Tensor) -> DeepGEMM:
    """The library for a call on a tensor's GPU.

    Raises:
        NoProviderError: an earlier call was on another GPU.
    """
    global _served
    if (index := tensor.get_device()) != _served and index >= 0:
        if (reason := refuses_device(tensor)) is not None:
            raise NoProviderError(str(reason))
        _served = index
    return deep_gemm()
