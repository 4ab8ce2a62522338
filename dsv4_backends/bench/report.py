"""A benchmark's result as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ..report import table

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


def text(result: Mapping[str, Any]) -> str:
    """One table per op, then what could not be measured and why, then the automatic choice."""
    rates = result["rates"]
    reached = [f"{name} {rates[f'{name}_gbps']:.0f} GB/s" for name in ("copy", "read") if f"{name}_gbps" in rates]
    reached += [
        f"{name} {rates[f'{name}_tflops']:.4g} TFLOP/s" for name in ("bf16", "fp8", "tf32") if f"{name}_tflops" in rates
    ]
    parts = [f"{result['device']['name']}: {', '.join(reached)}; an empty graph {rates['launch_us']:.1f} µs"]
    if result["device"]["type"] != "cuda":
        parts.append("On a CPU: small rows, the wall clock, and no word about any GPU. It shows that the bench works.")
    by_op: dict[str, list[tuple[str, ...]]] = {}
    problems = []
    for row in result["rows"]:
        lines = by_op.setdefault(row["op"], [])
        if row.get("error"):
            problems.append(f"FAILED {row['op']} {row['row']}: {row['error']}")
        times = rivals(row)
        first = True
        for entry in row["results"]:
            if entry["error"]:
                kind = "" if entry["error"].startswith("refused") else "FAILED "
                problems.append(f"{kind}{row['op']} {row['row']}: {entry['provider']}: {entry['error']}")
            us = entry["us"]
            shown = ("-",) * 6
            if us is not None:
                rate = rated(row, us)
                others = [value for name, value in times.items() if name != entry["provider"]]
                shown = (
                    f"{us:.1f}",
                    f"{entry['q1']:.1f}..{entry['q3']:.1f}",
                    f"{rate['tflops']:.4g}",
                    f"{rate['gbps']:.3g}" if rate["gbps"] < 100 else f"{rate['gbps']:.0f}",
                    f"{rate['floor_share']:.0%}",
                    f"{min(others) / us:.2f}" if others else "-",
                )
            mark = " (auto)" if entry["provider"] == row["auto"] else ""
            lines.append((row["row"] if first else "", entry["provider"] + mark, *shown))
            first = False
    header = ("ROW", "PROVIDER", "µs", "QUARTILES", "TFLOP/s", "GB/s", "OF FLOOR", "VS BEST OTHER")
    parts += [f"{op}\n{table(header, lines)}" for op, lines in by_op.items()]
    absent = [
        f"not measured: {op}: {name}: {why}" for op, all_ in result["absent"].items() for name, why in all_.items()
    ]
    parts += ["\n".join(lines) for lines in (problems, absent) if lines]
    parts.append(f"{verdict_text(verdict(result['rows']))}\n{len(result['rows'])} rows in {result['seconds']:.0f} s")
    return "\n\n".join(parts)


def failed(result: Mapping[str, Any]) -> bool:
    """Whether something went wrong: a row, or a provider on a row, without a refusal."""
    entries = [entry["error"] for row in result["rows"] for entry in row["results"]]
    return any(row.get("error") for row in result["rows"]) or any(e and not e.startswith("refused") for e in entries)
