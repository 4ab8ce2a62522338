"""The conformance suite for providers. Needs pytest: this package's extra ``test`` has it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checks import CheckFailed
    from .suite import ProviderConformance

__all__ = ["CheckFailed", "ProviderConformance"]


def __getattr__(name: str) -> Any:
    # Imported lazily, so that `verify` can use the oracle without pytest.
    if name == "CheckFailed":
        from .checks import CheckFailed

        return CheckFailed
    if name == "ProviderConformance":
        import pytest

        pytest.register_assert_rewrite("dsv4_backends.testing.suite")
        from .suite import ProviderConformance

        return ProviderConformance
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
