"""The measured choice: where a provider that comes later was measured to be faster, on which shapes, and by how much.

A table for each architecture lies in ``tables/`` and is written by ``dsv4-backends tune``. It names classes of
shapes, by what decides a kernel's speed: a few sizes of the model, and a *load* that grows with the batch. Reading a
call's class looks at shapes only, so a choice that is captured in a CUDA graph stays right. Free of torch.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from .. import records
from ..contract import CONTRACTS
from ..contract.traffic import Classes, Shape
from ..errors import PolicyError
from . import capability as cc
from .machine import Device

SCHEMA_VERSION = 1
FOLDER = Path(__file__).parent / "tables"
CLASSES: Mapping[str, Classes] = MappingProxyType({op: c.traffic.classes for op, c in CONTRACTS.items()})
"""How the shapes of each op are classified."""


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
        most: The largest ratio, if the least one is no gain: the ratio then depends on values, such as lengths.
    """

    op: str
    shapes: str
    low: int
    high: int | None
    prefer: str
    over: str
    ratio: float
    source: str
    most: float = 0.0

    def holds(self, shapes: str, load: int) -> bool:
        return self.shapes == shapes and self.low <= load and (self.high is None or load <= self.high)

    @property
    def whole(self) -> bool:
        """Whether it holds on every load of its class."""
        return self.low <= 1 and self.high is None

    @property
    def where(self) -> str:
        """The range in words."""
        load = CLASSES[self.op].load
        return f"{self.shapes}, {_reach(load, self.low, self.high) or f'any {load}'}"

    @property
    def ratios(self) -> str:
        """The ratios of the times."""
        return f"{self.ratio:.2f} to {self.most:.2f}" if self.most else f"{self.ratio:.2f}"

    def __str__(self) -> str:
        how = "by the values (lengths, for one)" if self.most else "at least"
        return f"{self.prefer} where {self.where}: {how} {self.ratios} times as fast as {self.over} ({self.source})"


def _reach(load: str, low: int, high: int | None) -> str:
    """A range of loads in words; empty for all."""
    if high is None:
        return f"{load} >= {low}" if low > 1 else ""
    return f"{load} <= {high}" if low <= 1 else f"{low} <= {load} <= {high}"


@dataclass(frozen=True)
class Source:
    """A result that a table is made from.

    Attributes:
        device: The GPU's name.
        date, command, commit: When and how it was measured, and the code; no commit where it was not recorded.
        packages: Versions that the numbers depend on.
        providers: For each provider the versions of what it is made of.
    """

    device: str
    date: str
    command: str
    packages: dict[str, str]
    providers: dict[str, dict[str, str]] = field(default_factory=dict)
    commit: str = ""


@dataclass(frozen=True)
class Entry:
    """A preference as the file has it: ``source`` counts the table's sources from 0."""

    op: str
    shapes: str
    low: int
    high: int | None
    prefer: str
    over: str
    ratio: float
    source: int
    most: float = 0.0


@dataclass(frozen=True)
class Table:
    """The file of an architecture: what ``dsv4-backends tune`` writes."""

    schema_version: int
    capability: str
    how: str
    sources: tuple[Source, ...]
    preferences: tuple[Entry, ...]

    @property
    def named(self) -> tuple[Preference, ...]:
        """Its preferences, each with its source in words."""
        words = [f"{source.device}, {source.date}" for source in self.sources]
        return tuple(Preference(**vars(entry) | {"source": words[entry.source]}) for entry in self.preferences)


def read(path: Path) -> Table:
    """A table.

    Raises:
        PolicyError: it is not a table of this version.
    """
    content = records.load(path)
    if (version := content.get("schema_version")) != SCHEMA_VERSION:
        raise PolicyError(f"{path}: measured choice: schema_version: expected {SCHEMA_VERSION}, got {version!r}")
    return records.build(Table, content, str(path))


@lru_cache(maxsize=16)
def _load(sm: str, folder: Path) -> tuple[Preference, ...]:
    path = folder / f"{sm}.json"
    return read(path).named if path.exists() else ()


def preferences(device: Device) -> tuple[Preference, ...]:
    """What was measured on the architecture of a device; nothing for a CPU, or where no table is shipped."""
    return () if device.capability is None else _load(cc.sm(device.capability), FOLDER)


def preferred(found: Iterable[Preference], op: str, shapes: tuple[Shape, Shape]) -> Preference | None:
    """The preference that holds for a call, given the shapes of the tensors that ``CLASSES`` names."""
    name, load = CLASSES[op].read(*shapes)
    return next((p for p in found if p.op == op and p.holds(name, load)), None)


def general(found: Sequence[Preference]) -> str:
    """The provider that goes first on every load of more than half of the classes; empty where there is none."""
    classes = len({p.shapes for p in found})
    whole = Counter(p.prefer for p in found if p.whole)
    return next((name for name, count in whole.most_common(1) if 2 * count > classes), "")


def elsewhere(found: Sequence[Preference], prefer: str) -> Iterator[tuple[str, str, bool]]:
    """Where another provider serves than in general: the provider, the shapes in words, whether it was measured.

    Args:
        found: The preferences of one op, all over the same provider.
        prefer: The provider that serves in general; empty: the one that the preferences prefer.
    """
    load, over = CLASSES[found[0].op].load, found[0].over
    by_provider: dict[str, list[tuple[str, str]]] = {}
    for preference in found:
        if preference.prefer != prefer:
            reach = _reach(load, preference.low, preference.high)
            by_provider.setdefault(preference.prefer, []).append((preference.shapes, reach))
    yield from ((name, where, True) for name, ranges in by_provider.items() for where in _together(ranges))
    if prefer:
        gaps = [
            (shapes, _reach(load, low, high))
            for shapes in dict.fromkeys(p.shapes for p in found)
            for low, high in _gaps([p for p in found if p.shapes == shapes])
        ]
        yield from ((over, where, False) for where in (*_together(gaps), "sizes that were not measured"))


def _gaps(ranges: Iterable[Preference]) -> Iterator[tuple[int, int | None]]:
    """The loads of one class that none of its preferences covers."""
    start = 1
    for found in sorted(ranges, key=lambda p: p.low):
        if found.low > start:
            yield start, found.low - 1
        if found.high is None:
            return
        start = found.high + 1
    yield start, None


def _together(ranges: Iterable[tuple[str, str]]) -> list[str]:
    """Classes with one range as one text: ``h=8|16 d=1024, b <= 64``."""
    by_reach: dict[str, list[list[str]]] = {}
    for shapes, reach in ranges:
        by_reach.setdefault(reach, []).append(shapes.split())
    made = []
    for reach, classes in by_reach.items():
        columns = [list(dict.fromkeys(words)) for words in itertools.zip_longest(*classes, fillvalue="")]
        several = [place for place, words in enumerate(columns) if len(words) > 1]
        if len(several) == 1 and all("=" in word and "<" not in word for word in columns[several[0]]):
            key = columns[several[0]][0].partition("=")[0]
            columns[several[0]] = [f"{key}={'|'.join(word.partition('=')[2] for word in columns[several[0]])}"]
            several = []
        texts = [" ".join(words) for words in classes] if several else [" ".join(words[0] for words in columns)]
        made += [f"{text}, {reach}" if reach else text for text in texts]
    return made
