"""The benchmark on a CPU: its rows, the comparison with the oracle, its output, comparisons and figures."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_results import result_of, row_of
from installed import provider

from dsv4_backends import OPS, records
from dsv4_backends.bench import compare, inputs, plot, results, run, shapes, timing
from dsv4_backends.commands import bench as command
from dsv4_backends.commands import cli
from dsv4_backends.contract import CONTRACTS
from dsv4_backends.contract.layouts import PAGE_ALIGNMENT, read_kv
from dsv4_backends.contract.traffic import WINDOW_PAGE
from dsv4_backends.testing import oracle

CPU = torch.device("cpu")
ACME = provider(
    {
        op: {"target": f"acme_kernels:{op}", "devices": ("cpu",), "refuses": refuses}
        for op, refuses in (("hc_prenorm_gemm", None), ("fp8_einsum", None), ("mqa_logits", "acme_kernels:refuses"))
    },
    tier="PORTABLE",
)
KERNELS = """
import time
from dsv4_backend_torch.hyper_connection import hc_prenorm_gemm as right
from dsv4_backends import Reason
PAUSE, WRONG = 0.0, False
def hc_prenorm_gemm(x, fn, *, num_splits=None, out=None, sqr_sum=None):
    time.sleep(PAUSE)
    results = right(x, fn, num_splits=num_splits, out=out, sqr_sum=sqr_sum)
    if WRONG:
        results[0][..., -1, -1] += 1
    return results
def fp8_einsum(x, x_scale, w, w_scale, *, out=None):
    raise RuntimeError("no such kernel")
def mqa_logits(q, k, k_scale, weights, row_starts, row_ends, *, max_seqlen_k=None, out=None):
    raise AssertionError("refused, so never called")
def refuses(q, k, k_scale, weights, row_starts, row_ends, *, max_seqlen_k=None, out=None):
    return Reason("shape", "too small")
"""


@pytest.fixture
def acme(fake_plugin: Callable[..., None]) -> Iterator[Any]:
    """A provider that can be made slow or wrong."""
    fake_plugin("acme", ACME, files={"acme_kernels.py": KERNELS})
    import acme_kernels

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other on a busy machine take longer than any pause
    yield acme_kernels
    torch.set_num_threads(threads)


def bench(path: Path, *argv: str) -> tuple[int, results.Result]:
    code = cli.main(["bench", "--torch-device", "cpu", "--json", str(path), *argv])
    return code, results.read(path)


# ----------------------------------------------------------------------------------------------------------- rows


def test_rows_are_those_of_the_models() -> None:
    rows = shapes.rows((), 1, OPS)
    names = [(row.op, row.name) for row in rows]
    assert len(set(names)) == len(names)
    assert [op for op in OPS for row in rows if row.op == op] == [row.op for row in rows]
    # Names are how runs are compared, so they stay.
    assert {
        ("sparse_mla_prefill", "flash s_q=512 h=64 topk=640"),
        ("sparse_mla_prefill", "flash window only s_q=4096 h=64 topk=128"),
        ("sparse_mla_decode", "pro b=128 h=128 topk=128+1024"),
        ("mqa_logits", "m=4096 n=65536 h=64 d=128"),
        ("mqa_logits", "m=64 n=4096 h=64 d=128 compressed"),
        ("paged_mqa_logits", "b=64 keys=65536 h=64 d=128"),
        ("paged_mqa_logits", "b=256 next_n=1 max_context_len=131072 lengths=lognormal mean 9800 seed 1 h=64 d=128"),
        ("fp8_einsum", "flash b=4096 h=8 r=4096 d=1024 token-minor scales"),
        ("hc_prenorm_gemm", "pro m=1024 k=28672 splits=8"),
    } <= set(names)
    major = shapes.rows(["flash"], 1, ["fp8_einsum"], "token-major")
    assert major[0].name == "flash b=1 h=8 r=4096 d=1024 token-major scales"
    assert not any("pro window only" in name for _, name in names)  # Pro has no layer without compressed keys
    assert {row.params["h_q"] for row in shapes.rows(["pro"], 4, ["sparse_mla_decode"])} == {32}


def test_rows_of_a_configuration(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "num_attention_heads": 16, "o_groups": 2, "o_lora_rank": 128, "index_n_heads": 8}
    sizes |= {"index_head_dim": 64, "index_topk": 96, "sliding_window": 32, "hc_mult": 2, "head_dim": 512}
    layers = {"num_hidden_layers": 2, "compress_ratios": [4, 128], "max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "deepseek_v4", "_name_or_path": "a/b"} | sizes | layers)
    )
    rows = shapes.rows([str(tmp_path)], 2, OPS)
    assert ("sparse_mla_decode", "a/b b=8 h=8 topk=32+96") in [(row.op, row.name) for row in rows]
    assert {row.params["n"] for row in rows if row.op == "hc_prenorm_gemm"} == {8}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "nothing.json"], "nothing.json"),
        (["--tp", "0"], "tensor parallel size: expected at least 1, got 0"),
        (["--provider", "nobody"], "--provider: unknown provider 'nobody'"),
        (["--also-as", "cpu"], "also_as: expected the form sm_86 or 8.6, got 'cpu'"),
    ],
)
def test_usage(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--torch-device", "cpu", *argv]) == cli.USAGE
    assert message in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("op", OPS)
def test_inputs_are_valid_seeded_and_matter(op: str) -> None:
    row, *_ = shapes.tiny((op,))
    made, again = (inputs.draw(row, CPU) for _ in range(2))
    CONTRACTS[op].check(**made)
    expected, same = oracle.expected(op, made), oracle.expected(op, again)
    for one, other in zip(expected, same, strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().any()
        assert not one.isnan().any()
        assert one[one.isfinite()].std() > 0
    other = oracle.expected(op, inputs.draw(dataclasses.replace(row, name="another"), CPU))
    assert not torch.equal(expected[0], other[0])


def test_decode_inputs_are_of_a_deployment() -> None:
    params = {"b": 3, "s_q": 2, "h_q": 4, "window": 8, "selected": 24, "compressed": 70}
    row = shapes.Row("sparse_mla_decode", "small", params)
    made = inputs.draw(row, CPU)
    for cache, indices in (("k_cache", "indices"), ("extra_k_cache", "extra_indices")):
        slots = made[indices].long()
        assert slots.min() >= 0
        assert slots.max() < made[cache].shape[0] * made[cache].shape[1]
        assert read_kv(made[cache], slots.flatten()).float().std() > 0.9
        pages = [set((request // WINDOW_PAGE).flatten().tolist()) for request in slots]
        assert not pages[0] & pages[1]  # requests share no page
        assert made[cache].stride(0) % PAGE_ALIGNMENT == 0
    # The next token's window is this one's, moved on by one.
    assert torch.equal(made["indices"][:, 0, 1:], made["indices"][:, 1, :-1])


def test_paged_logits_inputs_are_of_real_traffic() -> None:
    """Few requests are long, the tables as wide as the longest may be; the same lengths whatever else is drawn."""
    params = {"b": 40, "next_n": 3, "keys": 6400, "mean": 500, "seed": 1, "h": 2, "d": 32}
    made = inputs.draw(shapes.Row("paged_mqa_logits", "skewed", params), CPU)
    CONTRACTS["paged_mqa_logits"].check(**made)
    lengths = made["context_lens"][:, -1]
    assert torch.equal(made["context_lens"], (lengths.unsqueeze(1) - torch.tensor([2, 1, 0])).clamp(min=0).int())
    assert made["block_table"].shape == (40, 100)
    assert made["max_context_len"] == 6400
    assert abs(lengths.float().mean() - 500) < 5
    assert lengths.max() > 4 * lengths.median()
    needed = torch.arange(100) * WINDOW_PAGE < lengths.unsqueeze(1)
    assert sorted(made["block_table"][needed].tolist()) == list(range(len(made["k_cache"])))
    assert not made["block_table"][~needed].any()
    again = inputs.draw(shapes.Row("paged_mqa_logits", "other name", params), CPU)
    assert torch.equal(again["context_lens"], made["context_lens"])
    other = inputs.draw(shapes.Row("paged_mqa_logits", "skewed", params | {"seed": 2}), CPU)
    assert not torch.equal(other["context_lens"], made["context_lens"])


def test_scales_have_the_wanted_layout() -> None:
    minor, major = (
        inputs.draw(shapes.Row("fp8_einsum", "small", {"b": 3, "h": 2, "r": 256, "d": 128, "scales": scales}), CPU)
        for scales in shapes.SCALES
    )
    assert minor["x_scale"].stride(0) == 1
    assert minor["x_scale"].stride(2) == 4
    assert major["x_scale"].is_contiguous()
    for name, values in minor.items():
        assert torch.equal(values.float(), major[name].float())


def test_prefill_windows_end_at_the_query() -> None:
    params = {"s_q": 6, "h_q": 4, "window": 8, "selected": 24, "compressed": 70}
    made = inputs.draw(shapes.Row("sparse_mla_prefill", "small", params), CPU)
    own = params["compressed"] + params["window"] + torch.arange(params["s_q"])
    assert torch.equal(made["indices"][:, params["window"] - 1].long(), own)
    assert made["indices"].max() == made["kv"].shape[0] - 1


# ------------------------------------------------------------------------------------------------- judged and timed


def test_every_op_is_measured_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result = bench(tmp_path / "result.json", "--provider", "torch", "--tp", "2")
    out = capsys.readouterr().out
    assert code == cli.OK, out
    assert list(dict.fromkeys(row.op for row in result.rows)) == list(OPS)
    assert result.samples == timing.SAMPLES // 10
    for row in result.rows:
        (timed,) = row.timings
        assert timed.us is not None
        assert 0 < timed.q1 <= timed.us <= timed.q3
        assert row.auto == "torch"
        cost = CONTRACTS[row.op].cost(**inputs.draw(shapes.Row(row.op, row.name, row.params), CPU))
        assert (row.flops, row.bytes, row.math) == (cost.flops, cost.bytes, cost.math)
        assert row.name in out
    assert "On a CPU: small rows" in out
    assert result.device.type == "cpu"
    assert result.command == "dsv4-backends bench --provider torch --tp 2"
    assert result.order["mqa_logits"] == ("torch",)
    assert set(records.plain(result.rates)) == {"copy_gbps", "read_gbps", "bf16_tflops", "tf32_tflops", "launch_us"}


def test_the_command_says_whose_instructions_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """With TRITON_OVERRIDE_ARCH the times are not those of this GPU's own instructions, and the command shows it."""
    monkeypatch.setenv("TRITON_OVERRIDE_ARCH", "sm80")
    monkeypatch.setenv("DSV4_BACKENDS_DEVICE", "sm_80")
    said = run._command(OPS, ["triton"], [], 1, [], "token-major")
    settings = "DSV4_BACKENDS_DEVICE=sm_80 TRITON_OVERRIDE_ARCH=sm80"
    assert said == f"{settings} dsv4-backends bench --provider triton --scales token-major"


def test_a_provider_is_measured_by_its_code_for_another_architecture_too(
    acme: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    right = acme.hc_prenorm_gemm

    def look(x: Any, fn: Any, *, num_splits: Any = None, out: Any = None, sqr_sum: Any = None) -> Any:
        seen.append(os.environ.get("DSV4_BACKENDS_DEVICE"))
        return right(x, fn, num_splits=num_splits, out=out, sqr_sum=sqr_sum)

    monkeypatch.setattr(acme, "hc_prenorm_gemm", look)
    argv = ("--op", "hc_prenorm_gemm", "--provider", "acme", "--also-as", "8.0")
    code, result = bench(tmp_path / "r.json", *argv)
    assert code == cli.OK
    assert [timed.label for timed in result.rows[0].timings] == ["acme", "acme as sm_80"]
    assert set(result.rows[0].timed) == {"acme", "acme as sm_80"}
    assert list(result.rows[0].rivals) == ["acme"]
    assert "DSV4_BACKENDS_DEVICE" not in os.environ
    assert result.command == "dsv4-backends bench --op hc_prenorm_gemm --provider acme --also-as 8.0"
    assert list(result.providers) == ["acme"]
    assert seen.count("sm_80") == seen.count(None) > timing.SAMPLES // 10


def test_a_setting_comes_back_after_another_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV4_BACKENDS_DEVICE", "sm_90")
    with run._as("sm_80"):
        assert os.environ["DSV4_BACKENDS_DEVICE"] == "sm_80"
    with run._as(""):
        assert os.environ["DSV4_BACKENDS_DEVICE"] == "sm_90"


def test_json_alone_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "--torch-device", "cpu", "--op", "hc_prenorm_gemm", "--json"]
    assert cli.main(argv) == cli.OK
    assert json.loads(capsys.readouterr().out)["rows"][0]["op"] == "hc_prenorm_gemm"


def test_a_wrong_result_gets_no_time(acme: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    acme.WRONG = True
    code, result = bench(tmp_path / "r.json", "--op", "hc_prenorm_gemm")
    assert code == cli.FINDING
    timings = {timed.provider: timed for timed in result.rows[0].timings}
    assert timings["acme"].us is None
    assert timings["acme"].error.startswith("wrong: out: ")
    assert timings["torch"].us
    assert "FAILED hc_prenorm_gemm tiny m=4 k=512 splits=2: acme: wrong" in capsys.readouterr().out


def test_one_failure_does_not_lose_the_others(acme: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result = bench(tmp_path / "r.json", "--provider", "acme")
    assert code == cli.FINDING
    told = {row.op: row.timings[0].error for row in result.rows if row.timings}
    assert told == {
        "mqa_logits": "refused: too small",
        "fp8_einsum": "RuntimeError: no such kernel",
        "hc_prenorm_gemm": "",
    }
    out = capsys.readouterr().out
    assert "FAILED fp8_einsum" in out
    assert "FAILED mqa_logits" not in out
    assert "mqa_logits tiny m=8 n=96: acme: refused" in out


def test_a_row_that_cannot_be_drawn_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = inputs.draw

    def fail() -> Any:
        raise MemoryError("too large")

    monkeypatch.setattr(inputs, "draw", lambda row, device: fail() if row.op == "mqa_logits" else draw(row, device))
    code, result = bench(tmp_path / "r.json", "--op", "mqa_logits", "--op", "hc_prenorm_gemm")
    assert code == cli.FINDING
    errors = {row.op: row.error for row in result.rows}
    assert errors == {"mqa_logits": "MemoryError: too large", "hc_prenorm_gemm": ""}
    assert "FAILED mqa_logits" in command.text(result)


def test_a_lost_device_ends_the_run_with_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = run._row

    def lose(row: shapes.Row, *args: Any) -> Any:
        if row.op == "mqa_logits":
            raise run.DeviceLost("CUDA error: an illegal memory access was encountered")
        return real(row, *args)

    monkeypatch.setattr(run, "_row", lose)
    code, result = bench(tmp_path / "r.json", "--op", "hc_prenorm_gemm", "--op", "mqa_logits", "--op", "fp8_einsum")
    assert code == cli.FINDING
    assert result.rows[0].timed
    assert len(result.rows) == 3
    for row in result.rows[1:]:
        assert row.error.startswith("not measured, the device was lost: CUDA error: an illegal")


def test_nobody_to_measure_is_a_finding(acme: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--torch-device", "cpu", "--provider", "triton", "--op", "mqa_logits"]) == cli.FINDING
    assert "triton: runs on an NVIDIA GPU, this is the CPU" in capsys.readouterr().err


def test_the_judge_sees_every_part_of_a_large_result() -> None:
    """Where a result has more rows than are compared, an error in any 1/256 of it, or in its last row, is found."""
    m = 3000
    arguments = inputs.draw(shapes.Row("hc_prenorm_gemm", "x", {"m": m, "k": 16, "n": 4, "num_splits": 2}), CPU)
    right = oracle.expected("hc_prenorm_gemm", arguments)
    judge = run.Judge("hc_prenorm_gemm", arguments)

    class Call:
        results: Any = None

        def __init__(self, bad: slice) -> None:
            self.bad = bad

        def replay(self) -> None:
            out = torch.stack([right[0] / 2] * 2).float()
            out[1, self.bad] += 1
            self.results = (out, torch.stack([right[1] / 2] * 2).float())

    assert judge(Call(slice(0, 0))) == ""
    for start in range(0, m, 137):
        assert judge(Call(slice(start, start + -(-m // run.CHECKED_ROWS) + 1))).startswith("wrong: out")
    assert judge(Call(slice(m - 1, m))).startswith("wrong: out")


def test_times_and_floors() -> None:
    taken = timing.Time.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (taken.us, taken.q1, taken.q3, taken.samples) == (3.0, 2.0, 4.0, 5)
    rates = results.Rates(copy_gbps=900.0, read_gbps=1000.0, bf16_tflops=100.0, fp8_tflops=200.0, launch_us=1.0)
    assert rates.floor_us(1e9, 1e3, "fp8") == pytest.approx(5.0)
    assert rates.floor_us(1e9, 1e3, "bf16") == pytest.approx(10.0)
    assert rates.floor_us(1e9, 1e8, "bf16") == pytest.approx(100.0)
    rates = dataclasses.replace(rates, fp8_tflops=None)  # a GPU without FP8 products
    assert rates.floor_us(1e9, 1e3, "fp8") == pytest.approx(10.0)


# --------------------------------------------------------------------------------------------- what is made of it


def test_text_has_rates_ratios_and_everything_that_is_missing() -> None:
    shown = command.text(
        result_of(row_of("mqa_logits", "one", a=10.0, b=20.0), row_of("mqa_logits", "two", a=None, b=8.0))
    )
    lines = {line.split()[0]: line.split() for line in shown.splitlines() if line}
    assert lines["one"][1:] == ["a", "(auto)", "10.0", "9.9..10.1", "100", "100", "50%", "2.00"]
    assert next(line for line in shown.splitlines() if line.split()[:1] == ["b"]).split()[-1] == "0.50"
    assert "FAILED mqa_logits two: a: wrong" in shown
    assert "not measured: mqa_logits: c: not installed" in shown
    assert "auto: on 1 rows it chose a provider that has no time here" in shown


def test_code_for_another_architecture_is_no_rival() -> None:
    row = row_of("mqa_logits", "one", **{"a": 10.0, "b": 20.0, "a as sm_80": 5.0})
    assert results.verdict([row]).worst == 1.0
    lines = [line.split() for line in command.text(result_of(row)).splitlines() if " as sm_80" in line]
    assert lines[0][-1] == "2.00"
    assert next(line.split() for line in command.text(result_of(row)).splitlines() if "(auto)" in line)[-1] == "2.00"


def test_verdict() -> None:
    rows = [row_of("mqa_logits", str(i), a=100.0, b=float(b)) for i, b in enumerate((200, 98, 90))]
    found = results.verdict(
        [*rows, row_of("mqa_logits", "alone", a=1.0), row_of("mqa_logits", "c", auto="c", a=1.0, b=2.0)]
    )
    assert (found.rows, found.near, found.worst) == (3, pytest.approx(2 / 3), pytest.approx(0.9))
    assert found.worst_row == "mqa_logits 2"
    assert found.not_timed == ("mqa_logits c",)


@pytest.mark.parametrize(
    ("after", "verdict"),
    [(10.0, "same"), (10.2, "same"), (10.5, "slower"), (9.5, "faster"), (None, "lost")],
)
def test_changes(after: float | None, verdict: str) -> None:
    before = result_of(row_of("mqa_logits", "one", a=10.0))
    changes = compare.compare(before, result_of(row_of("mqa_logits", "one", a=after)))
    assert [change.verdict for change in changes] == [verdict]
    assert compare.passed(changes) == (verdict not in ("slower", "lost"))


def test_what_overlaps_is_noise() -> None:
    rows = [row_of("mqa_logits", "one", a=us) for us in (10.0, 11.0)]
    rows[0] = dataclasses.replace(rows[0], timings=(results.Timing("a", 10.0, 9.9, 10.95),))
    before, after = map(result_of, rows)
    (change,) = compare.compare(before, after)
    assert change.verdict == "same"


def test_rows_that_are_not_measured_again_are_reported_but_are_no_finding() -> None:
    before = result_of(row_of("mqa_logits", "one", a=10.0), row_of("mqa_logits", "two", a=10.0))
    after = result_of(row_of("mqa_logits", "one", a=10.0), row_of("mqa_logits", "three", a=10.0))
    changes = compare.compare(before, after)
    assert [change.verdict for change in changes] == ["same", "absent", "new"]
    assert compare.passed(changes)
    assert "1 new, 1 absent (1 within noise)" in command.compare_text(before, after, changes)
    nothing = compare.compare(before, result_of())
    assert not compare.passed(nothing)
    assert "nothing to compare" in command.compare_text(before, result_of(), nothing)


def test_compare_catches_a_slowed_provider(acme: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = ("--op", "hc_prenorm_gemm", "--provider", "acme")
    acme.PAUSE = 0.02
    bench(tmp_path / "a.json", *only)
    acme.PAUSE = 0.2
    bench(tmp_path / "b.json", *only)
    capsys.readouterr()
    a, b = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    assert cli.main(["bench", "compare", a, b]) == cli.FINDING
    out = capsys.readouterr().out
    assert "slower  hc_prenorm_gemm" in out
    assert cli.main(["bench", "compare", b, a]) == cli.OK
    assert "faster  hc_prenorm_gemm" in capsys.readouterr().out
    assert cli.main(["bench", "compare", a, a, "--json"]) == cli.OK
    assert json.loads(capsys.readouterr().out)["ok"] is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ("[]", "expected a JSON object, got list"),
        ("{}", "expected what dsv4-backends bench"),
        (records.text(result_of(schema_version=9)), "got 9"),
    ],
)
def test_compare_wants_results(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text(text)
    assert cli.main(["bench", "compare", str(tmp_path / "x.json"), str(tmp_path / "x.json")]) == cli.USAGE
    assert message in capsys.readouterr().err


def test_plot_has_a_panel_for_each_op(tmp_path: Path) -> None:
    result = result_of(
        row_of("mqa_logits", "one", a=10.0, b=20.0),
        row_of("fp8_einsum", "two", b=8.0),
        row_of("hc_prenorm_gemm", "three", a=None),
    )
    plot.plot(result, tmp_path / "roof.svg")
    drawn = (tmp_path / "roof.svg").read_text()
    for text in ("mqa_logits", "fp8_einsum", "one", "two", "GPU X", ">a<", ">b<", "roof: memory", "roof: arithmetic"):
        assert text in drawn, text
    assert "three" not in drawn
    again = tmp_path / "again.svg"
    plot.plot(result, again)
    assert again.read_text() == drawn


def test_a_kept_result_can_be_drawn(tmp_path: Path) -> None:
    results.write(result_of(row_of("mqa_logits", "one", a=10.0)), tmp_path / "r.json")
    assert cli.main(["bench", "plot", str(tmp_path / "r.json"), str(tmp_path / "r.svg")]) == cli.OK
    assert "mqa_logits" in (tmp_path / "r.svg").read_text()
    with pytest.raises(cli.PolicyError, match="no row has a time"):
        plot.plot(result_of(), tmp_path / "none.svg")


def test_bench_draws(tmp_path: Path) -> None:
    target = tmp_path / "roof.png"
    assert cli.main(["bench", "--torch-device", "cpu", "--op", "hc_prenorm_gemm", "--plot", str(target)]) == cli.OK
    assert target.read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_is_refused_before_measuring(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(run, "bench", lambda *_: pytest.fail("measured"))
    assert cli.main(["bench", "--plot", "x.svg"]) == cli.USAGE
    assert "pip install matplotlib" in capsys.readouterr().err
