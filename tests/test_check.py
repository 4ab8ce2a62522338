"""``check``: what serving a model asks for, and who answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv4_backends import OPS, Limits
from dsv4_backends.commands import cli
from dsv4_backends.contract import CONTRACTS
from dsv4_backends.contract.models import FLASH, PRO, Model
from dsv4_backends.runtime import check
from dsv4_backends.selection import machine
from dsv4_backends.selection import preferences as measured

SMS = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121"]
REFUSING = """
import dsv4_backends as d
@d.hookimpl
def dsv4_providers():
    yield d.ProviderSpec(name="acme", summary="fake", tier=d.Tier.NATIVE, implementations=tuple(
        d.Implementation(op=op, target=f"acme_kernels:{op}", refuses="acme_kernels:refuses_" + op)
        for op in ("sparse_mla_decode", "hc_prenorm_gemm")))
"""
KERNELS = """
from dsv4_backends import Reason
def sparse_mla_decode(q, k_cache, indices, sm_scale, *, attn_sink=None, topk_length=None, extra_k_cache=None,
                      extra_indices=None, extra_topk_length=None, out=None): ...
def refuses_sparse_mla_decode(q, k_cache, indices, sm_scale, *, attn_sink=None, topk_length=None, extra_k_cache=None,
                      extra_indices=None, extra_topk_length=None, out=None):
    if q.shape[2] not in (64, 128):
        return Reason("heads", f"acme takes 64 or 128 heads, got {q.shape[2]}")
def hc_prenorm_gemm(x, fn, *, num_splits=None, out=None, sqr_sum=None): ...
def refuses_hc_prenorm_gemm(x, fn, *, num_splits=None, out=None, sqr_sum=None):
    raise RuntimeError("no GPU to ask")
"""


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = cli.main(["check", *argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("tp", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("model", [FLASH, PRO], ids=lambda model: model.name)
def test_answers(model: Model, tp: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On every architecture Triton serves all of it, and the reference where it may not."""
    name = "flash" if model is FLASH else "pro"
    if model.o_groups % tp:
        code, out, err = run(capsys, "--model", name, "--tp", str(tp), "--device", "sm_90")
        assert (code, out) == (1, "")
        assert err.strip().endswith("8 output groups cannot be divided over tensor parallel size 16")
        return
    for sm in SMS:
        for deny, provider in (("", "triton"), ("triton", "torch")):
            monkeypatch.setenv("DSV4_BACKENDS_DENY", deny)
            code, out, _ = run(capsys, "--model", name, "--tp", str(tp), "--device", sm, "--json")
            data = json.loads(out)
            assert code == 0
            assert data["ok"]
            assert data["rank"] == {"heads": model.heads // tp, "o_groups": model.o_groups // tp, "index_heads": 64}
            (device,) = data["devices"]
            assert {need["op"] for need in device["needs"]} == set(OPS)
            assert {need["selected"] for need in device["needs"]} == {provider}
            assert device["uncovered"] == 0
            assert device["reference"] == (len(device["needs"]) if provider == "torch" else 0)


@pytest.mark.parametrize("sm", ["sm_90", "sm_100"])
@pytest.mark.parametrize("model", [FLASH, PRO], ids=lambda model: model.name)
def test_needs_keep_the_contracts(model: Model, sm: str) -> None:
    """Every need is a call that the contract takes, of the shapes of the model."""
    (gpu,) = machine.simulate(sm).gpus
    needs = check.needs(model.rank(4), Limits(8192, 64, model.max_positions), gpu)
    for need in needs:
        CONTRACTS[need.op].check(**need.arguments())
    roles = {(need.op, need.role) for need in needs}
    assert len(roles) == len(needs)
    assert (("sparse_mla_decode", "window layers, decode") in roles) == (model is FLASH)
    by_role = {need.role: need for need in needs if need.op == "sparse_mla_decode"}
    four, many = by_role["ratio 4 layers, decode"].sizes, by_role["ratio 128 layers, decode"].sizes
    assert four["extra_topk"] == model.index_topk
    assert (four["extra_page_size"], many["extra_page_size"]) == (64, 2)
    assert many["extra_topk"] == 8192
    (broadcast,) = (need for need in needs if need.role == "first layer's streams, prefill")
    assert broadcast.sizes["k"] == model.hidden
    (logits,) = (need for need in needs if need.op == "paged_mqa_logits")
    assert logits.sizes["n"] == model.max_positions // 4
    einsum = next(need for need in needs if need.op == "fp8_einsum")
    assert einsum.sizes["h"] == model.o_groups // 4
    assert ("int32" in str(einsum.arguments()["x_scale"].dtype)) == (sm == "sm_100")


def test_what_the_limits_change() -> None:
    needs = check.needs(FLASH.rank(1), Limits(1000, 7, 1000), machine.CPU)
    sizes = {(need.op, need.role): need.sizes for need in needs}
    assert sizes["sparse_mla_decode", "ratio 128 layers, decode"]["extra_topk"] == 128
    assert sizes["sparse_mla_decode", "window layers, decode"]["b"] == 7
    assert sizes["mqa_logits", "indexer, prefill"] == {"m": 1000, "h": 64, "d": 128, "n": 250}


def test_shapes_are_asked_about(
    fake_plugin: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A provider that refuses a rank's shapes is passed over with its reason; one that cannot be asked is not."""
    (tmp_path / "acme_kernels.py").write_text(KERNELS)
    fake_plugin("acme", REFUSING)
    for tp, decode in ((1, "acme"), (2, "triton")):
        code, out, _ = run(capsys, "--model", "flash", "--tp", str(tp), "--device", "sm_90", "--json")
        assert code == 0
        needs = json.loads(out)["devices"][0]["needs"]
        assert {n["selected"] for n in needs if n["op"] == "sparse_mla_decode"} == {decode}
        assert {n["selected"] for n in needs if n["op"] == "hc_prenorm_gemm"} == {"acme"}
        (first, *_) = (n for n in needs if n["op"] == "hc_prenorm_gemm")
        assert first["candidates"][0]["warning"]["code"] == "shape-unknown"
    code, out, _ = run(capsys, "--model", "flash", "--tp", "2", "--device", "sm_90")
    assert "sparse_mla_decode: acme: acme takes 64 or 128 heads, got 32" in out
    assert "no GPU to ask" in out


def test_what_was_measured_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As for a call: by the need's own shapes."""
    entry = {"op": "hc_prenorm_gemm", "shapes": "n=24 k=16384", "low": 1, "high": 256, "prefer": "torch"}
    table = {
        "schema_version": measured.SCHEMA_VERSION,
        "sources": [{"device": "somewhere", "date": "2026-11-25"}],
        "preferences": [entry | {"over": "triton", "ratio": 2.0, "source": 0}],
    }
    (tmp_path / "sm_90.json").write_text(json.dumps(table))
    monkeypatch.setattr(measured, "FOLDER", tmp_path)
    code, out, _ = run(capsys, "--model", "flash", "--device", "sm_90", "--json")
    assert code == 0
    needs = json.loads(out)["devices"][0]["needs"]
    by_role = {need["role"]: need["selected"] for need in needs if need["op"] == "hc_prenorm_gemm"}
    assert {role for role, name in by_role.items() if name == "torch"} == {"hyper-connections, decode"}
    assert len(by_role) == 6


def test_what_nothing_serves(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DSV4_BACKENDS_PIN", "mqa_logits=triton")
    code, out, _ = run(capsys, "--model", "pro", "--device", "cpu")
    assert code == 1
    (row,) = (line for line in out.splitlines() if line.startswith("mqa_logits "))
    assert row.rstrip().endswith("none")
    assert "mqa_logits: triton: runs on an NVIDIA GPU, this is CPU" in out
    assert "NOT SERVED: 1 of 14" in out


def test_a_model_of_one_kind_of_layer() -> None:
    window = Model(**{**vars(FLASH), "compress_ratios": (0, 0)})
    ops = {need.op for need in check.needs(window.rank(1), Limits(4096, 1, 4096), machine.CPU)}
    assert ops == set(OPS) - {"mqa_logits", "paged_mqa_logits"}


def config(**change: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "model_type": "deepseek_v4",
        "num_hidden_layers": 3,
        "compress_ratios": [0, 4, 128],
        "hidden_size": 512,
        "num_attention_heads": 8,
        "o_groups": 2,
        "o_lora_rank": 128,
        "index_n_heads": 32,
        "index_head_dim": 128,
        "index_topk": 512,
        "sliding_window": 128,
        "hc_mult": 4,
        "max_position_embeddings": 8192,
        "head_dim": 512,
    }
    return base | change


def test_a_folder_with_a_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DSV4_BACKENDS_DENY", "triton")
    (tmp_path / "config.json").write_text(json.dumps(config()))
    code, out, _ = run(capsys, "--model", str(tmp_path), "--tp", "2", "--device", "sm_90")
    assert code == 0
    assert "4 heads, 1 output group and 32 index heads on a rank; contexts up to 8192 tokens, 256 sequences" in out
    assert "warning: only the reference serves 16 of 16, which is slow" in out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[]", "expected a JSON object"),
        (json.dumps({"model_type": "llama"}), "model_type: expected 'deepseek_v4', got 'llama'"),
        (json.dumps(config(model_type="deepseek_v41")), "got 'deepseek_v41'"),
        (json.dumps(config(o_groups=0)), "o_groups: expected a positive integer, got 0"),
        (json.dumps(config(head_dim=576)), "head_dim: the ops are defined for 512, got 576"),
    ],
)
def test_a_wrong_config(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    code, out, err = run(capsys, "--model", str(path))
    assert (code, out) == (2, "")
    assert words in err
    assert str(path) in err


def test_wrong_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "--model", str(tmp_path / "nothing"))
    assert code == 2
    assert "nothing" in err
    code, _, err = run(capsys, "--model", "flash", "--max-model-len", "2000000", "--device", "cpu")
    assert code == 1
    assert "has 1048576 positions, got 2000000" in err
    for flag in ("--tp", "--max-num-seqs", "--max-model-len"):
        with pytest.raises(SystemExit) as caught:
            cli.main(["check", "--model", "flash", flag, "0"])
        assert caught.value.code == 2
