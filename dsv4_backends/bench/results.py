"""What a benchmark's result says: times, rates, and how good the automatic choice was."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

SCHEMA_VERSION = 1
"""Of the files that ``bench --json`` writes."""
NEAR = 1.03
"""A provider within this of the best is as good as the best."""
WANTED_NEAR, WANTED_WORST = 0.95, 0.9
"""The automatic choice should be as good as the best on this share of rows, and never below this part of the best."""


def timed(row: Mapping[str, Any]) -> dict[str, float]:
    """Microseconds by provider, for those that have a time."""
    return {result["provider"]: result["us"] for result in row["results"] if result["us"] is not None}


def rivals(row: Mapping[str, Any]) -> dict[str, float]:
    """Those times that a choice can have: not of code for another architecture."""
    simulated = {result["provider"] for result in row["results"] if result.get("simulated")}
    return {name: us for name, us in timed(row).items() if name not in simulated}


def rated(row: Mapping[str, Any], us: float) -> dict[str, float]:
    """TFLOP/s, GB/s and the share of the floor that a time means."""
    return {
        "tflops": row["flops"] / us / 1e6,
        "gbps": row["bytes"] / us / 1e3,
        "floor_share": row["floor_us"] / us,
    }


def verdict(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """How good the automatic choice is, over the rows where it had one and more than one provider has a time.

    Returns:
        ``rows`` judged; ``near``: the share of them where it is within 3% of the best; ``worst``: the least ratio of
        the best time to its time, with its row; ``not_timed``: rows where it chose somebody who has no time.
    """
    ratios, not_timed = [], []
    for row in rows:
        times = rivals(row)
        if not times or row.get("auto") is None:
            continue
        name = f"{row['op']} {row['row']}"
        if row["auto"] not in times:
            not_timed.append(name)
        elif len(times) > 1:
            ratios.append((min(times.values()) / times[row["auto"]], name))
    near = sum(ratio >= 1 / NEAR for ratio, _ in ratios)
    worst, at = min(ratios, default=(math.nan, ""))
    return {
        "rows": len(ratios),
        "near": near / len(ratios) if ratios else math.nan,
        "worst": worst,
        "worst_row": at,
        "not_timed": not_timed,
    }


def verdict_text(found: Mapping[str, Any]) -> str:
    lines = []
    if found["rows"]:
        lines.append(
            f"auto: within 3% of the best provider on {found['near']:.0%} of {found['rows']} rows where there is a "
            f"choice (wanted: {WANTED_NEAR:.0%}); at worst {found['worst']:.2f} of it ({found['worst_row']}; wanted: "
            f"{WANTED_WORST:.2f})"
        )
    else:
        lines.append("auto: not judged, since no row has the times of two providers")
    if found["not_timed"]:
        lines.append(f"auto: on {len(found['not_timed'])} rows it chose a provider that has no time here")
    return "\n".join(lines)


def memory_gbps(rates: Mapping[str, float]) -> float:
    """The rate at which memory was seen to move: most ops mostly read. Older results have the copy's rate only."""
    return max(rates["copy_gbps"], rates.get("read_gbps", 0.0))


def failed(result: Mapping[str, Any]) -> bool:
    """Whether something went wrong: a row, or a provider on a row, without a refusal."""
    entries = [entry["error"] for row in result["rows"] for entry in row["results"]]
    return any(row.get("error") for row in result["rows"]) or any(e and not e.startswith("refused") for e in entries)
