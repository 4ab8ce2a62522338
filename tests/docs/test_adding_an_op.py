"""One more op, added as docs/adding-an-op.md says: in a copy of the tree, by its files, its edits and its commands."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from paths import ROOT
from walkthrough import Page, Tree

PAGE = Page("adding-an-op.md")
KERNEL = "kernels: portable (>=8.0)"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    made = Tree(tmp_path_factory.mktemp("tree"))
    made.follow(PAGE)
    assert made.run(PAGE.commands[0]).count("written") >= 3
    return made


def shown(tree: Tree, command: str) -> str:
    """What a command of the page prints."""
    assert command in PAGE.commands
    return tree.run(command)


def test_every_block_of_the_page_is_run() -> None:
    tests = Path(__file__).read_text(encoding="utf-8")
    for command in PAGE.commands[1:]:
        assert f'"{command}"' in tests, command
    assert {kind for kind, *_ in PAGE.blocks} == {"file", "edit", "commands"}
    assert len(PAGE.blocks) == PAGE.text.count("\n```") / 2
    for edit in PAGE.of("edit"):  # "one line"
        assert sum(line[0] != " " for line in edit.text.splitlines()) == 1


def test_the_docs_have_it(tree: Tree) -> None:
    assert tree.run("python tools/docs.py --check") == ""


def test_its_check_is_printed(tree: Tree) -> None:
    assert "def rms_norm(x, weight, eps, *, out=None)" in shown(tree, "python -m dsv4_backends.contract rms_norm")


def test_ops_has_it_written_and_not_yet_written(tree: Tree) -> None:
    """As it is once the docs are generated, and before."""
    look = "import dsv4_backends.ops as o, inspect; print(inspect.getsourcefile(o.rms_norm), o.rms_norm.__doc__[:4])"
    assert tree.run(f'python -c "{look}"') == f"{tree.path}/dsv4_backends/ops.py Root\n"
    ops = tree.path / "dsv4_backends" / "ops.py"
    written = ops.read_text()
    try:
        shutil.copy(ROOT / "dsv4_backends" / "ops.py", ops)
        code = (
            "import torch; from dsv4_backends import ops; x = torch.ones(2, 4).bfloat16(); "
            "print(ops.rms_norm(x, torch.ones(4), 0).sum().item(), ops.rms_norm.__doc__[:4])"
        )
        assert tree.run(f'python -c "{code}"') == "8.0 Root\n"
    finally:
        ops.write_text(written)


def test_the_commands_that_choose(tree: Tree) -> None:
    assert re.search(r"^rms_norm +torch +reference", shown(tree, "dsv4-backends list"), re.MULTILINE)
    assert "\n2. torch: selected" in shown(tree, "dsv4-backends explain rms_norm")
    checked = shown(tree, "dsv4-backends check --model flash")
    assert re.search(r"^rms_norm +norm, prefill +m 8192, k 4096 +torch", checked, re.MULTILINE)


def test_the_commands_that_run_it(tree: Tree) -> None:
    assert re.search(r"^rms_norm +torch +5/5 +out ", shown(tree, "dsv4-backends verify --op rms_norm"), re.MULTILINE)
    assert "tiny m=4 k=512" in shown(tree, "dsv4-backends bench --op rms_norm")
    ready = shown(tree, "dsv4-backends warmup --model flash --op rms_norm")
    assert re.search(r"^rms_norm +torch +0$", ready, re.MULTILINE)


def test_the_conformance_suite_has_it(tree: Tree) -> None:
    assert re.search(r"\d+ passed", shown(tree, "pytest tests/providers/test_conformance_torch.py -k rms_norm"))


def test_the_tests_of_every_op_have_it(tree: Tree) -> None:
    """And pass with it; those of what ``list`` prints too, which name all ops."""
    folders = " ".join(f"tests/{name}" for name in ("contract", "selection", "commands", "bench", "runtime"))
    assert re.search(r"\d+ passed", tree.run(f"pytest {folders} -k 'rms_norm or on_every_device or choice_and_fits'"))


def test_a_gpu_gets_the_kernel(tree: Tree) -> None:
    listed = shown(tree, "dsv4-backends list --device sm_86")
    assert re.search(r"^rms_norm +triton +portable", listed, re.MULTILINE)
    explained = shown(tree, "dsv4-backends explain rms_norm --device sm_86")
    assert re.search(r"1\. triton: selected(.|\n)*" + re.escape(KERNEL), explained)
    assert "(tables/rms_norm.json)" in explained


def test_the_kernel_compiles(tree: Tree) -> None:
    """At most two kernels: sizes that grow with the load are not constants."""
    made = shown(tree, "python tools/compile_matrix.py --op rms_norm --capability 8.6")
    assert re.search(r": [12] kernels in \d+ s, 0 bad$", made.strip())


def test_its_plans_are_tested(tree: Tree) -> None:
    """By the file that the page adds; without it the tests name the file to write."""
    command = "pytest tests/providers/test_triton_plans.py tests/providers/test_triton_ahead.py -k rms_norm"
    tested = shown(tree, command)
    assert re.search(r"\d+ passed", tested)
    assert "failed" not in tested
    name = "tests/providers/plans/norm/rms_norm.py"
    file = tree.path / name
    text = file.read_text()
    for other, said in ((None, f"rms_norm: write {name}"), (text.replace("(rows,)", "(rows + 1,)"), "False, True")):
        try:
            file.unlink() if other is None else file.write_text(other)
            with pytest.raises(AssertionError, match=re.escape(said)):
                tree.run(command.replace("tests/providers/test_triton_ahead.py ", ""))
        finally:
            file.write_text(text)


@pytest.mark.usefixtures("triton_interpreter")
def test_the_kernel_in_the_interpreter(tree: Tree) -> None:
    verified = shown(tree, "TRITON_INTERPRET=1 dsv4-backends verify --op rms_norm --provider triton")
    assert re.search(r"^rms_norm +triton +5/5 +out ", verified, re.MULTILINE)
    ready = shown(tree, "TRITON_INTERPRET=1 dsv4-backends warmup --model flash --op rms_norm")
    assert re.search(r"^rms_norm +triton +0$", ready, re.MULTILINE)
    tested = shown(tree, "TRITON_INTERPRET=1 pytest tests/providers/triton_suite.py -k rms_norm")
    assert re.search(r"\d+ passed", tested)
    assert "failed" not in tested


def test_no_op_is_named_by_hand(tree: Tree) -> None:
    """Everything that has the other ops has this one."""
    code = (
        "import json, dsv4_backends as d; from dsv4_backends.selection.preferences import CLASSES; "
        "from dsv4_backends.bench import shapes; from dsv4_backends import ops; "
        "from dsv4_backend_triton.variants import OPS; "
        "print(json.dumps([list(x) for x in (d.OPS, d.CONTRACTS, CLASSES, ops.__all__, OPS, "
        "dict.fromkeys(r.op for r in shapes.tiny(d.OPS)))]))"
    )
    found = json.loads(tree.run(f'python -c "{code}"'))
    assert found[0][-1] == "rms_norm"
    assert all(names == found[0] for names in found)
