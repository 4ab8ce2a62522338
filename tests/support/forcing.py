"""One variant with one launch configuration, whatever the plan says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from dsv4_backend_triton import variants


@contextmanager
def forced(op: str, name: str, config: Any) -> Iterator[None]:
    """Within the block, calls of an op are served by this variant with this configuration."""
    choices, launch = variants._choices, variants.load(op, name).launch

    def one(which: str, shape: Any) -> Any:
        return ((None, launch, config),) if which == op else choices(which, shape)

    with mock.patch.object(variants, "_choices", one):
        yield
