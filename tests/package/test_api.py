"""What Python callers give: ops, providers, devices and limits, right and wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

import dsv4_backends as api
from dsv4_backends import OPS, PolicyError
from dsv4_backends.commands import cli
from dsv4_backends.runtime import bind
from dsv4_backends.selection import policy
from dsv4_backends.testing import checks

OP = "hc_prenorm_gemm"
TAKES_AN_OP: dict[str, Callable[[Any], Any]] = {
    "resolution": api.resolution,
    "workspace_bytes": lambda op: api.workspace_bytes(op, "cpu"),
    "implementation": lambda op: bind.implementation(op, "cpu"),
    "who_serves": lambda op: bind.who_serves(op, {}),
    "serving": lambda op: bind.serving(op, torch.device("cpu"), {}),
    "load_implementation": lambda op: bind.load_implementation(op, "json:dumps"),
    "resolution_under": lambda op: bind.resolution_under(policy.Policy(), op, torch.device("cpu")),
    "subject": lambda op: checks.subject("torch", op, "cpu"),
    "warmup": lambda op: api.warmup("flash", ops=[op], device="cpu"),
    "verify": lambda op: api.verify([op], device="cpu"),
    "use_providers": lambda op: api.use_providers({op: "torch"}).__enter__(),
}
TAKES_A_DEVICE: dict[str, Callable[[Any], Any]] = {
    "resolution": lambda device: api.resolution(OP, device),
    "workspace_bytes": lambda device: api.workspace_bytes(OP, device),
    "implementation": lambda device: bind.implementation(OP, device),
    "subject": lambda device: checks.subject("torch", OP, device),
    "warmup": lambda device: api.warmup("flash", ops=[OP], device=device),
    "verify": lambda device: api.verify([OP], device=device),
}


@pytest.mark.parametrize("name", TAKES_AN_OP)
def test_an_unknown_op(name: str) -> None:
    with pytest.raises(PolicyError, match="unknown op 'mqa_logit', did you mean 'mqa_logits'"):
        TAKES_AN_OP[name]("mqa_logit")
    for op in (None, 3, ""):
        with pytest.raises(PolicyError):
            TAKES_AN_OP[name](op)


@pytest.mark.parametrize("device", ["banana", "mps", "meta", "", f"cuda:{torch.cuda.device_count() + 9}", 1.5])
@pytest.mark.parametrize("name", TAKES_A_DEVICE)
def test_a_device_that_is_not_here(name: str, device: Any) -> None:
    with pytest.raises(PolicyError, match=r"device: "):
        TAKES_A_DEVICE[name](device)


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        ({"pins": ["triton"]}, r"pins: expected {op: provider} or one provider's name, got \['triton'\]"),
        ({"pins": {"fp8_einsum": None}}, "pins: fp8_einsum: expected a provider's name, got None"),
        ({"pins": {None: "torch"}}, "unknown op None"),
        ({"pins": {"fp8_einsums": "torch"}}, "did you mean 'fp8_einsum'"),
        ({"pins": 3}, "pins: expected"),
        ({"order": "triton"}, "order: expected a list of names, got 'triton'"),
        ({"order": 3}, "order: expected a list of names, got 3"),
        ({"order": ["triton", None]}, "order: expected a list of names"),
        ({"allow": "torch"}, "allow: expected a list of names, got 'torch'"),
        ({"deny": "triton"}, "deny: expected a list of names, got 'triton'"),
        ({"deny": {"triton": True}}, "deny: expected a list of names"),
        ({"experimental": "no"}, "experimental: expected True or False, got 'no'"),
        ({"batch_invariant": 2}, "batch_invariant: expected True or False, got 2"),
        ({"order": ["tritn"]}, "unknown provider 'tritn', did you mean 'triton'"),
    ],
)
def test_wishes_of_another_kind(wishes: dict[str, Any], words: str) -> None:
    with pytest.raises(PolicyError, match=words), api.use_providers(**wishes):
        pytest.fail("entered")
    assert policy.active() is None


def test_names_come_in_any_collection() -> None:
    with api.use_providers(order=(n for n in ("torch",)), allow={"torch"}, deny=frozenset(["triton"])) as wishes:
        assert wishes.order == ("torch",)


def test_a_pin_given_twice() -> None:
    for text in ("fp8_einsum=torch,fp8_einsum=triton", "*=torch, mqa_logits=torch, *=triton"):
        with pytest.raises(PolicyError, match="is pinned twice, to torch and to triton"):
            policy.from_environment({"DSV4_BACKENDS_PIN": text})
    for text in ("fp8_einsum=torch,*=triton", "*=triton,fp8_einsum=torch"):
        pins = policy.from_environment({"DSV4_BACKENDS_PIN": text}).pins
        assert pins == dict.fromkeys(OPS, "triton") | {"fp8_einsum": "torch"}


@pytest.mark.parametrize("device", ["sm_86", "8.6", "sm_103"])
def test_a_simulated_gpu(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = api.resolution(OP, device)
    assert cli.main(["explain", OP, "--device", device, "--json"]) == cli.OK
    (told,) = json.loads(capsys.readouterr().out)["devices"]
    assert found.selected is not None
    assert found.selected.name == told["selected"]
    assert [c.name for c in found.candidates] == [c["provider"] for c in told["candidates"]]
    assert found.device.json() == told["device"]


def test_a_resolution_is_readable(capsys: pytest.CaptureFixture[str]) -> None:
    found = api.resolution(OP, "sm_86")
    assert len(repr(found)) < 200
    assert "\n" not in repr(found)
    assert all(c.name in repr(found) for c in found.candidates)
    assert len(repr(found.candidates)) < 400
    assert cli.main(["explain", OP, "--device", "sm_86"]) == cli.OK
    assert f"{found}\n" == capsys.readouterr().out


def test_verify() -> None:
    lines: list[str] = []
    rows = api.verify([OP, "mqa_logits"], providers=["torch"], device="cpu", progress=lines.append)
    assert [(row.op, row.provider, row.ok) for row in rows] == [(OP, "torch", True), ("mqa_logits", "torch", True)]
    assert sum(row.cases for row in rows) == len(lines)
    for wrong, words in (
        ({"providers": "torch"}, "providers: expected a list of names"),
        ({"providers": ["tritn"]}, "did you mean 'triton'"),
        ({"level": "huge"}, "level: expected one of smoke, default, full, got 'huge'"),
        ({"ops": OP}, f"ops: expected a list of names, got '{OP}'"),
    ):
        with pytest.raises(PolicyError, match=words):
            api.verify(**wrong)  # type: ignore[arg-type]


def test_warmups_arguments() -> None:
    for wrong, words in (
        ({"tp": 3}, "cannot be divided over tensor parallel size 3"),
        ({"tp": 0}, "expected at least 1, got 0"),
        ({"tp": "4"}, "tp: expected an int, got '4'"),
        ({"limits": 8192}, "limits: expected dsv4_backends.Limits, got 8192"),
        ({"ops": "mqa_logits"}, "ops: expected a list of names, got 'mqa_logits'"),
        ({"model": None}, "model: expected flash, pro, a path"),
        ({"model": {"model_type": "llama"}}, "expected 'deepseek_v4', got 'llama'"),
    ):
        with pytest.raises(ValueError, match=words):
            api.warmup(**{"model": "flash", "device": "cpu", **wrong})  # type: ignore[arg-type]
    for wrong_limit in ("8", 1.5, 0):
        with pytest.raises(ValueError, match="max_tokens: expected"):
            api.Limits(max_tokens=wrong_limit)  # type: ignore[arg-type]


def test_check() -> None:
    (found,) = api.check("flash", tp=4, device="sm_90")
    assert found.ok
    assert found.rank.tp == 4
    for wrong, words in (
        ({"tp": 3}, "cannot be divided over tensor parallel size 3"),
        ({"device": "banana"}, "expected cpu or a GPU such as sm_86 or 8.6, got 'banana'"),
        ({"device": ""}, "got ''"),
    ):
        with pytest.raises(ValueError, match=words):
            api.check("flash", **wrong)  # type: ignore[arg-type]
