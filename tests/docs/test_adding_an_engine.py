"""docs/adding-an-engine.md, step by step: its files are written, its line is added, and the engine is there."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from installed import distribution
from walkthrough import Page

from dsv4_backends import engines
from dsv4_backends.commands import cli
from dsv4_backends.engines import hook, patching

PAGE = Page("adding-an-engine.md")


def block(kind: str) -> str:
    (found,) = PAGE.of(kind)
    return found.text


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The steps of the page, with toy 1.2.0 installed."""
    distribution(tmp_path, "toy", "1.2.0", files={name: text for _, name, _, text in PAGE.of("file")})
    monkeypatch.syspath_prepend(str(tmp_path))
    # The new folder and the new line, as if they stood in the package itself.
    monkeypatch.setattr(engines, "__path__", [*engines.__path__, str(tmp_path / "dsv4_backends" / "engines")])
    ((name, target),) = ast.literal_eval("{" + block("line") + "}").items()
    monkeypatch.setitem(engines.ENGINES, name, target)
    monkeypatch.setenv("DSV4_BACKENDS_DEVICE", "cpu")
    made = engines.load("toy")
    yield made
    made.undo()  # type: ignore[attr-defined]
    for module in [m for m in sys.modules if m.split(".")[0] == "toy" or m.startswith("dsv4_backends.engines.toy")]:
        del sys.modules[module]
    vars(engines).pop("toy", None)
    assert hook._FINDER not in sys.meta_path


def test_every_block_of_the_page_is_run() -> None:
    assert len(PAGE.blocks) == PAGE.text.count("\n```") / 2
    assert {kind for kind, *_ in PAGE.blocks} == {"file", "line", "toml", "console", "code"}


def test_the_command_prints_what_the_page_shows(toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    command, _, shown = block("console").partition("\n")
    assert cli.main(command.removeprefix("$ dsv4-backends ").split()) == 0
    assert capsys.readouterr().out == shown
    with pytest.raises(SystemExit):
        cli.main(["engine", "--help"])
    assert re.search(rf"^  ENGINE +{', '.join(engines.ENGINES)}$", capsys.readouterr().out, re.MULTILINE)
    assert "toy" in engines.ENGINES


def test_the_code_of_the_page(toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    text = block("code")
    exec(compile(text, "adding-an-engine.md", "exec"), {})
    promised = re.findall(r"^print\(.*  # (\[\]|[^:\n]+)", text, re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == promised
    assert len(promised) == 2
    kernels = importlib.import_module("toy.kernels")
    assert kernels.mix_streams.__module__ == "toy.kernels"


def test_the_entry_point_of_the_page(
    toy: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What toy would call: nothing without the variable, and with it one line at the first call."""
    (target,) = tomllib.loads(block("toml"))["project"]["entry-points"]["toy.plugins"].values()
    module, _, name = target.partition(":")
    register = getattr(importlib.import_module(module), name)
    for value in ("0", "vllm"):
        monkeypatch.setenv("DSV4_BACKENDS_ENGINE", value)
        register()
        assert toy.rows == ()
    for value in ("1", "toy", "vllm,toy", "force"):
        monkeypatch.setenv("DSV4_BACKENDS_ENGINE", value)
        register()
        assert [row.state for row in toy.rows] == [patching.PLANNED]
        assert toy.plan().enabled
        assert toy.undo() == []
    register()
    torch, layer = importlib.import_module("torch"), importlib.import_module("toy.layer")
    result = layer.forward(torch.ones(2, 64).bfloat16(), torch.ones(24, 64))
    torch.testing.assert_close(result, torch.full((2, 24), 64.0), rtol=1e-5, atol=0)
    (line,) = caplog.messages
    assert line == "toy 1.2.0 runs on dsv4_backends: hc_prenorm_gemm torch"


def test_doctor_and_the_rules_of_the_page(
    toy: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def engine_lines(code: int) -> list[str]:
        assert cli.main(["doctor"]) == code
        return [line for line in capsys.readouterr().out.splitlines() if line.split()[1:2] == ["engine"]]

    assert engine_lines(0) == []
    for value in ("1", "toy"):
        monkeypatch.setenv("DSV4_BACKENDS_ENGINE", value)
        (line,) = engine_lines(0)
        assert re.fullmatch(r"ok +engine +toy 1\.2\.0: 1 of 1 names are replaced", line)
    monkeypatch.setenv("TOY_NO_PLUGINS", "1")
    (line,) = engine_lines(1)
    assert "TOY_NO_PLUGINS is set" in line
    assert [r.code for row in toy.plan("sm_100").rows for r in row.reasons] == ["engine-arch"]


def test_a_toy_that_is_different_is_refused(toy: Any, tmp_path: Path) -> None:
    """The version gate, the signature that the page names, and a function that is gone."""

    def refused() -> list[str]:
        (row,) = toy.plan().rows
        assert row.state == patching.REFUSED
        return [reason.code for reason in row.reasons]

    source = tmp_path / "toy" / "kernels.py"
    before = source.read_text()
    source.write_text(before.replace("weight):", "weight, scale):"))
    assert refused() == ["engine-target"]
    source.write_text(textwrap.dedent("def other(): ..."))
    assert refused() == ["engine-target"]
    source.write_text(before)
    assert toy.plan().ok
    shutil.rmtree(tmp_path / "toy-1.2.0.dist-info")
    distribution(tmp_path, "toy", "1.3.0")
    assert refused() == ["engine-version"]
    assert toy.plan(force=True).ok
