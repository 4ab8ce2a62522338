"""The reference provider passes the suite that it ships with."""

from __future__ import annotations

from dsv4_backends.testing import ProviderConformance


class TestTorch(ProviderConformance):
    provider = "torch"
