"""The rows of a benchmark: calls that DeepSeek V4 makes in a deployment. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..contract import CONTRACTS
from ..contract.config import from_config
from ..contract.models import MODELS
from ..contract.projection.traffic import SCALES
from ..contract.traffic import Row

__all__ = ["SCALES", "Row", "rows", "tiny"]


def rows(models: Sequence[str], tp: int, ops: Sequence[str], scales: str = SCALES[0]) -> list[Row]:
    """The rows of ``ops`` for some models, each row once.

    Args:
        models: ``"flash"``, ``"pro"``, or the path of a ``config.json``; none: Flash and Pro.
        tp: Tensor parallel size; a row is what one rank computes.
        ops: Op names; their order is kept.
        scales: One of ``SCALES``.

    Raises:
        ValueError: not a model, or its heads do not divide by ``tp``.
        OSError: a configuration cannot be read.
    """
    found: dict[tuple[str, str], Row] = {}
    for source in models or tuple(MODELS):
        model = from_config(source)
        label, rank = source if source in MODELS else model.name.replace(" ", "-"), model.rank(tp)
        for op in ops:
            for row in _with(scales, CONTRACTS[op].traffic.rows(label, rank)):
                found.setdefault((row.op, row.name), row)
    return [row for op in ops for row in found.values() if row.op == op]


def tiny(ops: Iterable[str], scales: str = SCALES[0]) -> list[Row]:
    """One or two rows for each op that a CPU computes quickly."""
    return [row for op in ops for row in _with(scales, CONTRACTS[op].traffic.tiny)]


def _with(scales: str, rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.only.get("scales", scales) == scales]
