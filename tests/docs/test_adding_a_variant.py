"""A kernel for another architecture, added as docs/adding-a-variant.md says, in a copy of the tree."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from walkthrough import Page, Tree

PAGE = Page("adding-a-variant.md")
INTERPRETED = "TRITON_INTERPRET=1 DSV4_BACKENDS_DEVICE=sm_100 "
MODE = "DSV4_BACKENDS_BATCH_INVARIANT=1 "
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
    assert launched["9.0 200"] == "_hc_wgmma_tf32_kernel"
    assert launched["10.0 64"] == launched["12.0 200"] == "_hc_kernel"


def shown(tree: Tree, command: str) -> str:
    """What a command of the page prints."""
    assert command in PAGE.commands
    return tree.run(command)


def test_every_block_of_the_page_is_run() -> None:
    tests = Path(__file__).read_text(encoding="utf-8")
    for command in PAGE.commands:
        assert command.removeprefix(INTERPRETED).removeprefix(MODE) in tests, command
    assert {kind for kind, *_ in PAGE.blocks} == {"file", "edit", "commands"}
    assert len(PAGE.blocks) == PAGE.text.count("\n```") / 2


def test_the_commands_that_choose(tree: Tree) -> None:
    listed = shown(tree, "dsv4-backends list --device sm_100")
    assert re.search(r"^hc_prenorm_gemm +triton +portable", listed, re.MULTILINE)
    explained = shown(tree, "dsv4-backends explain hc_prenorm_gemm --device sm_100")
    assert (
        "kernels: tcgen05 (==10.*), wgmma_tf32 (==9.0), wgmma (==9.0), mma_sync (==8.* or ==12.*), portable (>=8.0)"
        in explained
    )
    checked = shown(tree, "dsv4-backends check --model flash --device sm_100")
    assert re.search(r"^hc_prenorm_gemm .* triton +portable", checked, re.MULTILINE)


def test_it_compiles(tree: Tree) -> None:
    compiled = shown(tree, "python tools/compile_matrix.py --op hc_prenorm_gemm --capability 10.0 --print")
    assert re.search(r"\d+ kernels in \d+ s, 0 bad", compiled)
    assert re.search(r"^sm_100 hc_tcgen05 .*: \d+ registers, 0 bytes of stack, \d+ of shared memory$", compiled, re.M)


@pytest.mark.usefixtures("triton_interpreter")
def test_the_commands_that_run_it(tree: Tree) -> None:
    ready = shown(tree, f"{INTERPRETED}dsv4-backends warmup --model flash --op hc_prenorm_gemm")
    assert re.search(r"^hc_prenorm_gemm +triton +0$", ready, re.MULTILINE)
    tested = shown(tree, f"{INTERPRETED}pytest tests/providers/triton_suite.py -k hc_prenorm_gemm")
    assert re.search(r"\d+ passed", tested)
    assert "failed" not in tested
    verify = f"{INTERPRETED}{MODE}dsv4-backends verify --op hc_prenorm_gemm --provider triton"
    assert re.search(r"^hc_prenorm_gemm +triton +(\d+)/\1 +out ", shown(tree, verify), re.MULTILINE)
    timed = shown(tree, f"{INTERPRETED}{MODE}dsv4-backends bench --op hc_prenorm_gemm")
    assert re.search(r"^ +triton \(auto\) +[\d.]+ ", timed, re.MULTILINE)
    # And it is the variant that they run.
    path = tree.path / "backends/dsv4_backend_triton/hyper_connection/hc_prenorm_gemm/tcgen05.py"
    before = path.read_text()
    path.write_text(before.replace("ALIGNED, False, STAGES, PDL", "ALIGNED, False, STAGES, PDL + 1 / 0"))
    try:
        with pytest.raises(AssertionError, match="division by zero"):
            tree.run(verify)
    finally:
        path.write_text(before)
