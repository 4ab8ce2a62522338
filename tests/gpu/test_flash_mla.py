"""The provider flash_mla over the installed FlashMLA; ``tools/conformance.py`` runs it at level full.

That the library does not serve here is a failure, and not a skip.
"""

from __future__ import annotations

from gpus import needs

needs(library="flash_mla")

from graphs import check_step_in_a_graph

from dsv4_backends.testing import ProviderConformance, checks


class TestFlashMla(ProviderConformance):
    provider = "flash_mla"

    def test_every_op_serves(self, op: str) -> None:
        checks.subject(self.provider, op, checks.default_device())


def test_step_in_a_graph() -> None:
    check_step_in_a_graph("flash_mla", "sparse_mla_decode", "flash tp1 mtp")
