"""``check``: the calls that serving a model makes, and the provider of each."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from installed import provider
from packaging.version import Version

from dsv4_backends import OPS, Limits, ops, records
from dsv4_backends.commands import cli
from dsv4_backends.contract import CONTRACTS
from dsv4_backends.contract.models import FLASH, PRO, Model
from dsv4_backends.runtime import check, memory
from dsv4_backends.selection import machine
from dsv4_backends.selection import preferences as measured

SMS = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121"]
REFUSING = provider(
    {
        op: {"target": f"acme_kernels:{op}", "refuses": f"acme_kernels:refuses_{op}"}
        for op in ("sparse_mla_decode", "hc_prenorm_gemm")
    }
)
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
    for sm in SMS:
        for deny, server in (("", "triton"), ("triton", "torch")):
            monkeypatch.setenv("DSV4_BACKENDS_DENY", deny)
            code, out, _ = run(capsys, "--model", name, "--tp", str(tp), "--device", sm, "--json")
            data = json.loads(out)
            assert code == 0
            assert data["ok"]
            ranks = min(tp, model.o_groups)  # more of them have the same
            rank = {"heads": model.heads // ranks, "o_groups": model.o_groups // ranks, "index_heads": 64}
            assert data["rank"] == rank | {"replicas": tp // ranks}
            (device,) = data["devices"]
            assert {need["op"] for need in device["needs"]} == set(OPS)
            assert {need["selected"] for need in device["needs"]} == {server}
            assert device["uncovered"] == 0
            assert device["reference"] == (len(device["needs"]) if server == "torch" else 0)


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


def test_shapes_are_asked_about(fake_plugin: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    """A provider that refuses a rank's shapes does not serve, with its reason; one whose `refuses` cannot run does."""
    fake_plugin("acme", REFUSING, files={"acme_kernels.py": KERNELS})
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
    """By the shapes of the need, as for a call."""
    entry = measured.Entry("hc_prenorm_gemm", "n=24 k=16384", 1, 256, "torch", "triton", ratio=2.0, source=0)
    source = measured.Source("somewhere", "2026-11-25", "measure it", {})
    table = measured.Table(measured.SCHEMA_VERSION, "9.0", "by hand", (source,), (entry,))
    records.write(table, tmp_path / "sm_90.json")
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
    assert "mqa_logits: triton: runs on an NVIDIA GPU, this is the CPU" in out
    assert re.search(r"NOT SERVED: 1 of \d+", out)


def test_a_model_of_one_kind_of_layer() -> None:
    window = Model(**{**vars(FLASH), "compress_ratios": (0, 0)})
    ops = {need.op for need in check.needs(window.rank(1), Limits(4096, 1, 4096), machine.CPU)}
    without = {"mqa_logits", "paged_mqa_logits", "indexer_topk", "paged_indexer_topk"}
    without |= {"indexer_q_rope_quant", "indexer_compress_insert"}
    assert ops == set(OPS) - without - {"compress_norm_rope_insert"}


def config(**change: Any) -> dict[str, Any]:
    """A small one that has every field that the ops and the memory depend on."""
    base: dict[str, Any] = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "num_hidden_layers": 3,
        "num_nextn_predict_layers": 1,
        "compress_ratios": [0, 4, 128, 0],
        "hidden_size": 512,
        "num_attention_heads": 8,
        "o_groups": 2,
        "o_lora_rank": 128,
        "q_lora_rank": 64,
        "index_n_heads": 32,
        "index_head_dim": 128,
        "index_topk": 512,
        "sliding_window": 128,
        "hc_mult": 4,
        "max_position_embeddings": 8192,
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "vocab_size": 1000,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    }
    return base | change


def test_a_folder_with_a_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DSV4_BACKENDS_DENY", "triton")
    (tmp_path / "config.json").write_text(json.dumps(config()))
    code, out, _ = run(capsys, "--model", str(tmp_path), "--tp", "2", "--device", "sm_90")
    assert code == 0
    words = " ".join(out.split())
    assert "4 heads, 1 output group and 32 index heads on a rank; contexts up to 8192 tokens, 256 sequences" in words
    assert re.search(r"warning: only the reference serves (\d+) of \1, which is slow", out)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[]", "expected a JSON object"),
        (json.dumps({"model_type": "llama"}), "model_type: expected 'deepseek_v4', got 'llama'"),
        (json.dumps(config(model_type="deepseek_v41")), "got 'deepseek_v41'"),
        (json.dumps(config(o_groups=0)), "o_groups: expected a positive integer, got 0"),
        (json.dumps(config(o_groups=3)), "o_groups: expected a divisor of 8 attention heads, got 3"),
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
    assert code == 2
    assert "has 1048576 positions, got 2000000" in err
    for command in ("check", "warmup"):
        assert cli.main([command, "--model", "flash", "--tp", "3"]) == 2
        assert "64 attention heads cannot be divided over tensor parallel size 3" in capsys.readouterr().err
    code, _, err = run(capsys, "--model", "flash", "--device", "banana")
    assert (code, err) == (2, "dsv4-backends: device: expected cpu or a GPU such as sm_86 or 8.6, got 'banana'\n")
    for flag in ("--tp", "--max-num-seqs", "--max-model-len", "--next-n"):
        with pytest.raises(SystemExit) as caught:
            cli.main(["check", "--model", "flash", flag, "0"])
        assert caught.value.code == 2
    for size in ("24", "24 gigabytes", "-1GiB", "0GiB", "nanGiB", ""):
        with pytest.raises(SystemExit) as caught:
            cli.main(["check", "--model", "flash", f"--memory={size}"])
        assert caught.value.code == 2
    capsys.readouterr()
    for limits in ({"max_num_seqs": 0}, {"next_n": 0}, {"max_model_len": 0}, {"tp": 0}):
        with pytest.raises(ValueError, match="expected at least 1, got 0"):
            check.check("flash", **limits, device="cpu")


NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"num_attention_heads": 300},
            "NOT SERVED: sparse_mla_decode: argument q: expected 1 to 128 heads, got h_q 300",
        ),
        ({"hidden_size": 2**31 - 1, "hc_mult": 2**31 - 1}, "NOT SERVED: 6 of "),
        ({"qk_rope_head_dim": 128}, "NOT SERVED: qk_rope_head_dim: expected 64, got 128"),
        ({"head_dim": 576}, "NOT SERVED: head_dim: expected 512, got 576"),
        (
            {"quantization_config": NVFP4},
            "NOT SERVED: quantization_config.quant_method: expected 'fp8', got 'modelopt'",
        ),
        ({"architectures": ["DeepseekV41ForCausalLM"]}, "NOT SERVED: architectures: expected"),
        ({"compress_rate_csa": 8}, "NOT SERVED: compress_rate_csa: expected 4, got 8"),
        ({"compress_ratios": [0, 8, 64]}, "NOT SERVED: compress_ratios: expected 0, 4 or 128, got 8 in layer 1"),
    ],
)
def test_what_would_fail_is_not_served(
    change: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fields that the ops are not defined for, and calls that the contract refuses."""
    (tmp_path / "config.json").write_text(json.dumps(config(**change)))
    code, out, _ = run(capsys, "--model", str(tmp_path), "--device", "sm_90")
    assert code == 1
    assert words in " ".join(out.split())
    assert "everything is served" not in out
    code, out, _ = run(capsys, "--model", str(tmp_path), "--device", "sm_90", "--json")
    data = json.loads(out)
    assert (code, data["ok"], data["devices"][0]["ok"]) == (1, False, False)
    assert data["devices"][0]["memory"] is None
    assert data["unsupported"] or data["devices"][0]["refused"]


def test_a_model_without_a_configuration() -> None:
    """Its dimensions are judged as those of a file are."""
    for change, words in (
        ({"head_dim": 256}, "head_dim: expected 512, got 256"),
        ({"compress_ratios": (4, 64)}, "compress_ratios: expected 0, 4 or 128, got 64 in layer 1"),
    ):
        (found,) = check.check(Model(**{**vars(FLASH), **change}), device="sm_90")
        assert not found.ok
        assert words in found.unsupported[0]


def test_a_step_of_fewer_tokens() -> None:
    """An engine that splits the indexer's logits needs less."""
    (found,) = check.check("flash", max_num_batched_tokens=512, device="sm_90")
    assert found.limits.max_tokens == 512
    assert found.memory is not None
    assert found.memory.call < 1.5 * 2**30


def test_what_an_op_returns_of_its_arguments_is_counted_once() -> None:
    needs = check.needs(FLASH.rank(1), Limits(512, 4, FLASH.max_positions), machine.CPU)
    in_place = set()
    for need in needs:
        arguments, held = need.arguments(), CONTRACTS[need.op].traffic.held
        tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        given = sum(v.numel() * v.element_size() for name, v in tensors.items() if name not in held)
        if any(CONTRACTS[need.op].function(**arguments) is value for value in tensors.values()):
            assert memory.call(need.op, arguments) == given
            in_place.add(need.op)
    assert in_place == {op for op, contract in CONTRACTS.items() if contract.in_place}


def test_what_was_not_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config(index_topk_freq=4)))
    code, out, _ = run(capsys, "--model", str(tmp_path), "--device", "sm_90")
    assert code == 0
    assert "note: not looked at: index_topk_freq" in out


@pytest.mark.parametrize("model", ["flash", "pro"])
def test_text_fits(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    for sm in ("cpu", "sm_86", "sm_90"):
        for more in ((), ("--tp", "32", "--next-n", "4", "--memory", "24GiB")):
            _, out, _ = run(capsys, "--model", model, "--device", sm, *more)
            assert max(map(len, out.splitlines())) <= 100


def test_more_ranks_than_groups(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--model", "flash", "--tp", "16", "--device", "sm_90")
    assert code == 0
    assert "8 output groups on 16 ranks: each rank has 1 group and its 8 heads, and 2 ranks have the same" in " ".join(
        out.split()
    )


def test_speculative_decoding(capsys: pytest.CaptureFixture[str]) -> None:
    """Said where it is not counted; counted, with the layers of its own, where it is asked for."""
    _, out, _ = run(capsys, "--model", "pro", "--device", "sm_90")
    assert "the model has 1 speculative (MTP) layer, not counted here" in " ".join(out.split())
    code, out, _ = run(
        capsys, "--model", "pro", "--device", "sm_90", "--next-n", "3", "--max-num-seqs", "4096", "--json"
    )
    data = json.loads(out)
    assert (code, data["next_n"], data["notes"]) == (0, 3, [])
    sizes = {(need["op"], need["role"]): need["sizes"] for need in data["devices"][0]["needs"]}
    assert sizes["sparse_mla_decode", "speculative layers, decode"]["s_q"] == 3
    assert sizes["paged_mqa_logits", "indexer, decode"]["next_n"] == 3
    assert sizes["fp8_einsum", "output projection, prefill"]["b"] == 4096 * 3  # a step of decode has more than a chunk
    (one,), (two,) = (check.check("pro", next_n=next_n, device="sm_90") for next_n in (1, 2))
    assert one.memory is not None
    assert two.memory is not None
    assert 13e9 < (two.memory.weights or 0) - (one.memory.weights or 0) < 15e9  # one of 61 layers


def test_memory(capsys: pytest.CaptureFixture[str]) -> None:
    """Against what is known of the checkpoints and counted by hand."""
    (flash,) = check.check("flash", next_n=2, device="sm_90")
    found = flash.memory
    assert found is not None
    assert found.weights is not None
    assert found.weights == pytest.approx(159.6e9, rel=0.01)
    assert found.call_of == "mqa_logits, indexer, prefill"
    rows, keys = 8192, 262144
    operands = rows * 64 * (128 + 4) + keys * (128 + 4) + 2 * 4 * rows
    assert found.call == 4 * rows * keys + operands  # 8 GiB of logits
    page_4, page_128, page_index = 65 * 576, 3 * 576, 15 * 576  # 64 and 2 tokens of 584 bytes, 64 of 132, padded
    assert found.token == (21 * (page_4 + page_index) + 20 * page_128) / 256
    states = 21 * 2 * 8 * 2 * (512 + 128) * 4 + 20 * 2 * 128 * 512 * 4
    fixed = 44 * 4 * page_4 + states
    assert found.sequence == 4096 * 256 * found.token + fixed
    assert found.sequences == 256 * found.sequence
    assert found.needed == found.weights + found.call + found.sequence
    assert (found.device, found.fits, flash.ok) == (0, None, True)
    (eighth,) = check.check("flash", tp=8, device="sm_90")
    assert eighth.memory is not None
    assert eighth.memory.weights == pytest.approx(20.65e9, rel=0.01)

    code, out, _ = run(capsys, "--model", "pro", "--device", "sm_86", "--memory", "24GiB")
    assert code == 1
    assert "DOES NOT FIT: " in out
    assert "the device has 24.0 GiB" in " ".join(out.split())
    code, out, _ = run(capsys, "--model", "pro", "--device", "sm_86")
    assert code == 0
    assert "unknown; --memory SIZE compares" in out
    assert "whether it fits into the device's memory is not known" in out
    short = ("--max-model-len", "65536", "--tp", "8", "--memory", "80GB", "--json")
    code, out, _ = run(capsys, "--model", "flash", "--device", "sm_90", *short)
    assert code == 0
    told = json.loads(out)["devices"][0]["memory"]
    assert (told["fits"], told["device"]) == (True, 80 * 10**9)
    code, out, _ = run(capsys, "--model", "flash", "--device", "sm_90", *short[:-1])
    assert "it fits: " in out


def test_memory_of_a_device_that_is_known(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each kind of GPU is compared with its own."""
    gpus = tuple(
        machine.Device("cuda", None, name, Version(capability), 100, gib << 30)
        for name, capability, gib in (("large", "9.0", 141), ("small", "8.6", 24))
    )
    monkeypatch.setattr(machine, "probe", lambda: machine.Machine(gpus))
    code, out, _ = run(capsys, "--model", "flash", "--tp", "4", "--json")
    devices = json.loads(out)["devices"]
    assert (code, [one["memory"]["fits"] for one in devices]) == (1, [True, False])


WORKSPACE = provider({"mqa_logits": {"target": "acme_kernels:mqa_logits", "workspace": "acme_kernels:workspace"}})
WORKSPACE_KERNELS = """
def mqa_logits(q, k, k_scale, weights, row_starts, row_ends, *, max_seqlen_k=None, out=None): ...
def workspace(op, arguments, device):
    assert (op, device.type, device.index, arguments["q"].device.type) == ("mqa_logits", "cuda", 0, "meta")
    return 5 << 30 if arguments["q"].shape[0] > 512 else 1 // 0
"""


def test_workspace_of_a_provider_that_states_it(
    fake_plugin: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked on a GPU that is there, not on one that is only named."""
    fake_plugin("acme", WORKSPACE, files={"acme_kernels.py": WORKSPACE_KERNELS})
    (named,) = check.check("flash", device="sm_90")
    gpu = machine.Device("cuda", 0, "a GPU", Version("9.0"), 100, 141 << 30)
    monkeypatch.setattr(machine, "probe", lambda: machine.Machine((gpu,)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (there,) = check.check("flash")
    (broken,) = check.check("flash", max_num_batched_tokens=512, max_num_seqs=1)
    assert named.memory is not None
    assert there.memory is not None
    assert broken.memory is not None
    assert there.memory.call_of == "mqa_logits, indexer, prefill"
    assert there.memory.call == named.memory.call + (5 << 30)
    assert (named.memory.workspace, there.memory.workspace, broken.memory.workspace) == (False, True, False)


def test_weights_that_are_not_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The known part alone may be too large. If it is not, nothing says that the model fits."""
    source = config(moe_intermediate_size=None)
    (ample,) = check.check(source, device="sm_90", memory=10**12)
    (short,) = check.check(source, device="sm_90", memory=10**6)
    assert (ample.fits, short.fits) == (None, False)
    (tmp_path / "config.json").write_text(json.dumps(source))
    _, out, _ = run(capsys, "--model", str(tmp_path), "--device", "sm_90")
    assert "not in the configuration" in out
    assert "at least" in out


def draw_config(rng: random.Random) -> dict[str, Any]:
    """A configuration that looks valid: mostly sizes that go together, now and then one that does not."""
    layers = rng.randint(1, 4)
    groups = rng.choice([1, 1, 2, 3, 4])
    found = config(
        num_hidden_layers=layers,
        num_nextn_predict_layers=rng.choice([0, 1]),
        compress_ratios=[*(rng.choice([0, 4, 128, rng.choice([0, 4, 8])]) for _ in range(layers)), 0],
        hidden_size=rng.choice([64, 100, 256, 512]),
        num_attention_heads=groups * rng.choice([1, 2, 3, 4, 8, 50]),
        o_groups=groups,
        o_lora_rank=rng.choice([32, 100, 128, 256]),
        index_n_heads=rng.choice([1, 3, 8, 64]),
        index_head_dim=rng.choice([16, 64, 100, 128, 128, 128]),
        index_topk=rng.choice([1, 8, 64, 500]),
        sliding_window=rng.choice([1, 16, 100, 128]),
        hc_mult=rng.choice([1, 2, 3, 4]),
        max_position_embeddings=rng.choice([1, 3, 64, 300]),
    )
    odd = {"head_dim": 256, "qk_rope_head_dim": 128, "o_groups": 3, "torch_dtype": "float16", "hc_mult": "4"}
    if rng.random() < 0.2:
        key = rng.choice(list(odd))
        found[key] = odd[key]
    return found


def real(value: Any) -> Any:
    """A tensor without storage as one of zeros, with its strides."""
    if not isinstance(value, torch.Tensor):
        return value
    span = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True)) + 1
    storage = torch.zeros(span * value.element_size(), dtype=torch.uint8).view(value.dtype)
    return storage.as_strided(value.shape, value.stride())


@pytest.mark.parametrize("seed", range(40))
def test_a_yes_is_kept(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The contract accepts, and the reference computes, every call that ``check`` reports as served."""
    monkeypatch.setenv("DSV4_BACKENDS_DENY", "triton")
    rng = random.Random(seed)
    drawn = draw_config(rng)
    tp, next_n = rng.choice([1, 1, 2, 4, 8]), rng.choice([1, 1, 2, 3])
    groups, limits = drawn["o_groups"], {"tp": tp, "max_num_seqs": rng.choice([1, 3]), "next_n": next_n}
    divided = groups % tp == 0 or (tp > groups and tp % groups == 0 and tp <= drawn["num_attention_heads"])
    if drawn["num_attention_heads"] % groups or drawn["hc_mult"] == "4" or not divided:
        with pytest.raises(ValueError, match=r"o_groups: expected|hc_mult: expected|cannot be divided over tensor"):
            check.check(drawn, **limits, device="cpu")
        return
    (found,) = check.check(drawn, **limits, device="cpu")
    expected = (
        drawn["head_dim"] == 512
        and drawn["qk_rope_head_dim"] == 64
        and "torch_dtype" not in drawn
        and set(drawn["compress_ratios"]) <= {0, 4, 128}
        and found.rank.heads <= 128
        and (drawn["index_head_dim"] == 128 or 4 not in drawn["compress_ratios"])
    )
    assert found.ok == expected, (found.unsupported, found.broken)
    if not found.ok:
        assert found.unsupported or found.broken
        return
    for need, _ in found.served:
        arguments = need.arguments()
        CONTRACTS[need.op].check(**arguments)
        if all(value.numel() < 3e7 for value in arguments.values() if isinstance(value, torch.Tensor)):
            made = getattr(ops, need.op)(**{name: real(value) for name, value in arguments.items()})
            first = made[0] if isinstance(made, tuple) else made
            assert first.device.type == "cpu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": None}, "model: expected flash, pro, a path, or a Model, got None"),
        *(({"tp": tp}, f"tp: expected an int, got {tp!r}") for tp in ("4", True, 2.0, None)),
        ({"tp": 0}, "tp: expected at least 1, got 0"),
        ({"tp": 10**12}, "tp: 64 attention heads cannot be divided over tensor parallel size 1000000000000"),
        ({"tp": 128}, "tp: 64 attention heads cannot"),
        ({"tp": 10**5000}, "tp: 64 attention heads cannot"),
        ({"memory": "80GB"}, "memory: expected an int of bytes, got '80GB'"),
        ({"memory": -1}, "memory: expected at least 1, got -1"),
        ({"memory": 2**63}, "memory: expected at most"),
        ({"max_model_len": "1"}, "max-model-len: expected an int, got '1'"),
        ({"max_model_len": 0}, "max-model-len: expected at least 1"),
        ({"max_num_seqs": 2.0}, "max-num-seqs: expected an int, got 2.0"),
        ({"max_num_batched_tokens": 10**30}, "max-num-batched-tokens: expected at most 2147483647"),
        ({"next_n": True}, "next-n: expected an int, got True"),
    ],
)
def test_an_argument_that_makes_no_sense_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check.check(**{"model": "flash", "device": "sm_90"} | arguments)


def test_more_ranks_than_heads_is_usage(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--model", "flash", "--tp", str(10**12), "--device", "sm_90")
    assert (code, out) == (2, "")
    assert "tp: 64 attention heads" in err
