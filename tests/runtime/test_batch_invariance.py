"""The batch-invariant mode: one reading of the variable, and the same code for a row in every batch.

The bits themselves are compared in tests/providers/triton_suite.py, in the interpreter and on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import traffic as serving
from dsv4_backend_triton import BATCH_INVARIANT, ahead, batch_invariant
from dsv4_backend_triton.arch import arch_from_capability
from installed import provider
from launches import tile_of
from packaging.version import Version

from dsv4_backends import OPS, UnsupportedError, ops
from dsv4_backends.commands import cli
from dsv4_backends.compat import flash_mla
from dsv4_backends.contract import CONTRACTS
from dsv4_backends.contract.models import FLASH, PRO, Rank
from dsv4_backends.runtime import bind
from dsv4_backends.selection import plugins, policy
from dsv4_backends.testing import checks

SIZES = (1, 7, 64, 83, 84, 256, 1000, 8192)
CAPABILITIES = ("8.0", "8.6", "9.0", "10.0", "12.0")
SIZED = {"m", "M", "B", "t", "tokens", "group", "padded", "requests", "room", "offset", "n_items", "rows", "chunk"}
SIZED |= {"SCAN", "tiles", "each", "all_tiles", "wave", "rest", "least"}
"""What may differ from batch to batch: how many rows there are, where they go, where a block's columns end, how many
whole tiles a program takes, and how many lengths are read at a time to share the work."""


@functools.cache
def calls(op: str, rank: Rank, rows: int, packed_scales: bool = False) -> list[dict[str, Any]]:
    """Each kind of call that serving makes, with so many rows."""
    limits = serving.Limits(max_tokens=rows, max_requests=rows, max_context=8192)
    batch = CONTRACTS[op].batch
    made = serving.calls(op, rank, limits, packed_scales=packed_scales)
    return [call for call in made if len(call[batch]) == rows]


def code(op: str, capability: str, call: dict[str, Any], mode: bool) -> list[Any]:
    """What decides a row's bits, of each launch: kernel, constants, options, boxes, and the numbers it is given."""
    found = []
    home = "batch_invariant" if mode and op not in BATCH_INVARIANT else ""
    for one in ahead.record(op, [call], arch_from_capability(Version(capability)), home):
        numbers = {
            name: value
            for name, value in one.arguments.items()
            if isinstance(value, int | float) and name not in SIZED and "stride" not in name and name[1:3] != "_s"
        }
        boxes = [getattr(value, "block_shape", None) for value in one.arguments.values()]
        constants = {name: value for name, value in one.constants.items() if name not in SIZED}
        found.append((one.kernel.__name__, str(constants), one.options, boxes, numbers))
        if "chunk" in one.arguments:  # a key's place in its tile is the same wherever the blocks are cut
            assert one.arguments["chunk"] % tile_of(one, "BLOCK_N", "KEYS") == 0
    # A call that takes some rows at a time repeats its launches.
    return [one for index, one in enumerate(found) if one not in found[:index]]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("op", OPS)
def test_a_row_is_computed_by_the_same_code_in_every_batch(op: str, capability: str) -> None:
    packed = Version(capability).major >= 10
    for rank in (FLASH.rank(8), PRO.rank(1)):
        for kind in zip(*(calls(op, rank, n, packed) for n in SIZES), strict=True):
            first, *others = [code(op, capability, call, True) for call in kind]
            for size, other in zip(SIZES[1:], others, strict=True):
                assert other == first, size


@pytest.mark.parametrize("op", [op for op in OPS if op not in BATCH_INVARIANT])
def test_outside_the_mode_it_is_not(op: str) -> None:
    """So that the test above could fail, and the claim is made in the mode alone."""
    made = [code(op, "9.0", calls(op, FLASH.rank(1), n)[0], False) for n in SIZES]
    assert any(other != made[0] for other in made)


@pytest.mark.parametrize("splits", [1, 4, 16, 64])
def test_partials_of_the_prenorm_gemm(splits: int) -> None:
    """As many as the caller asks for, whatever the batch is."""
    op = "hc_prenorm_gemm"
    made = [code(op, "9.0", serving.prenorm(n, 16384, 24, splits), True) for n in SIZES]
    assert all(other == made[0] for other in made)


def test_every_op_says_whether_it_holds() -> None:
    (triton,) = (p for p in plugins.load().providers if p.name == "triton")
    usual = {i.op: i.batch_invariant for i in triton.implementations if not i.only_batch_invariant}
    mode = {i.op for i in triton.implementations if i.only_batch_invariant}
    assert usual == {op: op in BATCH_INVARIANT for op in OPS}
    assert mode == set(OPS) - set(BATCH_INVARIANT)
    for op in mode:
        function = getattr(batch_invariant, op)
        assert bind.signature_mismatch(CONTRACTS[op], function) is None


def test_one_reading_when_a_call_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the environment, or of the active policy; after ``reset`` anew; never when something is imported."""

    def target() -> tuple[str, bool]:
        resolution = _on_hopper("hc_prenorm_gemm")
        assert resolution.selected is not None
        chosen = resolution.selected.implementation
        return chosen.target, chosen.batch_invariant

    usual = ("dsv4_backend_triton.hyper_connection.hc_prenorm_gemm.op:hc_prenorm_gemm", False)
    in_mode = ("dsv4_backend_triton.batch_invariant:hc_prenorm_gemm", True)
    assert target() == usual
    monkeypatch.setenv("DSV4_BACKENDS_BATCH_INVARIANT", "1")
    bind.reset()
    assert target() == in_mode
    with policy.use_providers(batch_invariant=False):
        assert target() == usual
    monkeypatch.delenv("DSV4_BACKENDS_BATCH_INVARIANT")
    assert target() == in_mode  # what was bound stays bound
    bind.reset()
    assert target() == usual
    with policy.use_providers(batch_invariant=True):
        assert target() == in_mode
    assert target() == usual


def _on_hopper(op: str) -> Any:
    from dsv4_backends.selection.machine import simulate

    return bind.current().resolve(op, simulate("sm_90").devices[0])


def test_who_claims_it_comes_first(fake_plugin: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    """A faster provider that does not claim it serves in the mode only where nobody does, with a line in the log."""
    of_op = {"target": "dsv4_backend_torch.hyper_connection:hc_prenorm_gemm", "devices": ("cpu",)}
    fake_plugin("fast", provider({"hc_prenorm_gemm": of_op}, name="fast"))
    steady = {"hc_prenorm_gemm": of_op | {"batch_invariant": True}}
    fake_plugin("steady", provider(steady, name="steady", tier="PORTABLE"))
    call = {"x": torch.zeros(2, 64, dtype=torch.bfloat16), "fn": torch.zeros(8, 64)}
    ops.hc_prenorm_gemm(**call)
    with policy.use_providers(batch_invariant=True):
        ops.hc_prenorm_gemm(**call)
        assert "batch-variant" not in caplog.text
        with policy.use_providers(deny=["steady"]):
            ops.hc_prenorm_gemm(**call)
    assert bind.stats()["hc_prenorm_gemm"] == {"fast": 2, "steady": 1}
    assert caplog.text.count("[batch-variant]") == 1


@pytest.mark.parametrize("op", OPS)
def test_explain_says_it(op: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    claim = "   batch-invariant: a row's bits do not depend on the other rows"
    assert cli.main(["explain", op, "--device", "sm_90"]) == 0
    said = capsys.readouterr().out
    if op in BATCH_INVARIANT:
        assert claim in said
    else:
        assert f"with DSV4_BACKENDS_BATCH_INVARIANT=1 dsv4_backend_triton.batch_invariant:{op} is" in said
    monkeypatch.setenv("DSV4_BACKENDS_BATCH_INVARIANT", "1")
    bind.reset()
    assert cli.main(["explain", op, "--device", "sm_90"]) == 0
    said = capsys.readouterr().out
    assert claim in said
    assert "1. triton: selected" in said
    bind.reset()


def test_the_suite_can_run_the_mode() -> None:
    for mode in (False, True):
        assert checks.subject("torch", "mqa_logits", "cpu", batch_invariant=mode).provider == "torch"


def test_flash_mlas_flag_asks_about_the_call(fake_plugin: Callable[..., None]) -> None:
    """By the shapes of the call: the provider that claims it in general may refuse them, and another one serves."""
    refuses = """
    def refuses(*args, **kwargs):
        return d.Reason("shape", "not these")
    refuses.__signature__ = d.CONTRACTS["sparse_mla_decode"].signature
    """
    of_op = {"target": "dsv4_backend_torch.sparse_mla:sparse_mla_decode", "devices": ("cpu",), "batch_invariant": True}
    steady = {"sparse_mla_decode": of_op | {"refuses": "steady_plugin:refuses"}}
    fake_plugin("steady", provider(steady, name="steady", code=refuses))
    contract = CONTRACTS["sparse_mla_decode"]
    given = contract.inputs(contract.cases[0], "cpu")
    cache, scale = given["k_cache"].unsqueeze(2), given["sm_scale"]
    with pytest.raises(UnsupportedError, match="the provider torch, which does not claim it"):
        flash_mla.flash_mla_with_kvcache(
            given["q"], cache, None, None, 512, None, None, scale, False, True, given["indices"],
            enable_batch_invariant=True,
        )  # fmt: skip
