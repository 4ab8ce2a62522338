"""Values of indices and lengths: none faults with any provider, and DSV4_BACKENDS_CHECK_VALUES finds wrong ones."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from paths import ROOT

from dsv4_backends import CONTRACTS, ContractError, ops
from dsv4_backends.contract import OpContract, values
from dsv4_backends.runtime import bind

CPU = torch.device("cpu")
WITH_VALUES = [name for name, contract in CONTRACTS.items() if contract.values]


def test_no_value_faults_in_the_reference() -> None:
    fuzz("torch", "")


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("device", ["sm_80", "sm_90"])
def test_no_value_faults_in_triton(device: str) -> None:
    fuzz("triton", device)


def fuzz(provider: str, device: str) -> None:
    """In a process of its own: a fault would kill it."""
    interpreted = {"TRITON_INTERPRET": "1", "DSV4_BACKENDS_DEVICE": device} if device else {}
    env = {**os.environ, **interpreted, "FUZZED_PROVIDER": provider, "CUDA_VISIBLE_DEVICES": ""}
    env["FUZZED_EXAMPLES"] = "100" if provider == "torch" else "25"
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", "-W", "ignore", "tests/contract/fuzz_values.py"]
    command = [sys.executable, "-m", "pytest", *options]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"{len(WITH_VALUES)} passed" in done.stdout


def made(op: str, name: str) -> dict[str, Any]:
    contract = CONTRACTS[op]
    return contract.inputs(next(case for case in contract.cases if case.name == name), CPU)


@pytest.mark.parametrize("op", WITH_VALUES)
def test_what_a_caller_should_give_is_found_fine(op: str) -> None:
    contract = CONTRACTS[op]
    for case in contract.at_level("smoke"):
        if not any(word in case.name for word in ("hostile", "any index", "beyond", "empty ranges", "no keys")):
            values.check_values(contract, contract.inputs(case, CPU))


BROKEN = [
    ("sparse_mla_prefill", "lengths", "topk_length", (2,), -3, "row 2: expected 0 to 48 (0 to topk), got -3"),
    ("sparse_mla_prefill", "lengths", "topk_length", (1,), 49, "row 1: expected 0 to 48 (0 to topk), got 49"),
    (
        "sparse_mla_prefill",
        "small",
        "indices",
        (1, 7),
        37,
        "row 1, column 7: expected -1 to 36 (-1 to s_kv - 1), got 37",
    ),
    ("sparse_mla_prefill", "head dimension", "indices", (1, 0, 7), -2, "row 1, 0, column 7: expected -1 to 60"),
    (
        "sparse_mla_decode",
        "lengths",
        "extra_topk_length",
        (3,),
        21,
        "row 3: expected 0 to 20 (0 to extra_topk), got 21",
    ),
    ("sparse_mla_decode", "two scopes", "indices", (1, 0, 9), 2**31 - 1, "row 1, 0, column 9: expected -1 to"),
    ("sparse_mla_decode", "two scopes", "extra_indices", (0, 0, 5), -2, "row 0, 0, column 5: expected -1 to"),
    ("mqa_logits", "random ranges", "row_starts", (4,), -1, "row 4: expected 0 to 150 (0 to n), got -1"),
    ("mqa_logits", "random ranges", "row_ends", (4,), 151, "to 150 (row_starts to n), got 151"),
    ("paged_mqa_logits", "small", "context_lens", (0, 0), 38, "row 0, column 0: expected 0 to 37 (0 to min("),
    ("paged_mqa_logits", "flat lengths", "context_lens", (1,), -1, "row 1: expected 0 to 150 (0 to min("),
    (
        "paged_mqa_logits",
        "small",
        "block_table",
        (0, 3),
        10**9,
        "row 0, column 3: expected 0 to 60 (0 to pages - 1), got",
    ),
    ("gather_dequant_kv", "small", "seq_lens", (1,), 41, "row 1: expected 0 to 40 (0 to page_size * blocks), got 41"),
    ("gather_dequant_kv", "last entries", "gather_lens", (0,), 99, "row 0: expected 0 to 50 (0 to seq_lens), got 99"),
    ("gather_dequant_kv", "small", "block_table", (0, 3), -1, "row 0, column 3: expected 0 to 60 (0 to pages - 1)"),
    (
        "indexer_q_rope_quant",
        "small",
        "positions",
        (2,),
        64,
        "row 2: expected 0 to 63 (0 to max_positions - 1), got 64",
    ),
    ("inverse_rope_quant", "small", "positions", (0,), -1, "row 0: expected 0 to 63 (0 to max_positions - 1), got -1"),
    ("inverse_rope", "small", "positions", (1,), 2**40, "row 1: expected 0 to 63 (0 to max_positions - 1), got"),
]


@pytest.mark.parametrize(("op", "case", "argument", "place", "value", "message"), BROKEN)
def test_what_it_should_not_is_named(
    monkeypatch: pytest.MonkeyPatch, op: str, case: str, argument: str, place: tuple[int, ...], value: int, message: str
) -> None:
    arguments = made(op, case)
    call = getattr(ops, op)
    call(**arguments)
    monkeypatch.setenv("DSV4_BACKENDS_CHECK_VALUES", "1")
    bind.reset()
    call(**arguments)
    arguments[argument][place] = value
    for _ in range(3):  # known calls too
        with pytest.raises(ContractError) as caught:
            call(**arguments)
        assert f"{op}: argument {argument}: " in str(caught.value)
        assert message in str(caught.value)
    monkeypatch.delenv("DSV4_BACKENDS_CHECK_VALUES")
    bind.reset()
    call(**arguments)


def test_what_is_beyond_a_length_is_not_looked_at() -> None:
    arguments = made("sparse_mla_decode", "lengths")
    assert (arguments["indices"] == 2**31 - 1).any()
    values.check_values(CONTRACTS["sparse_mla_decode"], arguments)
    arguments["topk_length"].fill_(arguments["indices"].shape[-1])
    with pytest.raises(ContractError, match="such values in all"):
        values.check_values(CONTRACTS["sparse_mla_decode"], arguments)


def test_off_it_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a call reaches is the provider's own function."""
    own = bind.implementation("mqa_logits", "cpu")[1]
    without_index = bind.implementation("fp8_einsum", "cpu")[1]
    monkeypatch.setenv("DSV4_BACKENDS_CHECK_VALUES", "1")
    bind.reset()
    assert bind.implementation("mqa_logits", "cpu")[1].__wrapped__ is own  # type: ignore[attr-defined]
    assert bind.implementation("fp8_einsum", "cpu")[1] is without_index
    bind.reset()


def test_a_capture_is_not_checked_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    contract: OpContract = CONTRACTS["mqa_logits"]
    call = values.checking(contract, lambda *args, **kwargs: "called")
    arguments = made("mqa_logits", "random ranges")
    arguments["row_ends"][0] = -7
    with pytest.raises(ContractError):
        call(**arguments)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with caplog.at_level(logging.WARNING, "dsv4_backends"):
        assert call(**arguments) == "called"
        assert call(**arguments) == "called"
    assert caplog.text.count("not checked while a CUDA graph is captured") == 1


def test_under_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV4_BACKENDS_CHECK_VALUES", "1")
    bind.reset()
    arguments = made("mqa_logits", "random ranges")
    compiled = torch.compile(lambda **kwargs: ops.mqa_logits(**kwargs), backend="eager", fullgraph=True)
    compiled(**arguments)
    arguments["row_ends"][0] = 151
    with pytest.raises(ContractError, match="argument row_ends: row 0"):
        compiled(**arguments)
    monkeypatch.delenv("DSV4_BACKENDS_CHECK_VALUES")
    bind.reset()
