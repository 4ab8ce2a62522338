"""The pages agree with the code: generated parts, names and links are checked, and the code in them runs."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compare_tritons
import kept
import pytest
import torch
from bench_results import GPU, result_of, row_of
from installed import distribution
from pages import BLOCK, PAGES, TEXTS, WRITTEN
from paths import ROOT

import docs
from dsv4_backends import records
from dsv4_backends.bench import results
from dsv4_backends.bench.provenance import Host, provenance
from dsv4_backends.commands import cli
from dsv4_backends.commands.shared import FINDINGS
from dsv4_backends.contract import CONTRACTS, LEVELS
from dsv4_backends.contract.arguments import TensorArg
from dsv4_backends.runtime import bind
from dsv4_backends.selection import policy, provider
from dsv4_backends.testing import checks

README = ROOT / "README.md"
WRITING = ROOT / "docs" / "writing-a-provider.md"
Result = subprocess.CompletedProcess[str]
Run = Callable[..., Callable[..., Result]]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in BLOCK.findall(TEXTS[page]) if found == language]


def after(mark: str, page: Path) -> str:
    """The code block that follows a comment."""
    match = re.search(rf"^<!-- {re.escape(mark)} -->\n```\w*\n(.*?)^```$", TEXTS[page], re.MULTILINE | re.DOTALL)
    assert match, f"{name(page)} has no block after <!-- {mark} -->"
    return match[1]


# -------------------------------------------------------------------------------------------- generated parts


@pytest.mark.parametrize("page", WRITTEN, ids=name)
def test_generated_parts_are_current(page: Path) -> None:
    assert TEXTS[page] == docs.render(TEXTS[page]), "run: python tools/docs.py"
    assert len(re.findall("^(?:<!--|#) generated: ", TEXTS[page], re.MULTILINE)) == len(docs.MARK.findall(TEXTS[page]))


def test_every_part_is_used() -> None:
    used = {match["name"] for text in TEXTS.values() for match in docs.MARK.finditer(text)}
    assert used == set(docs.PARTS)


def test_check_finds_a_stale_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    page = tmp_path / "README.md"
    page.write_text("<!-- generated: tiers -->\nold\n<!-- end of generated -->\n")
    (tmp_path / "CHANGELOG.md").write_text("")
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["docs.py", "--check"])
    assert docs.main() == 1
    assert "old" in page.read_text()
    monkeypatch.setattr(sys, "argv", ["docs.py"])
    assert docs.main() == 0
    assert "| `native` |" in page.read_text()
    monkeypatch.setattr(sys, "argv", ["docs.py", "--check"])
    assert docs.main() == 0
    assert capsys.readouterr().out == "README.md is not current\nREADME.md written\n"


def test_two_releases_of_triton_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs" / "results").mkdir(parents=True)
    order = {"mqa_logits": ("a", "b")}
    host = Host("3.12", {"torch": "2.11.0", "triton": "3.6.0"}, (GPU,))
    for name, one, two in (("before", 20.0, 10.0), ("after", 20.5, 11.0)):
        params = {"m": 1, "n": 4096, "h": 8, "d": 64}
        timed = {"one": {"a": 8.0, "b": one}, "two": {"a": None, "b": two}}
        rows = [row_of("mqa_logits", name_of, params=params, **us) for name_of, us in timed.items()]
        records.write(result_of(*rows, order=order, machine=host), tmp_path / f"{name}.json")
    given = [tmp_path / "before.json", tmp_path / "after.json", tmp_path / "docs" / "results" / docs.TRITON_TIMES]
    monkeypatch.setattr(sys, "argv", ["compare_tritons.py", *map(str, given)])
    assert compare_tritons.main() == 0
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    made = docs.performance_triton()
    assert "| `mqa_logits` | `a` | 1 | 1.000 | 1.000 | 1.000 |" in made
    assert "| `mqa_logits` | `b` | 2 | 1.025 | 1.062 | 1.100 |" in made
    assert "With 3.6.0, auto: within 3% of the best provider on 100% of 1 rows" in made
    assert made.count("| two |") == 1
    assert made.endswith("| `mqa_logits` | two | `b` | 10.0 | 11.0 | 1.10 |")
    other = dataclasses.replace(results.read(given[0]), commit="another")
    with pytest.raises(ValueError, match="of one commit and GPU"):
        compare_tritons.of_both(other, results.read(given[1]))


def test_performance_is_what_the_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = {"m": 1, "n": 4096, "h": 8, "d": 64}
    rows = [row_of("mqa_logits", "one", params=params, a=10.0, b=20.0), row_of("fp8_einsum", "two", a=None, b=7.5)]
    (tmp_path / "docs" / "results").mkdir(parents=True)
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    order = dict.fromkeys(("mqa_logits", "fp8_einsum"), ("a", "b"))
    records.write(result_of(*rows, order=order), tmp_path / "docs" / "results" / docs.BENCH)
    made = docs.performance()
    assert "| one | 10.0 (50%) | 20.0 (25%) | 100, 100 | `a` (1.00) |" in made
    assert "| two | - | 7.5 (67%) | 133.3, 133 | `b` |" in made
    assert "GPU X" in made
    assert "`a` with a-kernels 1" in made
    assert "within 3% of the best provider on 100% of 1 rows" in made


def test_ops_next_to_a_plain_gemm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs" / "results").mkdir(parents=True)
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    made = provenance("python tools/plain_gemm.py")
    rows = (kept.PlainGemmRow("fp8_einsum", "b=512", 100.0, 343.0, 400.0),)
    records.write(kept.PlainGemm(**made, rows=rows), tmp_path / "docs" / "results" / docs.PLAIN_GEMM)
    assert "| `fp8_einsum` | b=512 | 100.0 | 343 | 400 | 0.86 |" in docs.plain_gemm()


def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: dict[str, Any]) -> None:
    """Keep a file of what was served, on the machine of the last bench."""
    machine = records.load(ROOT / "docs" / "results" / docs.BENCH)["machine"]
    made = {"command": "tools/serve_on_gpu.sh", "date": "2026-11-29", "commit": "abc", "machine": machine}
    (tmp_path / "docs" / "results").mkdir(parents=True)
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    records.write(made | {"layers": 6, "experts": 16, "weights": "fp8"} | content, tmp_path / "docs" / "results" / name)


@pytest.mark.parametrize("part", ["served_logprobs", "served_speed", "served_once"])
def test_what_was_not_served_is_said(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    assert docs.PARTS[part]() == "Not measured."


def test_a_call_beside_its_loads_and_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {
        name: value for name, value in records.load(ROOT / "docs" / "results" / docs.FLOOR).items() if name != "rows"
    }
    row = {"op": "paged_mqa_logits", "name": "b=4", "call": 30.0, "empty": 4.0, "two": 5.0, "three": 6.0}
    rows = [row | {"floor": 15.0, "stream": 20.0, "access": 25.0}, row]
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    assert docs.access_floor() == "Not measured."
    (tmp_path / "docs" / "results").mkdir(parents=True)
    records.write(made | {"rows": rows}, tmp_path / "docs" / "results" / docs.ACCESS_FLOOR)
    assert docs.access_floor().splitlines()[-1] == "| b=4 | 15.0 | 20.0 | 25.0 | 30.0 | 2.00 | 1.20 |"


@pytest.mark.parametrize(("mean", "over"), [(0.03, "none"), (0.0301, "`sm_80`")])
def test_logprobs_are_what_the_file_says(
    mean: float, over: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [
        {"run": run, "composition": name, "mean": found, "max": 1.25, "top1": 0.97}
        for run, name, found in (("triton", "usual", 0.02), ("triton", "steps", 0.03), ("sm_80", "usual", mean))
    ]
    noise = [
        {"composition": name, "mean": found, "max": 1.5, "top1": 0.96}
        for name, found in (("chunks", 0.02), ("steps", 0.04))
    ]
    content = {"lengths": [2000, 3000], "noise": noise, "pairs": pairs}
    served(tmp_path, monkeypatch, docs.SERVED_LOGPROBS, content)
    made = docs.served_logprobs()
    assert "6 layers, 16 experts in fp8, prompts of 2000, 3000 tokens" in made
    assert "| native | steps | 0.0400 | 1.50 | 96.00% |  |  |" in made
    assert "| `triton` | usual | 0.0200 | 1.25 | 97.00% | 1.00 | 0.50 |" in made
    assert "| `triton` | steps | 0.0300 | 1.25 | 97.00% | 1.50 | 0.75 |" in made
    said = "- Above 1.5 times `native`'s own difference with"
    assert made.endswith(f"{said} `chunks`: {over}.\n{said} `steps`: none.")


def test_speed_is_what_the_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(name: str, compiled: list[str], *speeds: float, **more: object) -> dict[str, object]:
        rows = [
            {"requests": count, "tokens_a_second": speed, "first_token_ms": 80.0, "token_ms": 9.5}
            for count, speed in zip((1, 4), speeds, strict=False)
        ]
        return {"run": name, "start_s": 65.2, "compiled_while_serving": compiled, "rows": rows, **more}

    runs = [run("native", ["a.py"], 50.0, 100.0), run("auto", [], 55.0, reported=0, odd=[3, 7])]
    runs[0]["rows"][0]["seconds"] = [1.3, 1.0]  # type: ignore[index]
    served(tmp_path, monkeypatch, docs.SERVED_SPEED, {"tp": 2, "input": 1024, "output": 64, "passes": 3, "runs": runs})
    made = docs.served_speed()
    assert "TP 2, 1024 tokens in, 64 out, best of 3 passes; today's" in made
    assert "take `SPEED='--layers 6 --tp 2 --output 64 --passes 3'` for it" in made
    assert "| 1 | 50.0, 80 ms, 9.50 ms | 55.0 (1.10), 80 ms, 9.50 ms | 52 |" in made
    assert "| 4 | 100.0, 80 ms, 9.50 ms | - | 166 |" in made
    native = "- `native`: up in 65 s, kernels that Triton compiled while serving: 1 (`a.py`)."
    assert f"{native} Slowest pass / best, by row: 1.30." in made
    auto = "kernels that Triton compiled while serving: 0, 0 reported by vLLM's monitor, 3 and 7 requests served too."
    assert made.endswith(f"- `auto`: up in 65 s, {auto}")


def test_what_was_served_once_is_what_the_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mtp = [{"run": "triton", "requests": 5, "tokens": 16, "seconds": 1.25}]
    long = [{"run": "auto", "prompt": 200000, "first_token_s": 12.0, "peak_mib": 1800.0}]
    served(tmp_path, monkeypatch, docs.SERVED_ONCE, {"mtp": mtp, "long": long})
    made = docs.served_once()
    assert "`triton`: 5 requests, 16 tokens each, in 1.2 s" in made
    assert "200,000 tokens, `auto`: first token after 12.0 s, at most 1800 MiB" in made


# ----------------------------------------------------------------------------------------------- completeness


def test_every_op_argument_and_result_is_documented() -> None:
    text = TEXTS[ROOT / "docs" / "contract.md"]
    for contract in CONTRACTS.values():
        section = text.partition(f"### {contract.name}\n")[2].partition("\n### ")[0]
        assert section, contract.name
        for argument in (*contract.args, *contract.tolerances):
            assert f"`{argument}`" in section, (contract.name, argument)
        for tolerance in contract.tolerances.values():
            assert tolerance.why in section
        for arg in contract.args.values():
            if isinstance(arg, TensorArg):
                assert f"`{arg.layout}`: " in text, "the layouts' names are explained"


def test_every_variable_reason_tier_and_check_is_documented() -> None:
    selection, writing = TEXTS[ROOT / "docs" / "selection.md"], TEXTS[WRITING]
    assert set(docs.ADVICE) == set(provider.REASONS)
    for word in (*policy.VARIABLES, *provider.REASONS, *(tier.label for tier in provider.Tier)):
        assert f"| `{word}` |" in selection, word
    for word in ("signature", "coverage", *checks.CHECKS):
        assert f"| `{word}` |" in writing, word
    for level in LEVELS:
        assert f"`{level}`" in TEXTS[ROOT / "docs" / "quickstart.md"]


def test_every_command_is_documented() -> None:
    (subs,) = (a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert len(subs.choices) > 1
    for command in subs.choices:
        assert f"`dsv4-backends {command} " in TEXTS[README], command
    assert {command for command, _ in docs._parsers(cli.parser())} == set(FINDINGS)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    lines += re.findall(r"^\$ (.+)$", "".join(blocks(page, "console")), re.MULTILINE)
    lines += re.findall(r"`(dsv4-backends [a-z][^`]*)`", TEXTS[page])
    for line in lines:
        for step in line.split("&&"):
            words = [word for word in shlex.split(step) if not word.startswith("DSV4_BACKENDS_")]
            if words and Path(words[0]).name == "dsv4-backends" and "[" not in step:
                known = [
                    {"OP": "mqa_logits", "rms_norm": "mqa_logits", "toy": "vllm"}.get(word, word) for word in words[1:]
                ]
                try:
                    cli.parser().parse_args(known)
                except SystemExit:
                    pytest.fail(f"{name(page)}: {step.strip()}: {capsys.readouterr().err}")
        for variable in re.findall(r"DSV4_BACKENDS_\w+", line):
            assert variable in policy.VARIABLES


def test_the_readme_names_the_two_commands() -> None:
    first, second = blocks(README, "sh")
    assert first.count("\n") == second.count("\n") == 1
    for command in (first, second):  # each works alone, in a fresh clone
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install ")
    assert first.endswith(" && .venv/bin/dsv4-backends list && .venv/bin/dsv4-backends verify --level smoke\n")
    assert after("test command", README) == second
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"Python {project['requires-python'].removeprefix('>=')} or newer" in TEXTS[README]
    (torch_needed,) = [need for need in project["dependencies"] if need.startswith("torch")]
    quickstart = TEXTS[ROOT / "docs" / "quickstart.md"]
    assert f"the package accepts {torch_needed.removeprefix('torch>=')} and newer" in quickstart
    assert second.endswith(" && .venv/bin/pytest -n auto --dist worksteal\n")


def test_check_says_what_the_readme_says(capsys: pytest.CaptureFixture[str]) -> None:
    command = "check --model flash --device sm_89 --memory 24GiB"
    assert cli.main([*command.split(), "--tp", "4"]) == 1
    (weights,) = re.findall(r"weights +([\d.]+ GiB)", capsys.readouterr().out)
    assert f"the weights take {weights} on each of 4 ranks" in " ".join(TEXTS[README].split())
    assert cli.main([*command.split(), "--tp", "8", "--max-model-len", "32768"]) == 0


# ------------------------------------------------------------------------------------------------------ links


def _anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"`[^`\n]*`", "", BLOCK.sub("", TEXTS[page]))
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.is_file(), f"{name(page)}: {target}"
        assert there.is_relative_to(ROOT), f"{name(page)}: {target}"
        if anchor:
            assert anchor in _anchors(there.read_text(encoding="utf-8")), f"{name(page)}: {target}"


def test_every_page_is_linked() -> None:
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page, text in TEXTS.items()
        for target in re.findall(r"\]\((?!\w+:)([^)\s#]+[^)\s]*)\)", text)
    }
    # A folder of measurements, if there is one, has an order of its own.
    assert {page for page in PAGES if "results" not in page.parts} - {README} <= linked


# --------------------------------------------------------------------------------------------- code that runs


@pytest.mark.parametrize(
    "page", ["README.md", "docs/quickstart.md", "docs/contract.md", "docs/selection.md", "docs/engines.md"]
)
def test_python_examples_run(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = blocks(ROOT / page, "python")
    assert source
    bind.reset()
    namespace: dict[str, Any] = {}
    for block in source:
        exec(compile(block, page, "exec"), namespace)
    printed = capsys.readouterr().out
    for where, promised in re.findall(r"^ *print\(.*  # (on a CPU: )?(.+)$", "\n".join(source), re.MULTILINE):
        if not (where and torch.cuda.is_available()):
            whole_line = ".*".join(re.escape(part.strip()) for part in promised.split("..."))
            assert re.search(f"^{whole_line}$", printed, re.MULTILINE), promised


# ----------------------------------------------------------------------------------------- writing a provider


@pytest.fixture
def run_acme(tmp_path: Path) -> Run:
    """Build the package of the page, installed as pip would leave it, and return a way to run commands with it."""

    def prepare(change: Callable[[dict[str, str]], None] = lambda files: None) -> Callable[..., Result]:
        names = re.findall("<!-- file: (.+?) -->", TEXTS[WRITING])
        files = {file: after(f"file: {file}", WRITING) for file in names}
        change(files)
        project = tomllib.loads(files["pyproject.toml"])["project"]
        distribution(tmp_path, project["name"], project["version"], files=files, points=project["entry-points"])

        def run(*words: str, **variables: str) -> Result:
            return subprocess.run(
                [sys.executable, "-m", *words],
                cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": str(tmp_path), **variables},
                capture_output=True,
                text=True,
                timeout=300,
            )

        return run

    return prepare


SUITE = ("pytest", "-q", "-p", "no:cacheprovider", "test_acme.py")


def test_the_provider_of_the_page_serves_and_passes(run_acme: Run) -> None:
    run = run_acme()
    shown = run("dsv4_backends", "plugins")
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"^acme +acme-kernels +1\.0 +ok +acme ", shown.stdout, re.MULTILINE), shown.stdout

    shown = run("dsv4_backends", "list", "--device", "cpu", DSV4_BACKENDS_PIN="hc_prenorm_gemm=acme")
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"^hc_prenorm_gemm +acme +portable +pinned to acme$", shown.stdout, re.MULTILINE), shown.stdout
    assert re.search(r"^mqa_logits +torch +reference ", shown.stdout, re.MULTILINE), shown.stdout

    tested = run(*SUITE)
    assert tested.returncode == 0, tested.stdout
    assert re.search(r"^\d+ passed", tested.stdout.splitlines()[-1]), tested.stdout


def test_a_broken_variant_fails_as_the_page_says(run_acme: Run) -> None:
    def break_it(files: dict[str, str]) -> None:
        assert "wide.square()" in files["acme_kernels/gemm.py"]
        files["acme_kernels/gemm.py"] = files["acme_kernels/gemm.py"].replace("wide.square()", "wide.abs()")

    tested = run_acme(break_it)(*SUITE)
    assert tested.returncode == 1, tested.stdout
    assert after("failure", WRITING).strip() in tested.stdout


def test_the_refusal_of_the_page_is_understood(run_acme: Run) -> None:
    def refuse(files: dict[str, str]) -> None:
        files["acme_kernels/gemm.py"] += after("append: acme_kernels/gemm.py", WRITING)
        hook = files["acme_kernels/__init__.py"]
        (claim,) = re.findall(r'refuses="acme_kernels\.gemm:refuses"', TEXTS[WRITING])
        files["acme_kernels/__init__.py"] = hook.replace("        devices=", f"        {claim},\n        devices=")

        files["calls.py"] = (
            "import torch\nfrom dsv4_backends import ops, stats\n"
            "for k in (128, 100, 100):\n"
            "    ops.hc_prenorm_gemm(torch.zeros(2, k).bfloat16(), torch.zeros(24, k))\n"
            "print(stats())\n"
        )

    run = run_acme(refuse)
    called = run("calls")
    assert called.stdout.strip() == "{'hc_prenorm_gemm': {'acme': 1, 'torch': 2}}", called.stderr
    told = "hc_prenorm_gemm: acme: needs k to be a multiple of 64, this call has 100 [shape]"
    assert called.stderr.splitlines().count(told) == 1
    tested = run(*SUITE, "-k", "coverage or refusal")
    assert tested.returncode == 0, tested.stdout
