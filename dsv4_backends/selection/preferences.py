"""The measured choice: where a provider of a lower rank was measured to be faster, on which shapes, and by how much.

A table for each architecture lies in ``tables/`` and is written by ``dsv4-backends tune``. It names classes of
shapes, by what decides a kernel's speed: a few sizes of the model, and a *load* that grows with the batch. Reading a
call's class looks at shapes only, so a choice that is captured in a CUDA graph stays right. Free of torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from . import capability as cc
from .machine import Device

SCHEMA_VERSION = 1
FOLDER = Path(__file__).parent / "tables"
FEW_KEYS = 256
"""Up to here a prefill row attends to little more than its window."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Classes:
    """How the shapes of one op are told apart.

    Attributes:
        tensors: Positions of the two arguments whose shapes are looked at.
        load: What grows with the batch, for people.
        read: Those shapes to the name of the class and the load.
    """

    tensors: tuple[int, int]
    load: str
    read: Callable[[Shape, Shape], tuple[str, int]]


def _prefill(q: Shape, indices: Shape) -> tuple[str, int]:
    return f"h_q={q[1]} topk{'<=' if indices[-1] <= FEW_KEYS else '>'}{FEW_KEYS}", q[0]


CLASSES: Mapping[str, Classes] = MappingProxyType(
    {
        "sparse_mla_prefill": Classes((0, 2), "s_q", _prefill),
        "sparse_mla_decode": Classes((0, 2), "b * s_q", lambda q, indices: (f"h_q={q[2]}", q[0] * q[1])),
        "mqa_logits": Classes((0, 1), "m * n", lambda q, k: (f"h={q[1]} d={q[2]}", q[0] * k[0])),
        "paged_mqa_logits": Classes((0, 1), "b * next_n", lambda q, k_cache: (f"h={q[2]} d={q[3]}", q[0] * q[1])),
        "fp8_einsum": Classes((0, 2), "b", lambda x, w: (f"h={x[1]} d={w[1]} r={x[2]}", x[0])),
        "hc_prenorm_gemm": Classes((0, 1), "m", lambda x, fn: (f"n={fn[0]} k={x[1]}", x[0])),
    }
)


@dataclass(frozen=True)
class Preference:
    """One provider before another on one class of shapes.

    Attributes:
        op: Contract name.
        shapes: The class, as ``CLASSES`` names it.
        low, high: The loads, both included; no ``high``: and all above.
        prefer, over: Providers: the faster one, and the one that the tiers alone would put first.
        ratio: The least ratio of the times that was measured in this range.
        source: Where and when that was.
    """

    op: str
    shapes: str
    low: int
    high: int | None
    prefer: str
    over: str
    ratio: float
    source: str

    def holds(self, shapes: str, load: int) -> bool:
        return self.shapes == shapes and self.low <= load and (self.high is None or load <= self.high)

    @property
    def where(self) -> str:
        """The range in words."""
        load = CLASSES[self.op].load
        if self.high is None:
            reach = f"{load} >= {self.low}" if self.low > 1 else f"any {load}"
        else:
            reach = f"{load} <= {self.high}" if self.low <= 1 else f"{self.low} <= {load} <= {self.high}"
        return f"{self.shapes}, {reach}"

    def __str__(self) -> str:
        return (
            f"{self.prefer} where {self.where}: at least {self.ratio:.2f} times as fast as {self.over} ({self.source})"
        )


def parse(table: Mapping[str, Any]) -> tuple[Preference, ...]:
    """The preferences of a table.

    Raises:
        ValueError: it is not a table of this version.
    """
    if (version := table.get("schema_version")) != SCHEMA_VERSION:
        raise ValueError(f"measured choice: schema_version: expected {SCHEMA_VERSION}, got {version!r}")
    sources = table["sources"]
    return tuple(
        Preference(
            op=entry["op"],
            shapes=entry["shapes"],
            low=entry["low"],
            high=entry["high"],
            prefer=entry["prefer"],
            over=entry["over"],
            ratio=entry["ratio"],
            source=f"{sources[entry['source']]['device']}, {sources[entry['source']]['date']}",
        )
        for entry in table["preferences"]
    )


@lru_cache(maxsize=16)
def _load(sm: str, folder: Path) -> tuple[Preference, ...]:
    path = folder / f"{sm}.json"
    return parse(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else ()


def preferences(device: Device) -> tuple[Preference, ...]:
    """What was measured on the architecture of a device; nothing for a CPU, or where no table is shipped."""
    return () if device.capability is None else _load(cc.sm(device.capability), FOLDER)


def preferred(found: Iterable[Preference], op: str, shapes: tuple[Shape, Shape]) -> Preference | None:
    """The preference that holds for a call, given the shapes of the tensors that ``CLASSES`` names."""
    name, load = CLASSES[op].read(*shapes)
    return next((p for p in found if p.op == op and p.holds(name, load)), None)
