"""Make the table of the measured choice from results of ``bench``."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..contract.traffic import Shape
from ..errors import PolicyError
from ..selection import preferences as measured
from ..selection.preferences import Entry, Source, Table
from .results import Result, Row

MARGIN = 1.03
"""A provider is preferred from this ratio on: less is not worth a choice that depends on the shape."""


def tune(results: Sequence[Result]) -> Table:
    """The table for the architecture on which all ``results`` were measured.

    For each class of shapes and each measured load, the provider that loses least is preferred over the one that comes
    first without measurements. The loss of a provider on a row is the ratio of its time to the best time; over the rows
    of one load, which differ in values such as lengths, the largest loss counts. A provider is preferred if the other
    loses at least 3% more, and is slower at both quartiles on the row of its largest loss. The quartiles may overlap:
    the providers' replays alternate, so a change of the clock changes the times of all. Between two measured loads the
    nearer one decides, by their ratio; the outermost ones decide for all beyond.

    Raises:
        PolicyError: nothing was measured on a GPU, or on several architectures, or on one in place of another.
    """
    capabilities = sorted({str(result.device.capability or "a CPU") for result in results})
    if len(capabilities) != 1 or capabilities == ["a CPU"]:
        found = ", ".join(capabilities)
        raise PolicyError(f"tune: expected results of one architecture of GPU, got {found or 'none'}")
    for result in results:
        if any(f"{name}=" in result.command for name in ("DSV4_BACKENDS_DEVICE", "TRITON_OVERRIDE_ARCH")):
            raise PolicyError(f"tune: {result.device.name}: expected times of the architecture itself")
    # By class and load; a later file replaces what an earlier one has of the same row.
    rows: dict[tuple[str, str], _Found] = {}
    for source, result in enumerate(results):
        for row in result.rows:
            if row.timings:
                if row.op not in result.order:
                    raise PolicyError(f"tune: {result.device.name}, {result.date}: expected the order of {row.op}")
                rows[row.op, row.name] = _Found(source, row, result.order[row.op])
    points: dict[tuple[str, str], dict[int, list[_Found]]] = defaultdict(lambda: defaultdict(list))
    for found_row in rows.values():
        row = found_row.row
        shapes = _shapes(row)
        name, load = measured.CLASSES[row.op].read(*shapes)
        points[row.op, name][load].append(found_row)
    return Table(
        schema_version=measured.SCHEMA_VERSION,
        capability=capabilities[0],
        how="dsv4-backends tune, from results of dsv4-backends bench --json",
        sources=tuple(
            Source(
                device=result.device.name,
                date=result.date,
                command=result.command,
                packages=result.machine.packages,
                providers=result.providers,
                commit=result.commit,
            )
            for result in results
        ),
        preferences=tuple(
            entry
            for (op, name), by_load in points.items()
            for entry in _of_class(op, name, {load: _decide(at) for load, at in sorted(by_load.items())})
        ),
    )


def chosen(table: Table, result: Result) -> Result:
    """The result with the automatic choice that ``table`` gives on each row, in place of the one when it was measured.

    A table does not change how long a provider takes, so one run both makes it and says how good it is.

    Raises:
        PolicyError: a row is not of this version's bench.
    """

    def auto(row: Row) -> str | None:
        names = [name for name in result.order.get(row.op, ()) if name in row.rivals]
        if len(names) < 2:
            return next(iter(names), None)
        found = measured.preferred(table.named, row.op, _shapes(row))
        return found.prefer if found is not None and found.prefer in names else names[0]

    return dataclasses.replace(result, rows=tuple(dataclasses.replace(row, auto=auto(row)) for row in result.rows))


def _shapes(row: Row) -> tuple[Shape, Shape]:
    """The shapes of a row that its class is read from."""
    try:
        return measured.CLASSES[row.op].of_row(row.params)
    except (KeyError, TypeError) as error:
        cause = f"{type(error).__name__}: {error}"
        raise PolicyError(f"tune: {row.op} {row.name}: expected a row of this version's bench ({cause})") from error


@dataclass(frozen=True)
class _Found:
    """A row, the place of the result that it is from, and the providers' order without measurements."""

    source: int
    row: Row
    order: Sequence[str]


@dataclass(frozen=True)
class _Decision:
    """The preferred provider at one load, or over a range of loads; the least and the largest ratio of the times."""

    prefer: str
    over: str
    ratio: float
    most: float
    source: int


def _decide(rows: Sequence[_Found]) -> _Decision | None:
    """The provider that loses least over the rows of one load, or None if the order of the tiers stays."""
    ordered = [[name for name in found.order if name in found.row.timed] for found in rows]
    if not all(ordered) or len({names[0] for names in ordered}) > 1:
        return None
    over = ordered[0][0]
    common = [name for name in ordered[0] if all(name in names for names in ordered)]

    def loss(name: str, found: _Found) -> float:
        us = found.row.timed
        return us[name] / min(us[other] for other in found.order if other in us)

    def most(name: str) -> float:
        return max(loss(name, found) for found in rows)

    best = min(common, key=most)
    worst = max(rows, key=lambda found: loss(over, found))
    times = {timing.label: timing for timing in worst.row.timings}
    if most(over) / most(best) < MARGIN or times[best].q1 >= times[over].q1 or times[best].q3 >= times[over].q3:
        return None
    ratios = [found.row.timed[over] / found.row.timed[best] for found in rows]
    return _Decision(best, over, min(ratios), max(ratios), rows[-1].source)


def _of_class(op: str, shapes: str, by_load: Mapping[int, _Decision | None]) -> Iterator[Entry]:
    """Ranges of load with one preference."""
    loads = list(by_load)
    entry: Entry | None = None
    for index, load in enumerate(loads):
        low = 1 if index == 0 else math.isqrt(loads[index - 1] * load) + 1
        high = None if index == len(loads) - 1 else math.isqrt(load * loads[index + 1])
        found = by_load[load]
        new = None
        if found is not None:
            ratio, most = round(found.ratio, 3), round(found.most, 3)
            most = most if ratio < MARGIN else 0.0
            new = Entry(op, shapes, low, high, found.prefer, found.over, ratio, found.source, most)
        if new and entry and (new.prefer, new.over, new.source) == (entry.prefer, entry.over, entry.source):
            ratio, most = min(entry.ratio, new.ratio), max(entry.most, new.most)
            entry = dataclasses.replace(entry, high=high, ratio=ratio, most=most)
            continue
        if entry is not None:
            yield entry
        entry = new
    if entry is not None:
        yield entry
