"""The machine: what launches depend on."""

from __future__ import annotations

import os
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from packaging.version import Version

from dsv4_backends.provider import Support, device_of, simulate, support

# Shared memory that one block may use, in KiB, and multiprocessors of a typical card (for a simulated machine only).
_CARDS = {
    "8.0": (163, 108),
    "8.6": (99, 84),
    "8.7": (163, 16),
    "8.9": (99, 128),
    "9.0": (227, 132),
    "10.0": (227, 148),
    "10.3": (227, 160),
    "12.0": (99, 188),
    "12.1": (99, 48),
}
_UNKNOWN = (99, 100)
_INTERPRETED = 12
"""Multiprocessors in the interpreter, where programs run one after the other."""
_FP8 = (">=8.9",)
"""The first capability for which Triton compiles e4m3 operands."""


class Arch(NamedTuple):
    """A machine as the launchers see it.

    Attributes:
        major, minor: Compute capability, perhaps simulated.
        sms: Multiprocessors.
        smem: Bytes of shared memory that one block may use.
        native_fp8: Whether Triton compiles e4m3 operands for it.
        interpret: Whether kernels run in Triton's interpreter, on CPU tensors.
    """

    major: int
    minor: int
    sms: int
    smem: int
    native_fp8: bool
    interpret: bool

    @property
    def cc(self) -> int:
        """The capability as Triton spells it: 86 for 8.6."""
        return self.major * 10 + self.minor

    @property
    def capability(self) -> Version:
        return Version(f"{self.major}.{self.minor}")

    @property
    def wgmma(self) -> bool:
        """Whether it has wgmma: SM90 only."""
        return self.cc == 90

    @property
    def pdl(self) -> bool:
        """Whether a kernel may start while the one before it still runs (programmatic dependent launch)."""
        return self.major >= 9 and not self.interpret

    @property
    def fp8(self) -> Any:
        """The type of e4m3 operands: e4m3 if Triton compiles it, else what its bytes are decoded to."""
        if self.interpret:
            return tl.float32
        return tl.float8e4nv if self.native_fp8 else tl.bfloat16

    @property
    def fp8_view(self) -> torch.dtype:
        """The dtype as which kernels get e4m3 tensors: their own, or bytes."""
        return torch.float8_e4m3fn if self.native_fp8 else torch.uint8

    @property
    def bf16(self) -> Any:
        """The type of bf16 operands. The interpreter's products of bf16 are wrong, so it gets fp32."""
        return tl.float32 if self.interpret else tl.bfloat16


def arch_from_capability(capability: Version, sms: int = 0, *, interpret: bool = False) -> Arch:
    """The ``Arch`` of a compute capability, without a device."""
    kib, typical = _CARDS.get(str(capability), _UNKNOWN)
    return Arch(
        major=capability.major,
        minor=capability.minor,
        sms=sms or (_INTERPRETED if interpret else typical),
        smem=kib * 1024,
        native_fp8=support(_FP8, capability) is Support.SUPPORTED and not interpret,
        interpret=interpret,
    )


@cache
def _arch_of(device: torch.device, simulated: str) -> Arch:
    interpret = interpreting()
    if device.type == "cpu":
        named = simulate(simulated, "DSV4_BACKENDS_DEVICE").gpus if simulated else ()
        capability = named[0].capability if named else None
        return arch_from_capability(capability or Version("8.0"), interpret=interpret)
    here = device_of(device)
    assert here.capability is not None
    return arch_from_capability(here.capability, here.multiprocessors, interpret=interpret)


simulated: ContextVar[Arch | None] = ContextVar("dsv4_backend_triton_arch", default=None)
"""The machine of tensors of the meta device, while launches are recorded."""


def arch_of(device: torch.device) -> Arch:
    """The ``Arch`` of a device, with the capability of ``DSV4_BACKENDS_DEVICE=sm_80`` if that is set."""
    if device.type == "meta":
        arch = simulated.get()
        assert arch is not None, "tensors of the meta device reach kernels only where launches are recorded"
        return arch
    return _arch_of(device, os.environ.get("DSV4_BACKENDS_DEVICE", "").strip())


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
