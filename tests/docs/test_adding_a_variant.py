"""A kernel for another architecture, added as docs/adding-a-variant.md says, in a copy of the tree."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from walkthrough import Page, Tree

PAGE = Page("adding-a-variant.md")
LAUNCHED = """
import json, sys
sys.path.insert(0, "tests/support")
import traffic
from dsv4_backend_triton import ahead
from dsv4_backend_triton.arch import arch_from_capability
from packaging.version import Version

found = {}
for capability in ("9.0", "10.0", "10.3", "12.0"):
    arch = arch_from_capability(Version(capability))
    for m in (8, 64, 65, 200):
        recorded = ahead.record("hc_prenorm_gemm", [traffic.prenorm(m, 4096, 24)], arch)
        found[f"{capability} {m}"] = next(iter(recorded)).kernel.__name__
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    made = Tree(tmp_path_factory.mktemp("tree"))
    made.follow(PAGE)
    (made.path / "launched.py").write_text(LAUNCHED)
    return made


def test_it_serves_where_it_is_for(tree: Tree) -> None:
    """And nowhere else, nor the calls that its plan leaves to others: as warm-up and the compile matrix record it."""
    launched: dict[str, Any] = json.loads(tree.run("python launched.py"))
    ours = [where for where, kernel in launched.items() if kernel == "_hc_tcgen05_kernel"]
    assert ours == ["10.0 65", "10.0 200", "10.3 65", "10.3 200"]
    assert launched["9.0 200"] == "_hc_wgmma_kernel"
    assert launched["10.0 64"] == launched["12.0 200"] == "_hc_kernel"


def test_the_commands_of_the_page(tree: Tree) -> None:
    explain, matrix = PAGE.commands
    assert "kernels: tcgen05 (==10.*), wgmma (==9.0), mma_sync (==8.* or ==12.*), portable (>=8.0)" in tree.run(explain)
    compiled = tree.run(matrix)
    assert re.search(r"\d+ kernels in \d+ s, 0 bad", compiled)
    assert re.search(r"^sm_100 hc_tcgen05 .*: \d+ registers, 0 bytes of stack, \d+ of shared memory$", compiled, re.M)
    assert {kind for kind, *_ in PAGE.blocks} == {"file", "edit", "commands"}
