"""The conformance suite is right: the intended check finds each kind of wrong provider."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpus
import pytest
import torch
from installed import provider
from torch import Tensor

from dsv4_backends import CONTRACTS, Implementation, NoProviderError, Reason
from dsv4_backends.runtime import bind
from dsv4_backends.testing import checks, numerics, oracle

OP = "mqa_logits"
CONTRACT = CONTRACTS[OP]
CASES = {case.name: case for case in CONTRACT.cases}
CASE = CASES["small"]


def honest(
    q: Tensor,
    k: Tensor,
    k_scale: Tensor,
    weights: Tensor,
    row_starts: Tensor,
    row_ends: Tensor,
    *,
    max_seqlen_k: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    (logits,) = oracle.of("mqa_logits")(q, k, k_scale, weights, row_starts, row_ends, max_seqlen_k)
    return logits.float() if out is None else out.copy_(logits)


def subject(
    function: Callable[..., Any], *, refuses: Callable[..., Any] | None = None, **claims: Any
) -> checks.Subject:
    implementation = Implementation(op=OP, target="nowhere:nothing", devices=("cpu",), **claims)
    return checks.Subject("cheat", CONTRACT, implementation, function, refuses, torch.device("cpu"))


def first_failure(target: checks.Subject, case: Any = CASE) -> str | None:
    """The name of the first check that fails, in the order of the suite."""
    try:
        checks.check_signature(target)
        checks.check_coverage(target, CONTRACT.at_level("smoke"))
        for check in checks.CHECKS.values():
            check(target, case)
    except checks.CheckFailed as failed:
        return failed.check
    return None


def cheat(change: Callable[..., Any]) -> Callable[..., Any]:
    """A function with the contract's signature that passes its arguments, by name, to ``change``."""

    def function(
        q: Tensor,
        k: Tensor,
        k_scale: Tensor,
        weights: Tensor,
        row_starts: Tensor,
        row_ends: Tensor,
        *,
        max_seqlen_k: int | None = None,
        out: Tensor | None = None,
    ) -> Any:
        return change(**by_name(q, k, k_scale, weights, row_starts, row_ends, max_seqlen_k, out))

    return function


def by_name(*values: Any) -> dict[str, Any]:
    return dict(zip(CONTRACT.args, values, strict=True))


def zeros(**a: Any) -> Tensor:
    result = honest(**a)
    return result.fill_(0.0)


def small_error(**a: Any) -> Tensor:
    return honest(**a).mul_(1.02)


def one_row_wrong(**a: Any) -> Tensor:
    result = honest(**a)
    result[-1, 0] += 0.5
    return result


def finite_outside(**a: Any) -> Tensor:
    return honest(**a).clamp_(min=-1e30)


def mutates(**a: Any) -> Tensor:
    result = honest(**a)
    a["weights"][0, 0] += 1
    return result


def transposed(**a: Any) -> Tensor:
    result = honest(**a)
    return result.T.contiguous().T


def overlapping(**a: Any) -> Tensor:
    result = honest(**a)
    return result[:1].expand(result.shape)


def wrong_dtype(**a: Any) -> Tensor:
    return honest(**a).double()


def wrong_shape(**a: Any) -> Tensor:
    return honest(**a)[:, :-1]


def a_list(**a: Any) -> Any:
    return [honest(**a).tolist()]


def ignores_buffer(**a: Any) -> Tensor:
    return honest(**(a | {"out": None}))


def ignores_strides(**a: Any) -> Tensor:
    """Writes as if the buffer were packed."""
    if a["out"] is None:
        return honest(**a)
    result = honest(**(a | {"out": None}))
    a["out"].as_strided(result.shape, result.stride()).copy_(result)
    return a["out"]


def writes_between_rows(**a: Any) -> Tensor:
    """Right, and one element too many in each row but the last."""
    result = honest(**a)
    if a["out"] is not None and result.stride(0) > result.shape[1]:
        result.as_strided(
            (len(result) - 1, 1), (result.stride(0), 1), result.storage_offset() + result.shape[1]
        ).zero_()
    return result


def nothing(**a: Any) -> None:
    honest(**a)


def one_too_many(**a: Any) -> Any:
    return honest(**a), a["k"]


def leaves_holes(**a: Any) -> Tensor:
    """Relies on the content of new memory: writes everything but the part outside the ranges."""
    result = honest(**(a | {"out": None}))
    given = torch.empty_like(result) if a["out"] is None else a["out"]
    inside = result != -torch.inf
    if a["out"] is None:
        given.fill_(-torch.inf)  # as freshly mapped memory might happen to be right
    given[inside] = result[inside]
    return given


_cache: dict[Any, Tensor] = {}


def cached(**a: Any) -> Tensor:
    """Remembers results by the address and shape of the query."""
    key = (a["q"].data_ptr(), a["q"].shape, a["k"].shape)
    if key not in _cache:
        _cache[key] = honest(**a)
    return _cache[key].clone() if a["out"] is None else a["out"].copy_(_cache[key])


_static: dict[Any, Tensor] = {}


def one_buffer(**a: Any) -> Tensor:
    """Returns the same memory every time."""
    result = honest(**a)
    if a["out"] is not None:
        return result
    return _static.setdefault(tuple(result.shape), torch.empty_like(result)).copy_(result)


_calls = [0]


def drifts(**a: Any) -> Tensor:
    _calls[0] += 1
    return honest(**a).mul_(1 + 1e-6 * _calls[0])


def depends_on_batch(**a: Any) -> Tensor:
    return honest(**a).mul_(1 + 1e-6 * len(a["q"]))


CHEATS = [
    (zeros, "numerics"),
    (small_error, "numerics"),
    (one_row_wrong, "numerics"),
    (finite_outside, "numerics"),
    (mutates, "inputs"),
    (transposed, "stride"),
    (overlapping, "stride"),
    (wrong_dtype, "fake"),
    (wrong_shape, "fake"),
    (a_list, "fake"),
    (nothing, "fake"),
    (one_too_many, "fake"),
    (ignores_buffer, "written"),
    (ignores_strides, "written"),
    (writes_between_rows, "written"),
    (leaves_holes, "written"),
    (cached, "fresh"),
    (one_buffer, "fresh"),
    (drifts, "deterministic"),
]


def test_the_honest_one_passes() -> None:
    for case in CONTRACT.at_level("smoke"):
        assert first_failure(subject(honest, batch_invariant=False), case) is None


@pytest.mark.parametrize(("change", "expected"), CHEATS, ids=[c.__name__ for c, _ in CHEATS])
def test_cheats(change: Callable[..., Any], expected: str) -> None:
    _cache.clear()
    assert first_failure(subject(cheat(change))) == expected


@pytest.mark.parametrize("op", [op for op, contract in CONTRACTS.items() if contract.in_place])
def test_in_place_nothing_is_written_between_pages(op: str) -> None:
    contract, name = CONTRACTS[op], CONTRACTS[op].buffers[0]

    def spills(**a: Any) -> Tensor:
        result = a[name]
        checks._storage(result)[checks._outside(result)] = 9
        return result

    honest_one = checks.subject("torch", op, "cpu")
    cases = [
        case
        for case in contract.at_level("smoke")
        if bool(checks._outside(checks._inputs(honest_one, case)[name]).any())
    ]
    assert cases, "no case has gaps"
    checks.check_written(honest_one, cases[0])
    target = dataclasses.replace(honest_one, function=lambda **a: (honest_one.run(a), spills(**a))[1])
    with pytest.raises(checks.CheckFailed, match=rf"^\[written\].*between or around the rows of {name} "):
        checks.check_written(target, cases[0])


def test_batch_invariance_only_where_claimed() -> None:
    assert first_failure(subject(cheat(depends_on_batch))) is None
    assert first_failure(subject(cheat(depends_on_batch), batch_invariant=True)) == "batch_invariant"


def test_rows_are_cut_for_every_op() -> None:
    """A row alone is the same call for that row: the oracle agrees with itself.

    Ops that write entries of a cache return all of it: each element is that of the batch, or unchanged.
    """
    for op, contract in CONTRACTS.items():
        case = next(c for c in contract.cases if c.name == "small")
        made = contract.inputs(case, "cpu")
        whole = oracle.expected(op, made)
        alone = oracle.expected(op, checks.select_rows(contract, made, slice(1, 2)))
        unchanged = oracle.expected(op, checks.select_rows(contract, made, slice(0, 0)))
        for a, b, before in zip(whole, alone, unchanged, strict=True):
            if contract.in_place and len(a) == len(b):
                a = torch.where(torch.isclose(b, before, equal_nan=True), b, a)
                torch.testing.assert_close(a, b, equal_nan=True)
            else:
                torch.testing.assert_close(a[1:2], b, equal_nan=True)


def test_wrong_signature() -> None:
    assert first_failure(subject(lambda q, k: None)) == "signature"


def accepts_what_it_cannot_do(**a: Any) -> Tensor:
    if a["max_seqlen_k"] is not None:
        raise RuntimeError("no compressed form")
    return honest(**a)


def test_accepts_what_it_should_refuse() -> None:
    assert first_failure(subject(cheat(accepts_what_it_cannot_do)), CASES["compressed"]) == "refusal"
    refuses = cheat(lambda **a: Reason("form", "no compressed form") if a["max_seqlen_k"] is not None else None)
    assert first_failure(subject(cheat(accepts_what_it_cannot_do), refuses=refuses)) is None
    with pytest.raises(RuntimeError):  # the suite skips what is refused; a check by hand runs it
        checks.check_numerics(subject(cheat(accepts_what_it_cannot_do), refuses=refuses), CASES["compressed"])


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (lambda **a: "too large", "refusal"),
        (lambda **a: False, "refusal"),
        (lambda **a: Reason("values", "large") if float(a["weights"].abs().sum()) < 0 else None, "refusal"),
        (lambda **a: Reason("always", "refuses everything"), "coverage"),
    ],
)
def test_refusals_are_judged(answer: Callable[..., Any], expected: str) -> None:
    assert first_failure(subject(honest, refuses=cheat(answer))) == expected


def test_poisoned_allocations_are_undone() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with checks._poisoned_allocations():
        assert torch.empty(3).isnan().all()
    assert torch.are_deterministic_algorithms_enabled() is before


@pytest.mark.parametrize(
    ("result", "reference", "ok"),
    [
        ([1.0, 2.0], [1.0, 2.0], True),
        ([1.0, 2.2], [1.0, 2.0], False),
        ([1.0, float("nan")], [1.0, 2.0], False),
        ([float("nan")], [float("nan")], True),
        ([float("inf")], [-float("inf")], False),
        ([-float("inf"), 1.0], [-float("inf"), 1.0], True),
        ([1e30, 1.0], [float("inf"), 1.0], False),
        ([0.0, 0.0], [0.0, 0.0], True),
        ([], [], True),
    ],
)
def test_compare(result: list[float], reference: list[float], ok: bool) -> None:
    tolerance = replace(CONTRACT.tolerances["out"], atol_rms=0.0, rtol=1e-3)
    error = numerics.compare(torch.tensor(result), torch.tensor(reference, dtype=torch.float64), tolerance)
    assert error.ok is ok


def test_pieces_are_compared_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    tolerance = CONTRACTS["hc_prenorm_gemm"].tolerances["out"]
    want = torch.randn(5, 11, 3, dtype=torch.float64)
    want[1, 2] = torch.inf
    found = (want + 1e-3 * torch.randn(5, 11, 3)).float()
    wrong = found.clone()
    wrong[3, 4, 1] = wrong[4, 0, 0] = torch.nan
    whole = numerics.compare(found, want, tolerance)
    said = numerics.compare(wrong, want, tolerance).note
    assert said.endswith("at [3, 4, 1], 2 such elements")
    monkeypatch.setattr(numerics, "PIECE", 7)
    parts = numerics.compare(found, want, tolerance)
    assert parts.worst == whole.worst
    assert (parts.ratio, parts.calc_diff) == pytest.approx((whole.ratio, whole.calc_diff), rel=1e-9)
    assert numerics.compare(wrong, want, tolerance).note == said


def test_calc_diff_is_the_published_formula() -> None:
    x, y = torch.randn(1000, dtype=torch.float64), torch.randn(1000, dtype=torch.float64)
    published = 1 - 2 * (x * y).sum() / (x * x + y * y).sum()
    assert numerics.calc_diff(x, y) == pytest.approx(float(published))


KERNEL = """
def hc_prenorm_gemm(x, fn, *, num_splits=None, out=None, sqr_sum=None):
    from dsv4_backend_torch.hyper_connection import hc_prenorm_gemm
    mixes, squares = hc_prenorm_gemm(x, fn, num_splits=num_splits, out=out, sqr_sum=sqr_sum)
    return mixes.CHANGE, squares
"""
SUITE = """
from dsv4_backends.testing import ProviderConformance

class TestAcme(ProviderConformance):
    provider = "{name}"
    known_failures = {known}
    must_serve = {must_serve}
"""


def run_suite(
    tmp_path: Path,
    fake_plugin: Callable[..., None],
    change: str,
    name: str = "acme",
    known: str = "{}",
    device: str = "cpu",
    must_serve: bool = True,
) -> tuple[int, str]:
    ops = {
        "hc_prenorm_gemm": {"target": "acme_plugin:hc_prenorm_gemm", "devices": (device,)},
        "mqa_logits": {"target": "json:dumps", "devices": ("cuda",)},
    }
    fake_plugin("acme", provider(ops, code=KERNEL.replace("CHANGE", change)))
    (tmp_path / "test_acme.py").write_text(SUITE.format(name=name, known=known, must_serve=must_serve))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "test_acme.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def test_five_lines_pass(tmp_path: Path, fake_plugin: Callable[..., None]) -> None:
    code, out = run_suite(tmp_path, fake_plugin, "mul_(1)")
    assert code == 0, out
    assert " passed" in out
    # What this machine cannot run is skipped with the provider's reason, not passed.
    assert "runs on an NVIDIA GPU, this is the CPU" in out


@pytest.mark.parametrize("must_serve", [True, False])
def test_a_suite_in_which_nothing_ran_fails(tmp_path: Path, fake_plugin: Callable[..., None], must_serve: bool) -> None:
    """Unless `must_serve` is False."""
    code, out = run_suite(tmp_path, fake_plugin, "mul_(1)", device="cuda", must_serve=must_serve)
    assert code == int(must_serve), out
    assert ("[serves] acme serves none of its ops here" in out) is must_serve
    assert " passed" not in out or "1 passed" in out  # that no known failure is left over


def test_five_lines_fail(tmp_path: Path, fake_plugin: Callable[..., None]) -> None:
    code, out = run_suite(tmp_path, fake_plugin, "mul_(1.01)")
    assert code == 1
    assert "[numerics] acme: hc_prenorm_gemm: small: out: error" in out


def test_known_failures_must_fail_and_must_match(tmp_path: Path, fake_plugin: Callable[..., None]) -> None:
    known = "{'numerics-hc_prenorm_gemm-*': 'acme#1', 'nothing-*': 'acme#2'}"
    code, out = run_suite(tmp_path, fake_plugin, "mul_(1)", known=known)
    assert code == 1
    assert "XPASS(strict)" in out
    assert "known_failures that match no test: ['nothing-*']" in out


def test_unknown_provider_fails(tmp_path: Path, fake_plugin: Callable[..., None]) -> None:
    code, out = run_suite(tmp_path, fake_plugin, "mul_(1)", name="acne")
    assert code != 0
    assert "no installed provider is named 'acne'. Known: acme, " in out


def test_implementation_is_the_bound_function() -> None:
    name, function = bind.implementation(OP, "cpu")
    assert (name, function.__module__) == ("torch", "dsv4_backend_torch.indexer")


def test_a_gpu_test_is_skipped_for_a_library_and_fails_for_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise NoProviderError("nothing serves")

    monkeypatch.setattr(gpus.checks, "subject", refused)
    with pytest.raises(pytest.skip.Exception, match="nothing serves"):
        gpus.provided("flash_mla", "sparse_mla_decode", torch.device("cpu"))
    for ours in gpus.EVERYWHERE:
        with pytest.raises(NoProviderError):
            gpus.provided(ours, "sparse_mla_decode", torch.device("cpu"))
