"""Every command's exit codes, as the table in ``commands/shared.py`` has them and the docs repeat them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from bench_results import result_of, row_of

from dsv4_backends import records
from dsv4_backends.commands import cli
from dsv4_backends.commands.shared import FINDING, FINDINGS, USAGE
from dsv4_backends.runtime import bind

BROKEN = "import a_module_that_is_not_there\n"
PIN = "hc_prenorm_gemm=deep_gemm"
"""A pin that nothing here can meet."""
FOUND = {
    "list": ["list"],
    "explain": ["explain", "hc_prenorm_gemm", "--device", "sm_86"],
    "plugins": ["plugins"],
    "doctor": ["doctor"],
    "check": ["check", "--model", "flash", "--device", "sm_86"],
    "engine": ["engine", "vllm", "--device", "sm_86"],
    "verify": ["verify", "--op", "hc_prenorm_gemm", "--provider", "deep_gemm"],
    "warmup": ["warmup", "--model", "flash", "--op", "hc_prenorm_gemm", "--torch-device", "cpu"],
    "bench": ["bench", "--op", "hc_prenorm_gemm", "--provider", "deep_gemm", "--torch-device", "cpu"],
    "bench compare": ["bench", "compare", "fast.json", "slow.json"],
}
MISTAKES = [
    ["list", "--device", "banana"],
    ["explain", "hc_prenorm_gemm", "--device", "banana"],
    ["engine", "vllm", "--device", "banana"],
    ["check", "--model", "flash", "--tp", "3"],
    ["check", "--model", "nobody.json"],
    ["check", "--model", "flash", "--max-model-len", "2000000"],
    ["warmup", "--model", "flash", "--tp", "3"],
    ["warmup", "--model", "nobody.json"],
    ["warmup", "--model", "flash", "--tp", "0"],
    ["bench", "--model", "flash", "--tp", "3"],
    ["bench", "--model", "nobody.json"],
    ["bench", "compare", "nobody.json", "fast.json"],
    ["bench", "plot", "nobody.json", "plot.svg"],
    ["tune", "nobody.json"],
    ["verify", "--provider", "nobody"],
]


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, us in (("fast", 10.0), ("slow", 20.0)):
        records.write(result_of(row_of("mqa_logits", "one", a=us)), f"{name}.json")


def test_every_command_is_in_the_table() -> None:
    assert set(FOUND) == {name for name, meaning in FINDINGS.items() if meaning}


@pytest.mark.parametrize("name", FOUND)
def test_a_finding(
    name: str,
    fake_plugin: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if name in ("list", "plugins", "doctor"):
        fake_plugin("acme", BROKEN)
    else:
        monkeypatch.setenv("DSV4_BACKENDS_PIN", PIN)
        bind.reset()  # another test in this process may have bound the op already
    code = cli.main(FOUND[name])
    captured = capsys.readouterr()
    bind.reset()
    assert code == FINDING, captured.err
    assert "bug in dsv4-backends" not in captured.err


@pytest.mark.parametrize("argv", MISTAKES, ids=" ".join)
def test_a_mistake(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dsv4-backends: ")


@pytest.mark.parametrize("name", ["list", "plugins", "explain hc_prenorm_gemm", "check --model flash", "verify"])
def test_a_setting_that_is_not_one(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DSV4_BACKENDS_TIER", "best")
    assert cli.main(name.split()) == USAGE
    assert "DSV4_BACKENDS_TIER" in capsys.readouterr().err
