"""One variant of an op, whichever is planned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from dsv4_backend_triton import variants


@contextmanager
def forced(op: str, name: str, config: Any = None) -> Iterator[None]:
    """Within the block, calls of an op are served by this variant, with this configuration or the one that it plans."""
    choices, module = variants._choices, variants.load(op, name)

    def one(which: str, shape: Any) -> Any:
        if which != op:
            return choices(which, shape)
        return ((None, module.launch, module.plan(shape) if config is None else config),)

    with mock.patch.object(variants, "_choices", one):
        yield
