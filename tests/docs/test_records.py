"""Result files: they are read as written, errors name the wrong part, and docs/results has no unused file."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from bench_results import result_of, row_of
from packaging.version import Version
from pages import TEXTS
from paths import ROOT

import docs
from dsv4_backends import records
from dsv4_backends.bench import compare, plot, results, tune
from dsv4_backends.bench.results import Row, Timing
from dsv4_backends.commands import cli
from dsv4_backends.errors import PolicyError
from dsv4_backends.selection import preferences

KEPT = ROOT / "docs" / "results"
MOST_BYTES = 300_000


class Pair(NamedTuple):
    first: int
    second: str = ""


@dataclasses.dataclass(frozen=True)
class Inner:
    name: str
    us: float | None = None
    pairs: dict[str, Pair] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Outer:
    version: Version | None
    sizes: dict[str, int | str]
    inner: tuple[Inner, ...]
    note: str = ""


OUTER = Outer(
    Version("9.0"),
    {"k": 3, "scales": "token-minor"},
    (Inner("a", 1.5, {"x": Pair(1), "y": Pair(2, "bad")}), Inner("b")),
)


# ---------------------------------------------------------------------------------------------- one writer, one reader


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    records.write(OUTER, tmp_path / "outer.json")
    assert records.read(Outer, tmp_path / "outer.json") == OUTER
    assert (tmp_path / "outer.json").read_text() == (
        '{\n "version": "9.0",\n "sizes": {"k": 3, "scales": "token-minor"},\n "inner": [\n'
        '  {"name": "a", "us": 1.5, "pairs": {"x": [1], "y": [2, "bad"]}},\n  {"name": "b"}\n ]\n}\n'
    )


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (12958.5921234, "12958.6"),
        (4.735999973490834, "4.736"),
        (42949672960.0, "42949672960"),
        (1.4402400e-6, "1.44024e-06"),
    ],
)
def test_fractions_are_rounded_and_whole_numbers_are_not(value: float, written: str) -> None:
    assert json.dumps(records.plain(value)) == written


def test_what_is_no_number_stays() -> None:
    assert records.plain(math.inf) == math.inf
    assert math.isnan(records.plain(math.nan))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner": None}, "f: inner: expected an array, got null"),
        ({"inner": [{"us": 1.0}]}, "f: inner[0]: expected 'name', which is missing"),
        ({"inner": [{"name": "a", "us": "fast"}]}, "f: inner[0]: us: expected float, got str 'fast'"),
        ({"inner": [{"name": "a", "us": True}]}, "f: inner[0]: us: expected float, got bool 'True'"),
        ({"inner": [{"name": "a", "pairs": {"x": []}}]}, r"pairs.x: expected 1 to 2 entries (first, second), got 0"),
        ({"sizes": {"k": 1.5}}, "f: sizes.k: expected str, got float '1.5'"),
        ({"version": "one"}, "f: version: expected a version, got 'one'"),
        ({"note": 3}, "f: note: expected str, got int '3'"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=re.escape(message)):
        records.build(Outer, records.plain(OUTER) | change, "f")


def test_what_a_later_version_adds_is_ignored() -> None:
    assert records.build(Outer, records.plain(OUTER) | {"later": 1}, "f") == OUTER


# ---------------------------------------------------------------------------------------------- results of bench

FIRST = {
    "schema_version": 1,
    "command": "dsv4-backends bench --also-as sm_80",
    "date": "2026-11-25",
    "machine": {
        "python": "3.12.3",
        "packages": {"torch": "2.11.0"},
        "devices": [{"type": "cuda", "index": 0, "name": "X", "capability": "9.0", "multiprocessors": 1, "memory": 2}],
        "note": "",
        "executable": "python3",
        "ops": ["mqa_logits"],
    },
    "device": {"type": "cuda", "index": 0, "name": "X", "capability": "9.0", "multiprocessors": 1, "memory": 2},
    "providers": {"a": {"a-kernels": "1"}},
    "absent": {},
    "order": {"mqa_logits": ["a", "b"]},
    "rates": {"bf16_tflops": 200.0, "copy_gbps": 1000.0, "launch_us": 2.0, "tf32_tflops": 100.0},
    "seconds": 3.0,
    "rows": [
        {
            "op": "mqa_logits",
            "row": "one",
            "params": {"m": 1, "n": 2, "h": 64, "d": 128},
            "results": [
                {"provider": "a", "simulated": "", "us": 10.0, "q1": 9.0, "q3": 11.0, "samples": 50, "error": ""},
                {"provider": "a as sm_80", "simulated": "sm_80", "us": 20.0, "q1": 19.0, "q3": 21.0, "samples": 50},
                {"provider": "b", "simulated": "", "us": None, "error": "wrong: out"},
            ],
            "flops": 1e9,
            "bytes": 1e6,
            "math": "bf16",
            "floor_us": 5.0,
            "auto": "a",
        },
        {"op": "mqa_logits", "row": "two", "params": {}, "results": [], "error": "MemoryError: too large"},
    ],
}
"""What ``bench --json`` wrote before schema_version 2."""


def test_version_1_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "first.json").write_text(json.dumps(FIRST, indent=1))
    found = results.read(tmp_path / "first.json")
    assert found.schema_version == results.SCHEMA_VERSION == 2
    one, two = found.rows
    assert one.timings == (
        Timing("a", 10.0, 9.0, 11.0),
        Timing("a", 20.0, 19.0, 21.0, simulated="sm_80"),
        Timing("b", error="wrong: out"),
    )
    assert (one.timed, one.rivals) == ({"a": 10.0, "a as sm_80": 20.0}, {"a": 10.0})
    assert found.floor_us(one) == pytest.approx(5.0)
    assert two == Row("mqa_logits", "two", {}, error="MemoryError: too large")
    assert (found.commit, found.samples, found.rates.read_gbps) == ("", 50, None)
    results.write(found, tmp_path / "second.json")
    assert results.read(tmp_path / "second.json") == found
    assert [c.verdict for c in compare.compare(found, results.read(tmp_path / "second.json"))] == ["same"] * 3
    files = [str(tmp_path / name) for name in ("first.json", "second.json")]
    assert cli.main(["bench", "compare", *files]) == cli.OK
    assert "(3 within noise)" in capsys.readouterr().out
    assert cli.main(["tune", files[0]]) == cli.OK


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Row("mqa_logits", "one", {}, timings=(Timing("a", 1.0),)), "expected times, flops and bytes above 0"),
        (row_of("mqa_logits", "one", a=0.0), "expected times, flops and bytes above 0"),
    ],
)
def test_what_no_bench_writes(change: Row, message: str, tmp_path: Path) -> None:
    results.write(result_of(change), tmp_path / "r.json")
    with pytest.raises(PolicyError, match=message):
        results.read(tmp_path / "r.json")


def test_a_row_of_another_version_cannot_be_tuned() -> None:
    for row in (row_of("mqa_logits", "one", a=1.0), row_of("a_later_op", "one", a=1.0)):
        with pytest.raises(PolicyError, match=f"tune: {row.op} one: expected a row of this version's bench"):
            tune.tune([result_of(row, order={row.op: ("a",)})])


@pytest.mark.parametrize("lost", ["row", "params", "results"])
def test_version_1_that_lacks_something(lost: str, tmp_path: Path) -> None:
    row: dict[str, Any] = FIRST["rows"][0]  # type: ignore[index]
    rows = [{key: value for key, value in row.items() if key != lost}]
    (tmp_path / "first.json").write_text(json.dumps(FIRST | {"rows": rows}))
    with pytest.raises(PolicyError, match=r"first\.json: expected what dsv4-backends bench --json writes: "):
        results.read(tmp_path / "first.json")


def test_a_result_comes_back(tmp_path: Path) -> None:
    made = result_of(
        row_of("mqa_logits", "one", **{"a": 10.0, "a as sm_80": 12.5, "b": None}),
        Row("fp8_einsum", "two", {"b": 1, "scales": "token-minor"}, error="MemoryError: too large"),
    )
    results.write(made, tmp_path / "r.json")
    assert results.read(tmp_path / "r.json") == made
    rows = [line for line in (tmp_path / "r.json").read_text().splitlines() if line.startswith('  {"op"')]
    assert len(rows) == 2


# ---------------------------------------------------------------------------------------------- docs/results


def test_the_kept_results_are_small() -> None:
    found = {path.name: path.stat().st_size for path in KEPT.rglob("*")}
    assert sum(found.values()) < MOST_BYTES, found


def test_every_kept_file_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each makes a part of a page, is shown by one, or is what a shipped table was made from."""
    read: set[str] = set()
    load = records.load

    def noted(path: str | Path) -> dict[str, Any]:
        read.add(Path(path).name)
        return load(path)

    monkeypatch.setattr(records, "load", noted)
    for make in docs.PARTS.values():
        make()
    assert {"h200-bench.json", "compile-matrix-triton-3.6.json"} <= read
    assert not any("tune" in name for name in read)
    shown = {match for text in TEXTS.values() for match in re.findall(r"!\[[^]]*\]\(results/(\S+)\)", text)}
    sources = {
        (source.device, source.date, source.command)
        for path in preferences.FOLDER.glob("*.json")
        for source in preferences.read(path).sources
    }
    tuned = {path.name: results.read(path) for path in KEPT.glob("*-tune-*.json")}
    used = {name for name, made in tuned.items() if (made.device.name, made.date, made.command) in sources}
    unread = {path.name for path in KEPT.rglob("*") if path.is_file()} - read - shown - used
    assert not unread


def test_every_kept_file_says_how_it_was_made() -> None:
    for path in KEPT.glob("*.json"):
        content = records.load(path)
        assert content["command"], path.name
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", content["date"]), path.name
        assert path.name.startswith("compile-matrix") or content["machine"]["packages"]["torch"], path.name


def test_the_kept_result_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = results.read(KEPT / "h200-bench.json")
    plot.plot(result, tmp_path / "figure.svg")
    drawn = (tmp_path / "figure.svg").read_text()
    texts = re.findall(r"<text[^>]*>([^<]*)<", drawn)
    assert {row.op for row in result.rows} <= set(texts)
    assert drawn.count("<use") > len(result.rows)
