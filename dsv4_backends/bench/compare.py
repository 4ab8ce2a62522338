"""Compare two results of ``bench``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .results import Result, Timing

NOISE = 0.03
"""A smaller change of the median is noise, whatever the quartiles are."""


@dataclass(frozen=True)
class Change:
    """One provider on one row, before and after.

    Attributes:
        op, row, provider: What was timed.
        before, after: Median microseconds; None: no time.
        verdict: ``slower``, ``faster``, ``same``, ``lost`` (measured again without a time), ``absent`` (not
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


def compare(before: Result, after: Result) -> list[Change]:
    """Every row and provider of either result, in the order of the first.

    Slower means: the median is more than 3% higher, and the first quartile now is above the third quartile before.
    """
    old, new = dict(_timings(before)), dict(_timings(after))
    return [_change(key, old.get(key), new.get(key)) for key in dict.fromkeys((*old, *new))]


def _timings(result: Result) -> Iterator[tuple[tuple[str, str, str], Timing]]:
    for row in result.rows:
        for timing in row.timings:
            yield (row.op, row.name, timing.label), timing


def _change(key: tuple[str, str, str], old: Timing | None, new: Timing | None) -> Change:
    before, after = old.us if old else None, new.us if new else None
    if old is None or new is None or before is None or after is None:
        verdict = "new" if after is not None else "same" if before is None else "absent" if new is None else "lost"
        return Change(*key, before, after, verdict, new.error if new is not None and verdict == "lost" else "")
    verdict = "same"
    if after > before * (1 + NOISE) and new.q1 > old.q3:
        verdict = "slower"
    elif before > after * (1 + NOISE) and old.q1 > new.q3:
        verdict = "faster"
    return Change(*key, before, after, verdict)


def passed(changes: list[Change]) -> bool:
    """Whether anything was compared, and nothing got slower or lost its time."""
    return any(c.before and c.after for c in changes) and not any(c.bad for c in changes)
