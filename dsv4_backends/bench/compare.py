"""What got slower between two results of ``bench``."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PolicyError
from .results import SCHEMA_VERSION

NOISE = 0.03
"""A change of the median below this is noise, whatever the quartiles say."""


@dataclass(frozen=True)
class Change:
    """One provider on one row, before and after.

    Attributes:
        op, row, provider: What was timed.
        before, after: Median microseconds; None where there was no time.
        verdict: ``slower``, ``faster``, ``same``, ``lost`` (measured again, and has no time now), ``absent`` (not
            measured again), or ``new``.
        note: Why there is no time.
    """

    op: str
    row: str
    provider: str
    before: float | None
    after: float | None
    verdict: str
    note: str = ""

    @property
    def bad(self) -> bool:
        return self.verdict in ("slower", "lost")


def read(path: str | Path) -> dict[str, Any]:
    """A file that ``bench --json`` wrote.

    Raises:
        PolicyError: it cannot be read or is something else.
    """
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PolicyError(f"{path}: {error}") from error
    if not isinstance(result, dict) or not {"rates", "rows", "device", "schema_version"} <= result.keys():
        raise PolicyError(f"{path}: expected what dsv4-backends bench --json writes")
    if result["schema_version"] != SCHEMA_VERSION:
        raise PolicyError(f"{path}: schema_version: expected {SCHEMA_VERSION}, got {result['schema_version']}")
    return result


@contextlib.contextmanager
def understood(*paths: str | Path) -> Iterator[None]:
    """For what reads the rows of results: a file that lacks something is the file's fault.

    Raises:
        PolicyError: something is not there, or is of another kind.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        found = f"{type(error).__name__}: {error}"
        raise PolicyError(
            f"{', '.join(map(str, paths))}: expected what dsv4-backends bench --json writes ({found})"
        ) from error


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Every row and provider of either result, in the order of the first.

    Slower means: the median is more than 3% higher, and the quarter of the samples that was slowest before is still
    faster than the quarter that is fastest now.
    """
    old, new = dict(_entries(before)), dict(_entries(after))
    return [_change(key, old.get(key), new.get(key)) for key in dict.fromkeys((*old, *new))]


def _entries(result: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str, str], Mapping[str, Any]]]:
    for row in result["rows"]:
        for entry in row["results"]:
            yield (row["op"], row["row"], entry["provider"]), entry


def _change(key: tuple[str, str, str], old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> Change:
    before = old["us"] if old is not None else None
    after = new["us"] if new is not None else None
    if old is None or new is None or before is None or after is None:
        verdict = "new" if after is not None else "same" if before is None else "absent" if new is None else "lost"
        return Change(*key, before, after, verdict, new["error"] if new is not None and verdict == "lost" else "")
    verdict = "same"
    if after > before * (1 + NOISE) and new["q1"] > old["q3"]:
        verdict = "slower"
    elif before > after * (1 + NOISE) and old["q1"] > new["q3"]:
        verdict = "faster"
    return Change(*key, before, after, verdict)


def passed(changes: list[Change]) -> bool:
    """Whether something was compared and nothing got slower or lost its time."""
    return any(c.before and c.after for c in changes) and not any(c.bad for c in changes)
