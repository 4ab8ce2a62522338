"""A compiled kernel variant as data: what warm-up and the compile matrix need to build it without tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ALIGNED16 = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Variant:
    """One (kernel, argument types, constants, warps, stages) that dispatch can ask for."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None
    note: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    attrs: dict[tuple[int, ...], list[list[Any]]] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        names = list(self.kernel.arg_names)
        object.__setattr__(self, "attrs", {(names.index(name),): ALIGNED16 for name in self.aligned})

    def full_signature(self) -> dict[str, str]:
        """The signature with constants marked, in the kernel's argument order."""
        return {name: self.signature.get(name, "constexpr") for name in self.kernel.arg_names}


def pow2(value: int, least: int = 1) -> int:
    """The least power of two that is at least ``value`` and ``least``."""
    return max(least, 1 << max(value - 1, 0).bit_length())


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
