"""Make the table of the measured choice from results of ``bench``."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import PolicyError
from ..selection import preferences as measured

MARGIN = 1.03
"""A provider is preferred from this ratio on: less is not worth a choice that depends on the shape."""


def tune(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The table for the architecture on which all ``results`` were measured.

    For each class of shapes and each measured load, the fastest provider is preferred over the one that ranks first
    without measurements if it is at least 3% faster on every row, and faster at both quartiles: the providers take
    turns, so a clock that changes on the way moves the times of all of them, and their quartiles may overlap.
    Between two measured loads the nearer one decides, by their ratio; the outermost ones decide for all beyond.

    Raises:
        PolicyError: nothing was measured on a GPU, or on several architectures, or on one in place of another.
    """
    capabilities = sorted({str(result["device"]["capability"]) for result in results})
    if len(capabilities) != 1 or capabilities == ["None"]:
        found = ", ".join(capabilities).replace("None", "a CPU")
        raise PolicyError(f"tune: expected results of one architecture of GPU, got {found or 'none'}")
    for result in results:
        if any(f"{name}=" in result["command"] for name in ("DSV4_BACKENDS_DEVICE", "TRITON_OVERRIDE_ARCH")):
            raise PolicyError(f"tune: {result['device']['name']}: expected times of the architecture itself")
    sources = [
        {
            "device": result["device"]["name"],
            **{name: result[name] for name in ("date", "commit", "command") if name in result},
            "packages": result["machine"]["packages"],
            "providers": result["providers"],
        }
        for result in results
    ]
    # By class and load; a later file replaces what an earlier one has of the same row.
    rows: dict[tuple[str, str], tuple[int, Mapping[str, Any], Sequence[str]]] = {}
    for source, result in enumerate(results):
        for row in result["rows"]:
            if row["results"]:
                rows[row["op"], row["row"]] = source, row, result["order"][row["op"]]
    points: dict[tuple[str, str], dict[int, list[tuple[int, Mapping[str, Any], Sequence[str]]]]]
    points = defaultdict(lambda: defaultdict(list))
    for (op, _), found_row in rows.items():
        classes = measured.CLASSES[op]
        name, load = classes.read(*classes.of_row(found_row[1]["params"]))
        points[op, name][load].append(found_row)
    preferences = [
        {"op": op, "shapes": name, **entry}
        for (op, name), by_load in points.items()
        for entry in _of_class({load: _decide(at) for load, at in sorted(by_load.items())})
    ]
    return {
        "schema_version": measured.SCHEMA_VERSION,
        "capability": capabilities[0],
        "how": "dsv4-backends tune, from results of dsv4-backends bench --json",
        "sources": sources,
        "preferences": preferences,
    }


def _decide(rows: Sequence[tuple[int, Mapping[str, Any], Sequence[str]]]) -> dict[str, Any] | None:
    """What all rows of one load agree on, or None where the tiers' order stays."""
    agreed: dict[str, Any] | None = None
    for source, row, order in rows:
        times = {entry["provider"]: entry for entry in row["results"] if entry["us"] is not None}
        ranked = [name for name in order if name in times]
        if not ranked:
            return None
        over, best = ranked[0], min(ranked, key=lambda name: times[name]["us"])
        ratio = times[over]["us"] / times[best]["us"]
        if ratio < MARGIN or any(times[best][quartile] >= times[over][quartile] for quartile in ("q1", "q3")):
            return None
        if agreed is not None and (agreed["prefer"], agreed["over"]) != (best, over):
            return None
        ratio = min(ratio, agreed["ratio"]) if agreed is not None else ratio
        agreed = {"prefer": best, "over": over, "ratio": ratio, "source": source}
    return agreed


def _of_class(by_load: Mapping[int, dict[str, Any] | None]) -> Iterator[dict[str, Any]]:
    """Ranges of load with one preference."""
    loads = list(by_load)
    entry: dict[str, Any] | None = None
    for index, load in enumerate(loads):
        low = 1 if index == 0 else math.isqrt(loads[index - 1] * load) + 1
        high = None if index == len(loads) - 1 else math.isqrt(load * loads[index + 1])
        found = by_load[load]
        if found is not None and entry is not None and all(found[k] == entry[k] for k in ("prefer", "over", "source")):
            entry |= {"high": high, "ratio": min(entry["ratio"], round(found["ratio"], 3))}
            continue
        if entry is not None:
            yield entry
        entry = None if found is None else {"low": low, "high": high, **found, "ratio": round(found["ratio"], 3)}
    if entry is not None:
        yield entry
