"""The measured choice: made from results, applied by shapes, and overridden by the user's settings."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_results import result_of, row_of
from installed import provider
from packaging.version import Version
from paths import ROOT

from dsv4_backends import CONTRACTS, OPS, Reason, ops, records, stats, use_providers
from dsv4_backends.bench import inputs, shapes, tune
from dsv4_backends.bench import results as bench_results
from dsv4_backends.bench.results import Result, Row, Timing
from dsv4_backends.commands import cli
from dsv4_backends.commands import tune as tune_command
from dsv4_backends.runtime import bind
from dsv4_backends.selection import machine, policy
from dsv4_backends.selection import preferences as measured
from dsv4_backends.selection.machine import Device
from dsv4_backends.selection.provider import Implementation, ProviderSpec, Tier
from dsv4_backends.selection.resolve import resolve

CPU = torch.device("cpu")
GPU = Device("cuda", 0, "GPU X", Version("9.0"))


def preference(low: int = 1, high: int | None = 8, **changes: Any) -> measured.Preference:
    fields = {"op": "hc_prenorm_gemm", "shapes": "n=24 k=512", "prefer": "b", "over": "a", "ratio": 1.25, "source": "X"}
    return measured.Preference(low=low, high=high, **(fields | changes))


# ---------------------------------------------------------------------------------------------------- shape classes


@pytest.mark.parametrize("op", OPS)
def test_a_row_is_in_the_class_of_the_call_it_stands_for(op: str) -> None:
    for row in shapes.tiny([op]):
        made = inputs.draw(row, CPU)
        names = list(CONTRACTS[op].args)
        seen = [tuple(made[names[i]].shape) for i in measured.CLASSES[op].tensors]
        read = measured.CLASSES[op].read
        assert read(*seen) == read(*measured.CLASSES[op].of_row(row.params))
        assert not any(CONTRACTS[op].is_keyword(names[i]) for i in measured.CLASSES[op].tensors)


def test_classes_differ_where_they_should() -> None:
    read = measured.CLASSES["sparse_mla_decode"].read
    assert read((4, 2, 64, 512), (4, 2, 128)) == ("h_q=64", 8)
    read = measured.CLASSES["sparse_mla_prefill"].read
    assert read((4, 64, 512), (4, 128)) == ("h_q=64 topk<=256", 4)
    assert read((4, 64, 512), (4, 1, 640)) == ("h_q=64 topk>256", 4)


# ------------------------------------------------------------------------------------------------------------- tune


def decode(name: str, b: int, /, heads: int = 64, **us: float | None) -> Row:
    params = {"b": b, "s_q": 1, "h_q": heads, "window": 128, "selected": 512, "compressed": 16384}
    return row_of("sparse_mla_decode", name, params=params, **us)


def results(*rows: Row, order: tuple[str, ...] = ("a", "b")) -> Result:
    return result_of(*rows, order={"sparse_mla_decode": order})


def test_ranges_end_half_way_to_the_next_load() -> None:
    made = results(
        decode("1", 1, a=20.0, b=10.0),
        decode("8", 8, a=20.0, b=16.0),
        decode("32", 32, a=30.0, b=30.5),
        decode("128", 128, a=50.0, b=90.0),
        decode("other", 32, heads=128, a=30.0, b=15.0),
    )
    found = tune.tune([made]).named
    assert [(p.shapes, p.low, p.high, p.prefer, p.over, p.ratio) for p in found] == [
        ("h_q=64", 1, 16, "b", "a", 1.25),  # the root of 8 * 32
        ("h_q=128", 1, None, "b", "a", 2.0),
    ]
    assert found[0].source == "GPU X, 2026-01-01"
    for load, name in ((1, "b"), (16, "b"), (17, None), (500, None)):
        chosen = measured.preferred(found, "sparse_mla_decode", ((load, 1, 64, 512), (load, 1, 128)))
        assert (chosen.prefer if chosen else None) == name
    assert measured.preferred(found, "sparse_mla_decode", ((1, 1, 32, 512), (1, 1, 128))) is None
    assert measured.preferred(found, "mqa_logits", ((1, 64, 128), (9, 128))) is None


def test_a_range_may_be_in_the_middle_or_above() -> None:
    pairs = ((1, 10.0), (4, 5.0), (16, 5.0), (64, 10.0), (256, 5.0))
    made = results(*(decode(str(b), b, a=10.0, b=us) for b, us in pairs))
    assert [(p.low, p.high) for p in tune.tune([made]).named] == [(3, 32), (129, None)]


def test_what_is_near_noisy_or_contradicted_is_not_preferred() -> None:
    near = results(decode("near", 1, a=10.2, b=10.0))
    noisy = results(
        dataclasses.replace(decode("noisy", 1), timings=(Timing("a", 11.0, 9.0, 11.1), Timing("b", 10.0, 9.9, 10.1)))
    )
    contradicted = results(decode("one", 1, a=20.0, b=10.0), decode("two", 1, a=10.0, b=20.0))
    alone = results(decode("alone", 1, a=None, b=10.0))
    for made in (near, noisy, contradicted, alone):
        assert tune.tune([made]).preferences == ()
    assert "nothing to prefer" in tune_command.text(tune.tune([near]))
    # The order says who would serve: its first with a time.
    third = results(decode("third", 1, a=None, b=20.0, c=10.0), order=("a", "b", "c"))
    (entry,) = tune.tune([third]).preferences
    assert (entry.prefer, entry.over) == ("c", "b")


def test_where_values_decide_what_loses_least_is_preferred() -> None:
    """Rows of one load, whose lengths differ: b loses 5 % on one of them, a half of the time on another."""
    rows = (decode("even", 8, a=20.0, b=21.0), decode("skewed", 8, a=30.0, b=20.0), decode("short", 8, a=9.0, b=9.0))
    (found,) = tune.tune([results(*rows)]).named
    assert (found.prefer, found.over, found.ratio, found.most) == ("b", "a", 0.952, 1.5)
    assert "by the values (lengths, for one) 0.95 to 1.50 times as fast as a" in str(found)
    # c loses least where it is never the fastest.
    rows = (decode("even", 8, a=20.0, b=40.0, c=22.0), decode("skewed", 8, a=40.0, b=20.0, c=22.0))
    (found,) = tune.tune([results(*rows, order=("a", "b", "c"))]).named
    assert (found.prefer, found.ratio, found.most) == ("c", 0.909, 1.818)
    # A provider that does not take all of them is not preferred.
    rows = (decode("even", 8, a=20.0, b=None), decode("skewed", 8, a=30.0, b=20.0))
    assert tune.tune([results(*rows)]).preferences == ()


def test_a_clock_that_changes_on_the_way_hides_no_difference() -> None:
    """The replays alternate: all samples of both providers are slower at the end, and the quartiles overlap."""
    timings = (Timing("a", 1100.0, 1000.0, 1150.0), Timing("b", 1000.0, 920.0, 1060.0))
    drifting = results(dataclasses.replace(decode("1", 1), timings=timings))
    (found,) = tune.tune([drifting]).preferences
    assert (found.prefer, found.ratio) == ("b", 1.1)


def test_several_results_make_one_table() -> None:
    first, second = results(decode("1", 1, a=20.0, b=10.0)), results(decode("h32", 1, heads=32, a=20.0, b=10.0))
    table = tune.tune([first, second])
    assert [entry.source for entry in table.preferences] == [0, 1]
    assert len(table.sources) == 2
    # The later one is believed.
    assert tune.tune([first, results(decode("1", 1, a=10.0, b=20.0))]).preferences == ()


def test_the_choice_of_a_table_on_the_rows_that_it_is_made_from() -> None:
    made = results(
        decode("prefers b", 1, a=20.0, b=10.0),
        decode("near", 64, a=10.0, b=9.9),
        decode("only b", 65, a=None, b=9.9),
        decode("nobody", 66, a=None, b=None),
        decode("other heads", 1, 128, a=10.0, b=30.0),
    )
    rows = tune.chosen(tune.tune([made]), made).rows
    assert [row.auto for row in rows] == ["b", "a", "b", None, "a"]
    assert [row.timings for row in rows] == [row.timings for row in made.rows]
    stale = [dataclasses.replace(made.rows[0], params={"b": 1})]
    with pytest.raises(policy.PolicyError, match="expected a row of this version's bench"):
        tune.chosen(tune.tune([made]), results(*stale))
    # A preference for who has no time on a row, as one that refuses it, does not hold there.
    other = results(decode("refused", 1, a=20.0, b=None), order=("a", "b"))
    assert [row.auto for row in tune.chosen(tune.tune([made]), other).rows] == ["a"]


def test_tune_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_results.write(results(decode("1", 1, a=20.0, b=10.0)), tmp_path / "r.json")
    argv = ["tune", str(tmp_path / "r.json"), "--output", str(tmp_path / "sm_90.json")]
    assert cli.main(argv) == cli.OK
    printed = capsys.readouterr().out
    assert "sparse_mla_decode  h_q=64, any b * s_q  b       a     2.00" in printed
    assert "auto: within 3% of the best provider on 100% of 1 rows" in printed
    table = measured.read(tmp_path / "sm_90.json")
    assert table.capability == "9.0"
    assert table.sources[0].command == "dsv4-backends bench --json result.json"
    bench_results.write(result_of(device=machine.CPU), tmp_path / "cpu.json")
    assert cli.main(["tune", str(tmp_path / "cpu.json")]) == cli.USAGE
    assert "one architecture of GPU, got a CPU" in capsys.readouterr().err
    for setting in ("DSV4_BACKENDS_DEVICE=sm_80", "TRITON_OVERRIDE_ARCH=sm80"):
        with pytest.raises(policy.PolicyError, match="expected times of the architecture itself"):
            tune.tune([result_of(command=f"{setting} dsv4-backends bench")])


# ------------------------------------------------------------------------------------------------ shipped tables


def test_shipped_tables_are_sound() -> None:
    """Whatever is shipped: known ops and providers, ranges that do not overlap, and a source that can be redone."""
    from dsv4_backends.selection import plugins

    for path in measured.FOLDER.glob("*.json"):
        table = measured.read(path)
        assert path.stem == f"sm_{table.capability.replace('.', '')}"
        assert all(source.device and source.date and source.command and source.packages for source in table.sources)
        known = {spec.name for spec in plugins.load().providers}
        by_class: dict[tuple[str, str], list[measured.Preference]] = {}
        for found in table.named:
            assert found.op in OPS
            assert {found.prefer, found.over} <= known
            assert max(found.ratio, found.most) >= tune.MARGIN
            by_class.setdefault((found.op, found.shapes), []).append(found)
        for ranges in by_class.values():
            for one, two in itertools.pairwise(ranges):
                assert one.high is not None
                assert one.high < two.low


def test_shipped_tables_are_made_from_kept_results() -> None:
    kept = [bench_results.read(path) for path in (ROOT / "docs" / "results").glob("*-bench*.json")]
    by_source = {(result.device.name, result.date, result.command): result for result in kept}
    shipped = sorted(measured.FOLDER.glob("*.json"))
    assert [path.name for path in shipped] == ["sm_90.json"]
    for path in shipped:
        table = measured.read(path)
        found = [by_source[source.device, source.date, source.command] for source in table.sources]
        assert tune.tune(found) == table


def test_the_docs_show_a_shipped_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import docs

    monkeypatch.setattr(measured, "FOLDER", tmp_path)
    assert docs.measured_choice().startswith("No table")
    records.write(tune.tune([results(decode("1", 1, a=20.0, b=10.0))]), tmp_path / "sm_90.json")
    assert "| `sparse_mla_decode` | h_q=64, any b * s_q | `b` | `a` | 2.00 |" in docs.measured_choice()
    assert (
        "GPU X, 2026-01-01, torch 2.11.0, commit 0123456789ab: `dsv4-backends bench --json result.json`"
        in docs.measured_choice()
    )


def test_tables_are_read_by_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tune.tune([results(decode("1", 1, a=20.0, b=10.0))])
    records.write(made, tmp_path / "sm_90.json")
    monkeypatch.setattr(measured, "FOLDER", tmp_path)
    assert [p.prefer for p in measured.preferences(GPU)] == ["b"]
    assert measured.preferences(dataclasses.replace(GPU, capability=Version("10.0"))) == ()
    assert measured.preferences(machine.CPU) == ()
    records.write(dataclasses.replace(made, schema_version=9), tmp_path / "sm_90.json")
    with pytest.raises(policy.PolicyError, match=r"sm_90.json: measured choice: .*expected 1, got 9"):
        measured.read(tmp_path / "sm_90.json")


# ---------------------------------------------------------------------------------------------------------- resolve


def spec(name: str, tier: Tier, capability: str = ">=9.0", priority: int = 0) -> ProviderSpec:
    made = Implementation(op="hc_prenorm_gemm", target="json:dumps", capability=(capability,), priority=priority)
    return ProviderSpec(name=name, summary="fake", tier=tier, implementations=(made,))


SPECS = (spec("a", Tier.NATIVE), spec("b", Tier.PORTABLE), spec("c", Tier.REFERENCE))


@pytest.mark.parametrize(
    ("wishes", "kept"),
    [
        (policy.Policy(), True),
        (policy.Policy(order=("c",)), False),
        (policy.Policy(measured=False), False),
        (policy.Policy(batch_invariant=True), False),
        (policy.Policy(pins={"hc_prenorm_gemm": "a"}), False),
        (policy.Policy(order=("a",)), False),
        (policy.Policy(order=("b",)), False),
        (policy.Policy(deny=frozenset({"a"})), False),
        (policy.Policy(deny=frozenset({"b"})), False),
        (policy.Policy(allow=frozenset({"a"})), False),
    ],
)
def test_a_preference_yields_to_the_user(wishes: policy.Policy, kept: bool) -> None:
    found = resolve("hc_prenorm_gemm", GPU, {}, SPECS, wishes, preferences=[preference()], findable=lambda _: True)
    assert bool(found.measured) == kept


def test_a_preference_needs_both_tested_and_to_change_something() -> None:
    def kept(specs: tuple[ProviderSpec, ...], **changes: Any) -> bool:
        known = [preference(**changes)]
        found = resolve("hc_prenorm_gemm", GPU, {}, specs, policy.Policy(), preferences=known, findable=lambda _: True)
        return bool(found.measured)

    assert kept(SPECS)
    assert not kept(SPECS, prefer="a", over="b")  # that is the order anyway
    assert not kept(SPECS, op="mqa_logits")
    assert not kept(SPECS[1:])
    assert not kept((spec("acme", Tier.NATIVE, priority=1), *SPECS))  # comes first, and nobody measured it
    assert kept((*SPECS, spec("zeta", Tier.NATIVE)))  # would not have been called anyway
    newer = Device("cuda", 0, "GPU Y", Version("9.1"))
    untested = (spec("a", Tier.NATIVE), spec("b", Tier.PORTABLE, "==9.0"))
    known = [preference()]
    found = resolve("hc_prenorm_gemm", newer, {}, untested, policy.Policy(), preferences=known, findable=lambda _: True)
    assert not found.measured


# ------------------------------------------------------------------------------------------------------------ calls

KERNELS = """
from dsv4_backend_torch.hyper_connection import hc_prenorm_gemm as right
from dsv4_backends import Reason
def a(x, fn, *, num_splits=None, out=None, sqr_sum=None):
    return right(x, fn, num_splits=num_splits, out=out, sqr_sum=sqr_sum)
def b(x, fn, *, num_splits=None, out=None, sqr_sum=None):
    return right(x, fn, num_splits=num_splits, out=out, sqr_sum=sqr_sum)
def refuses(x, fn, *, num_splits=None, out=None, sqr_sum=None):
    return Reason("shape", "needs m below 4") if x.shape[0] >= 4 else None
"""


@pytest.fixture
def two(
    fake_plugin: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Callable[[int], str]]:
    """Two providers on the CPU and a preference for the second up to m = 8; gives who serves a call."""

    def prepare(refusing: tuple[str, ...] = (), kernels: str = KERNELS, **changes: Any) -> Callable[[int], str]:
        for name, tier in (("a", "NATIVE"), ("b", "PORTABLE")):
            refuses = f"{name}_plugin:refuses" if name in refusing else None
            of_op = {"target": f"{name}_plugin:{name}", "devices": ("cpu", "cuda"), "refuses": refuses}
            fake_plugin(name, provider({"hc_prenorm_gemm": of_op}, name=name, tier=tier, code=kernels))
        monkeypatch.setattr(measured, "preferences", lambda device: (preference(**changes),))
        bind.reset()

        def serves(m: int) -> str:
            before = dict(stats().get("hc_prenorm_gemm", {}))
            x, fn = torch.ones(m, 512).bfloat16(), torch.ones(24, 512)
            mixes, _ = ops.hc_prenorm_gemm(x, fn)
            assert mixes[0, 0] == 512
            (who,) = [name for name, calls in stats()["hc_prenorm_gemm"].items() if calls != before.get(name, 0)]
            assert bind.who_serves("hc_prenorm_gemm", {"x": x, "fn": fn}) == who
            return who

        return serves

    return prepare


def test_calls_are_served_by_shape(two: Callable[..., Callable[[int], str]]) -> None:
    serves = two()
    assert [serves(m) for m in (1, 8, 9, 100, 3, 1, 9)] == ["b", "b", "a", "a", "b", "b", "a"]
    x, fn = torch.ones(3, 256).bfloat16(), torch.ones(24, 256)  # another class
    assert bind.who_serves("hc_prenorm_gemm", {"x": x, "fn": fn}) == "a"
    assert set(stats()["hc_prenorm_gemm"]) == {"a", "b", "torch"}


def test_the_answer_is_that_of_a_call(two: Callable[..., Callable[[int], str]]) -> None:
    """``Resolution.serves`` returns the provider that a call of these shapes reaches."""
    serves = two()
    resolution = bind.resolution("hc_prenorm_gemm", "cpu")
    assert (resolution.serves().provider, resolution.serves().by) == ("a", "default")
    for m in (1, 8, 9, 100):
        served = resolution.serves(((m, 512), (24, 512)))
        assert served.provider == serves(m)
        assert served.by == ("measured" if m <= 8 else "default")
        assert served.unless == ()
    no = (Reason("shape", "no"),)
    refused = resolution.serves(((1, 512), (24, 512)), lambda c: dataclasses.replace(c, reasons=no))
    assert (refused.candidate, refused.by, refused.provider) == (None, "", "")
    assert [c.name for c in refused.passed_over if c.reasons == no] == ["b", "a", "torch"]


def test_the_setting_turns_it_off(two: Callable[..., Callable[[int], str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV4_BACKENDS_MEASURED", "0")
    assert two()(1) == "a"
    monkeypatch.setenv("DSV4_BACKENDS_MEASURED", "1")
    bind.reset()
    assert bind.who_serves("hc_prenorm_gemm", {"x": torch.ones(1, 512).bfloat16(), "fn": torch.ones(24, 512)}) == "b"
    monkeypatch.setenv("DSV4_BACKENDS_MEASURED", "yes")
    with pytest.raises(policy.PolicyError, match="DSV4_BACKENDS_MEASURED: expected 0 or 1, got 'yes'"):
        policy.from_environment()


def test_a_block_of_the_program_wins(two: Callable[..., Callable[[int], str]]) -> None:
    serves = two()
    with use_providers(order=["a"]):
        assert serves(1) == "a"
    with use_providers({"hc_prenorm_gemm": "a"}):
        assert serves(1) == "a"
    assert serves(1) == "b"


@pytest.mark.parametrize(
    ("refusing", "expected"),
    [(("b",), ["b", "a", "a"]), (("a",), ["b", "b", "b"]), (("a", "b"), ["b", "torch", "torch"])],
)
def test_refusals_hold_all_the_same(
    two: Callable[..., Callable[[int], str]], refusing: tuple[str, ...], expected: list[str]
) -> None:
    """Nobody refuses m = 1, which is preferred. 5 is preferred, 9 is not, and the parameter's providers refuse both."""
    serves = two(refusing)
    assert [serves(m) for m in (1, 5, 9)] == expected


def test_a_provider_that_does_not_import_is_not_preferred(two: Callable[..., Callable[[int], str]]) -> None:
    serves = two(kernels=KERNELS.replace("def b(", "def lost("))
    assert serves(1) == "a"


def test_compiled_code_follows_the_shape(two: Callable[..., Callable[[int], str]]) -> None:
    two()
    x, fn = torch.ones(2, 512).bfloat16(), torch.ones(24, 512)
    torch.ops.dsv4_backends.hc_prenorm_gemm(x, fn)
    torch.ops.dsv4_backends.hc_prenorm_gemm(torch.ones(20, 512).bfloat16(), fn)
    assert stats()["hc_prenorm_gemm"] == {"a": 1, "b": 1, "torch": 0}


def test_memory_is_bounded(two: Callable[..., Callable[[int], str]]) -> None:
    two()(1)
    (chain,) = bind.current().chains.values()
    for m in range(5000):
        _, bound = chain.by_shapes((torch.Size((m, 512)), torch.Size((24, 512))))
        assert bound.provider == ("b" if 1 <= m <= 8 else "a")
    assert len(chain.by_shape) <= 4096


def test_list_and_explain_say_so(
    two: Callable[..., Callable[[int], str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    two()
    told = "b where n=24 k=512, m <= 8: at least 1.25 times as fast as a (X)"
    assert cli.main(["list", "--device", "cpu"]) == cli.OK
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("hc_prenorm_gemm")]
    assert line.split(maxsplit=3) == ["hc_prenorm_gemm", "a", "native", "b (measured): n=24 k=512, m <= 8"]
    assert cli.main(["explain", "hc_prenorm_gemm", "--device", "cpu"]) == cli.OK
    out = capsys.readouterr().out
    assert told in out
    assert "DSV4_BACKENDS_MEASURED=0 turns it off" in out
    monkeypatch.setattr(measured, "preferences", lambda device: (preference(high=None),))
    assert cli.main(["list", "--device", "cpu"]) == cli.OK
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("hc_prenorm_gemm")]
    assert line.split(maxsplit=4) == [
        "hc_prenorm_gemm",
        "b",
        "(measured)",
        "portable",
        "otherwise a: sizes that were not measured",
    ]
    assert cli.main(["explain", "hc_prenorm_gemm", "--device", "cpu"]) == cli.OK
    assert "b: selected, since it was measured to be faster" in capsys.readouterr().out
    monkeypatch.setattr(measured, "preferences", lambda device: (preference(),))
    assert cli.main(["explain", "hc_prenorm_gemm", "--device", "cpu", "--json"]) == cli.OK
    (found,) = json.loads(capsys.readouterr().out)["devices"][0]["measured"]
    assert (found["prefer"], found["low"], found["high"]) == ("b", 1, 8)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(1, None, "any m"), (5, None, "m >= 5"), (1, 8, "m <= 8"), (5, 8, "5 <= m <= 8")],
)
def test_ranges_in_words(low: int, high: int | None, words: str) -> None:
    assert preference(low, high).where == f"n=24 k=512, {words}"
