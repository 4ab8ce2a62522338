"""tools/sweep.py without a GPU: candidates of every op, the comparison with the oracle, and the table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sweep
import torch
from dsv4_backend_triton import ahead, variants
from dsv4_backend_triton.arch import arch_from_capability
from packaging.version import Version

from dsv4_backends import CONTRACTS, OPS
from dsv4_backends.bench import inputs, shapes
from dsv4_backends.bench.shapes import Row

HOPPER, AMPERE = (arch_from_capability(Version(capability)) for capability in ("9.0", "8.0"))


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A copy of the tables that may be written."""
    for path in sweep.configurations.TABLES.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(sweep.configurations, "TABLES", tmp_path)
    sweep.configurations.table.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    sweep.configurations.table.cache_clear()
    for op in OPS:
        sweep._forget(op)


def tiny(op: str) -> dict[str, Any]:
    return dict(inputs.draw(shapes.tiny([op])[0], torch.device("cpu")))


@pytest.mark.parametrize("arch", [HOPPER, AMPERE], ids=["sm_90", "sm_80"])
@pytest.mark.parametrize("op", variants.OPS)
def test_every_op_has_candidates_that_launch_something_else(op: str, arch: Any, tables: Path) -> None:
    """On a small call, each another code; afterwards the table is what it was."""
    made = tiny(op)
    CONTRACTS[op].check(**made)
    before = json.dumps(sweep.configurations.table(op))
    found = sweep.candidates(op, made, arch)
    assert found or (op, arch) == ("sparse_mla_prefill", HOPPER)  # its kernel on wgmma has one tile
    codes = {sweep.launched(op, made, arch)}
    for candidate in found.values():
        row = sweep.configurations.table(op)["rows"][candidate.place]
        assert sum(candidate.config[name] != value for name, value in row["config"].items()) == 1
        with sweep.applied(op, candidate):
            codes.add(sweep.launched(op, made, arch))
    assert len(codes) == len(found) + 1
    assert json.dumps(sweep.configurations.table(op)) == before


@pytest.mark.parametrize("op", variants.OPS)
def test_the_calls_are_those_of_bench(op: str) -> None:
    """Of both models and of several ranks, each once."""
    swept = [row.name for row in sweep.calls(op, [], (1, 8))]
    assert swept
    assert len(set(swept)) == len(swept)
    assert set(swept) == {row.name for tp in (1, 8) for row in shapes.rows(["flash", "pro"], tp, [op])}


def test_native_libraries_are_found_through_the_hook() -> None:
    found = {op: sweep.natives(op) for op in OPS}
    assert found["sparse_mla_prefill"] == ["flash_mla"]
    assert found["fp8_einsum"] == ["deep_gemm"]


def test_a_change_of_the_table_reaches_the_launch(tables: Path) -> None:
    """In every place where plans are kept."""
    made = tiny("sparse_mla_decode")
    rows = sweep.configurations.table("sparse_mla_decode")["rows"]
    (place,) = (i for i, row in enumerate(rows) if row.get("role") == "few")
    with sweep.applied("sparse_mla_decode", sweep.Candidate(place, {**rows[place]["config"], "keys": 64})):
        (first, *_) = ahead.record("sparse_mla_decode", [{k: _meta(v) for k, v in made.items()}], HOPPER)
        assert first.constants["KEYS"] == 64
    (first, *_) = ahead.record("sparse_mla_decode", [{k: _meta(v) for k, v in made.items()}], HOPPER)
    assert first.constants["KEYS"] == rows[place]["config"]["keys"] == 32


def _meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def test_the_fastest_that_is_right_is_the_best(monkeypatch: pytest.MonkeyPatch, tables: Path) -> None:
    """On the CPU, with candidates that are wrong, slow or broken, and times that are given."""
    row = Row("hc_prenorm_gemm", "small", {"m": 3, "k": 64, "n": 24, "num_splits": 1})
    made = inputs.draw(row, torch.device("cpu"))

    def function(**made: Any) -> Any:
        """What the table says it is."""
        order.append("call")
        config = sweep.configurations.table("hc_prenorm_gemm")["rows"][0]["config"]
        if config.get("kind") == "broken":
            raise ValueError("does not fit")
        factor = 2.0 if config.get("kind") == "wrong" else 1.0
        x = made["x"].float()
        return factor * (x @ made["fn"].T).unsqueeze(0), x.square().sum(1).unsqueeze(0)

    class Present:
        pass

    Present.function = staticmethod(function)  # type: ignore[attr-defined]
    taken = {"wrong": 1.0, "right": 2.0, "slow": 3.0, sweep.PRESENT: 4.0, "deep_gemm": 5.0}
    timer = sweep.timing.Timer(torch.device("cpu"))
    monkeypatch.setattr(sweep.checks, "subject", lambda *_: Present())
    order = []
    judge = sweep.run.Judge

    def judged(*given: Any) -> Any:
        order.append("judge")
        return judge(*given)

    monkeypatch.setattr(sweep.run, "Judge", judged)

    def interleaved(calls: dict[str, Any]) -> dict[str, Any]:
        for call in calls.values():
            call.replay()
        return {name: sweep.timing.Time(taken[name], 0, 0, 1) for name in calls}

    monkeypatch.setattr(timer, "interleaved", interleaved)
    tried = {kind: sweep.Candidate(0, {"kind": kind}) for kind in ("right", "slow", "wrong", "broken")}
    result = sweep.measure(row, made, tried, timer)
    assert (result["best"], result["us"]) == ("right", taken)
    assert order[0] == "judge", "an op in place changes what the judge has to see"
    assert set(result["errors"]) == {"wrong", "broken"}
    assert result["errors"]["broken"] == "ValueError: does not fit"
    text = sweep.shown(result)
    assert "best   right" in text
    assert "WRONG  wrong" in text
    assert "1 failed: ValueError: does not fit" in text


@pytest.mark.parametrize("op", variants.OPS)
def test_what_is_fastest_over_the_calls_goes_into_the_table(op: str, tables: Path) -> None:
    """Of every op; in the rows that were decided, and only where it saves time on all calls together."""
    rows = sweep.configurations.table(op)["rows"]
    before = json.loads(json.dumps(rows))
    other = dict(rows[0]["config"])
    name = next(key for key, value in other.items() if not isinstance(value, bool | str))
    good, mixed, failed = ({**other, name: other[name] + step} for step in (1, 2, 3))
    tried = {
        kind: sweep.Candidate(0, config) for kind, config in (("good", good), ("mixed", mixed), ("failed", failed))
    }
    last = {"last": sweep.Candidate(len(rows) - 1, {**rows[-1]["config"], "warps": 99})}
    us = {sweep.PRESENT: 4.0, "good": 3.0, "mixed": 1.0, "failed": 0.5}
    measured = [
        sweep.Measured(tried, us),
        sweep.Measured(tried, {sweep.PRESENT: 4.0, "good": 3.0, "mixed": 40.0}),
        sweep.Measured(last, {sweep.PRESENT: 4.0, "last": 3.99}),
    ]
    source = {"gpu": "a GPU", "triton": "9", "date": "today", "command": "a command"}
    found = sweep.retuned(op, measured)
    assert found == [tried["good"]]
    sweep.write_table(op, found, source)
    after = sweep.configurations.table(op)["rows"]
    assert after[0] == before[0] | {"config": good, "source": "a GPU today"}
    assert after[1:] == before[1:]
    assert "a GPU with Triton 9 on today" in sweep.configurations.sources(op)
    assert "a command" in sweep.configurations.sources(op)
    assert sweep.configurations.table(op) == json.loads((tables / f"{op}.json").read_text())


def test_shared_memory_is_not_tried_but_read_from_the_kernel(monkeypatch: pytest.MonkeyPatch, tables: Path) -> None:
    rows = sweep.configurations.table("sparse_mla_decode")["rows"]
    (place,) = (i for i, row in enumerate(rows) if row.get("role") == "few")
    assert all(config["kib"] == rows[place]["config"]["kib"] for config in sweep.neighbours(rows, place))

    compiled = SimpleNamespace(metadata=SimpleNamespace(shared=70 * 1024 + 1))
    monkeypatch.setattr(sweep.ahead.Launch, "compile", lambda _: compiled)
    candidate = sweep.Candidate(place, {**rows[place]["config"], "keys": 64})
    made = {k: _meta(v) for k, v in tiny("sparse_mla_decode").items()}
    assert sweep.with_measured_values("sparse_mla_decode", candidate, [made], HOPPER).config["kib"] == 71
