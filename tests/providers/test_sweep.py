"""Candidates of tools/sweep.py can be called; which is fast and right only a GPU can say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sweep
import torch
from dsv4_backend_triton.arch import arch_from_capability
from dsv4_backend_triton.launch import Launch, recording
from packaging.version import Version

from dsv4_backends import CONTRACTS
from dsv4_backends.bench import inputs
from dsv4_backends.bench.shapes import Row

SMALL = {"r": 256, "k": 512, "compressed": 64}
"""In place of a row's own: what a candidate launches does not depend on them."""


@pytest.mark.parametrize("op", sweep.CANDIDATES)
def test_every_candidate_launches_what_it_names(op: str) -> None:
    hopper = arch_from_capability(Version("9.0"))
    for row, candidates in sweep.CANDIDATES[op]():
        small = Row(op, row.name, {**row.params, **{k: v for k, v in SMALL.items() if k in row.params}})
        made = inputs.draw(small, torch.device("cpu"))
        CONTRACTS[op].check(**made)
        without: dict[str, Any] = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in made.items()}
        variants = set()
        for name, candidate in candidates.items():
            launches: list[Launch] = []
            with recording(launches.append, hopper):
                candidate(without)
            assert launches, (row.name, name)
            numbers = [[v for v in x.arguments.values() if isinstance(v, int)] for x in launches]
            variants.add(str([(x.kernel, x.grid, x.constants, x.options) for x in launches]) + str(numbers))
        assert len(variants) == len(candidates), row.name  # none is another's double


def test_the_fastest_that_is_right_is_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, with candidates that are wrong, slow or broken, and times that are given."""
    row = Row("hc_prenorm_gemm", "small", {"m": 3, "k": 64, "n": 24, "num_splits": 1})

    def right(made: dict[str, Any]) -> Any:
        x = made["x"].float()
        return (x @ made["fn"].T).unsqueeze(0), x.square().sum(1).unsqueeze(0)

    def wrong(made: dict[str, Any]) -> Any:
        return torch.zeros(1, 3, 24), torch.zeros(1, 3)

    def broken(made: dict[str, Any]) -> Any:
        raise ValueError("does not fit")

    class Present:
        function = staticmethod(CONTRACTS["hc_prenorm_gemm"].function)

    taken = {"wrong": 1.0, "right": 2.0, "slow": 3.0, sweep.PRESENT: 4.0, "deep_gemm": 5.0}
    timer = sweep.timing.Timer(torch.device("cpu"))
    monkeypatch.setattr(sweep.checks, "subject", lambda *_: Present())
    monkeypatch.setattr(timer, "interleaved", lambda calls: {n: sweep.timing.Time(taken[n], 0, 0, 1) for n in calls})
    candidates: dict[str, Any] = {"right": right, "slow": right, "wrong": wrong, "broken": broken}
    result = sweep.measure(row, candidates, timer)
    assert (result["best"], result["us"]) == ("right", taken)
    assert set(result["errors"]) == {"wrong", "broken"}
    assert result["errors"]["broken"] == "ValueError: does not fit"
    shown = sweep.told(result)
    assert "best   right" in shown
    assert "1 failed: ValueError: does not fit" in shown


def test_what_is_fastest_over_a_class_goes_into_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the classes that were measured; stages apart for the rows where every block has a multiprocessor."""
    tables = sweep.configurations.TABLES
    monkeypatch.setattr(sweep.configurations, "TABLES", tmp_path)
    (tmp_path / "fp8_einsum.json").write_text((tables / "fp8_einsum.json").read_text())
    sweep.configurations.table.cache_clear()
    hopper = arch_from_capability(Version("9.0"))
    before = sweep.configurations.configured("fp8_einsum", "portable", hopper, size=100)
    made = {
        f"stages={n} warps={w}": ("portable", sweep.einsum_portable.Config(16, 32, True, w, n, n, 1, False))
        for n in (3, 4)
        for w in (2, 8)
    }
    times = {"stages=3 warps=2": 1.0, "stages=4 warps=2": 2.0, "stages=3 warps=8": 3.0, "stages=4 warps=8": 4.0}
    alone = times | {"stages=3 warps=2": 2.5, "stages=3 warps=8": 0.5}
    rows = [({"b": 8, "h": h, "d": 1024}, us, made) for h, us in ((16, times), (8, alone))]
    source = {"gpu": "a GPU", "triton": "9", "date": "today", "command": "a command"}
    sweep.write_table("fp8_einsum", sweep.retuned("fp8_einsum", hopper, rows), source)
    sweep.configurations.table.cache_clear()
    after = sweep.configurations.configured("fp8_einsum", "portable", hopper, size=8)
    assert (after["warps"], after["block_d"], after["stages"], after["stages_alone"]) == (2, 32, 3, 4)
    assert sweep.configurations.configured("fp8_einsum", "portable", hopper, size=100) == before
    assert "a GPU with Triton 9 on today" in sweep.configurations.sources("fp8_einsum")
    assert "a command" in sweep.configurations.sources("fp8_einsum")
    monkeypatch.undo()
    sweep.configurations.table.cache_clear()
