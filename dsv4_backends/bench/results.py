"""A benchmark's result: times, rates, how good the automatic choice was, and the file of all this."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import records
from ..errors import PolicyError
from ..selection.machine import Device
from .provenance import Measured

SCHEMA_VERSION = 2
"""The schema version of the files that ``bench --json`` writes; version 1 is read too."""
NEAR = 1.03
"""A provider within this ratio of the best counts as the best."""
WANTED_NEAR, WANTED_WORST = 0.95, 0.9
"""The automatic choice should count as the best on this share of rows, and never be below this part of the best."""


@dataclass(frozen=True)
class Timing:
    """The times of one provider on one row.

    Attributes:
        provider: Its name.
        us: Median microseconds of a call; None: no time.
        q1, q3: Their quartiles.
        error: Why there is no time: ``refused: ...``, or an error.
        simulated: The architecture whose code it ran, such as ``sm_80``; empty for this GPU's own.
    """

    provider: str
    us: float | None = None
    q1: float = 0.0
    q3: float = 0.0
    error: str = ""
    simulated: str = ""

    @property
    def label(self) -> str:
        return label(self.provider, self.simulated)


def label(provider: str, simulated: str) -> str:
    return f"{provider} as {simulated}" if simulated else provider


@dataclass(frozen=True)
class Row:
    """One call that was measured.

    Attributes:
        op, name: Those of the row in ``shapes``; runs are compared by both.
        params: Its sizes.
        flops, bytes, math: Its cost by the contract.
        auto: The provider that is chosen automatically.
        timings: One for each provider.
        error: Why the row was not measured.
    """

    op: str
    name: str
    params: dict[str, bool | int | str]
    flops: float = 0.0
    bytes: float = 0.0
    math: str = ""
    auto: str | None = None
    timings: tuple[Timing, ...] = ()
    error: str = ""

    @property
    def timed(self) -> dict[str, float]:
        """Microseconds by provider, for those with a time."""
        return {timing.label: timing.us for timing in self.timings if timing.us is not None}

    @property
    def rivals(self) -> dict[str, float]:
        """The times of providers that a choice can have, so without code for another architecture."""
        return {t.label: t.us for t in self.timings if t.us is not None and not t.simulated}


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The machine's own rates, measured like calls. Floors are computed from them.

    Attributes:
        bf16_tflops, fp8_tflops, tf32_tflops: PyTorch's matrix products; None: not available on this GPU.
        copy_gbps: Bytes read and written by a kernel that copies.
        read_gbps: Bytes read by a kernel that sums; None in older results.
        launch_us: The time between the events of a graph that does almost nothing.
    """

    bf16_tflops: float
    copy_gbps: float
    fp8_tflops: float | None = None
    launch_us: float
    read_gbps: float | None = None
    tf32_tflops: float | None = None

    @property
    def memory_gbps(self) -> float:
        """The faster of copy and read, since most ops mostly read."""
        return max(self.copy_gbps, self.read_gbps or 0.0)

    def floor_us(self, flops: float, moved: float, math: str) -> float:
        """The least time of a call. If PyTorch has no FP8 products, the bf16 rate is used for FP8."""
        rate = {"fp8": self.fp8_tflops, "tf32": self.tf32_tflops}.get(math) or self.bf16_tflops
        return max(flops / rate / 1e6, moved / self.memory_gbps / 1e3)


@dataclass(frozen=True)
class Rate:
    """A time as TFLOP/s, GB/s, and the share of the floor."""

    tflops: float
    gbps: float
    floor_share: float


@dataclass(frozen=True, kw_only=True)
class Result(Measured):
    """What ``bench --json`` writes.

    Attributes:
        device: The device of the measurement.
        providers: For each provider the versions of its packages.
        absent: For each op and provider that was not measured, the reason.
        order: For each op the providers in their order without measurements.
        rates: The machine's own rates, from the same run.
        samples: The number of samples of each median.
        seconds: The duration of the run.
        rows: One for each call.
    """

    schema_version: int
    device: Device
    providers: dict[str, dict[str, str]] = field(default_factory=dict)
    absent: dict[str, dict[str, str]] = field(default_factory=dict)
    order: dict[str, tuple[str, ...]] = field(default_factory=dict)
    rates: Rates
    samples: int
    seconds: float = 0.0
    rows: tuple[Row, ...]

    def floor_us(self, row: Row) -> float:
        return self.rates.floor_us(row.flops, row.bytes, row.math)

    def rate(self, row: Row, us: float) -> Rate:
        return Rate(row.flops / us / 1e6, row.bytes / us / 1e3, self.floor_us(row) / us)

    @property
    def failed(self) -> bool:
        """Whether a row failed, or a provider on a row failed without a refusal."""
        errors = [timing.error for row in self.rows for timing in row.timings]
        return any(row.error for row in self.rows) or any(e and not e.startswith("refused") for e in errors)


def write(result: Result, path: str | Path) -> None:
    records.write(result, path)


def read(path: str | Path) -> Result:
    """Read a file that ``bench --json`` wrote.

    Raises:
        PolicyError: it cannot be read, or is another kind of file.
    """
    content = records.load(path)
    expected = f"{path}: expected what dsv4-backends bench --json writes"
    if not {"rates", "rows", "device", "schema_version"} <= content.keys():
        raise PolicyError(expected)
    version = content["schema_version"]
    if version not in (1, SCHEMA_VERSION):
        raise PolicyError(f"{path}: schema_version: expected 1 or {SCHEMA_VERSION}, got {version!r}")
    try:
        content = _from_1(content) if version == 1 else content
    except (KeyError, TypeError, AttributeError) as error:
        raise PolicyError(f"{expected}: {type(error).__name__}: {error}") from error
    result = records.build(Result, content, expected)
    for row in result.rows:
        if row.timed and min(*row.timed.values(), row.flops, row.bytes) <= 0:
            raise PolicyError(f"{expected}: {row.op} {row.name}: expected times, flops and bytes above 0")
    if min(result.rates.copy_gbps, result.rates.bf16_tflops) <= 0:
        raise PolicyError(f"{expected}: rates: expected rates above 0")
    return result


def _from_1(content: Mapping[str, Any]) -> dict[str, Any]:
    """Convert version 1. It has a row's name under ``row``, its timings under ``results``, each with its number of
    samples, labels instead of names, and the floors."""
    rows = [
        {
            **row,
            "name": row["row"],
            "timings": [
                {key: value for key, value in entry.items() if value is not None}
                | {"provider": entry["provider"].removesuffix(f" as {entry.get('simulated', '')}")}
                for entry in row["results"]
            ],
        }
        for row in content["rows"]
    ]
    counts = [entry["samples"] for row in content["rows"] for entry in row["results"] if "samples" in entry]
    return {**content, "schema_version": SCHEMA_VERSION, "rows": rows, "samples": max(counts, default=0)}


@dataclass(frozen=True)
class Verdict:
    """How good the automatic choice is.

    Attributes:
        rows: How many rows are judged: those with a choice and with times of more than one provider.
        near: The share of these rows on which the choice is within 3% of the best.
        worst, worst_row: The smallest ratio of the best time to the time of the choice, and its row.
        not_timed: Rows on which the chosen provider has no time.
    """

    rows: int
    near: float
    worst: float
    worst_row: str
    not_timed: tuple[str, ...]

    def __str__(self) -> str:
        if self.rows:
            text = (
                f"auto: within 3% of the best provider on {self.near:.0%} of {self.rows} rows where there is a "
                f"choice (wanted: {WANTED_NEAR:.0%}); at worst {self.worst:.2f} of it ({self.worst_row}; wanted: "
                f"{WANTED_WORST:.2f})"
            )
        else:
            text = "auto: not judged, since no row has the times of two providers"
        if self.not_timed:
            text += f"\nauto: on {len(self.not_timed)} rows it chose a provider that has no time here"
        return text


def verdict(rows: Iterable[Row]) -> Verdict:
    """How good the automatic choice is on some rows."""
    ratios, not_timed = [], []
    for row in rows:
        times = row.rivals
        if not times or row.auto is None:
            continue
        name = f"{row.op} {row.name}"
        if row.auto not in times:
            not_timed.append(name)
        elif len(times) > 1:
            ratios.append((min(times.values()) / times[row.auto], name))
    near = sum(ratio >= 1 / NEAR for ratio, _ in ratios)
    worst, at = min(ratios, default=(math.nan, ""))
    return Verdict(len(ratios), near / len(ratios) if ratios else math.nan, worst, at, tuple(not_timed))
