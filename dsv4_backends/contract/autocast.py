"""Off with ``torch.autocast``: what an op means has its dtypes already."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

DEVICES = ("cpu", "cuda")


@contextmanager
def without_autocast() -> Iterator[None]:
    """Within the block nothing is cast, on any device."""
    import torch

    with ExitStack() as entered:
        for kind in DEVICES:
            if torch.is_autocast_enabled(kind):
                entered.enter_context(torch.autocast(kind, enabled=False))
        yield
