"""A ``config.json``: found, read, and judged field by field."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsv4_backends.contract import config
from dsv4_backends.contract.models import FLASH, PRO, Model

FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}
RELEASED: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
    "compress_rope_theta": 160000,
    "eos_token_id": 1,
    "expert_dtype": "fp4",
    "hc_eps": 1e-6,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 512,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 512,
    "initializer_range": 0.02,
    "max_position_embeddings": 1048576,
    "model_type": "deepseek_v4",
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "num_hidden_layers": 43,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "q_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "quantization_config": FP8,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 16, "type": "yarn"},
    "rope_theta": 10000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1",
    "use_cache": True,
    "vocab_size": 129280,
}
"""Every field that a released checkpoint has."""


def without(*keys: str, **change: Any) -> dict[str, Any]:
    return {key: value for key, value in RELEASED.items() if key not in keys} | change


def write(path: Path, found: Any = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(RELEASED if found is None else found))
    return path


def same(found: config.Configuration, name: str) -> bool:
    return Model(**{**vars(found.model), "name": name}) == FLASH


def test_a_released_one() -> None:
    """No field is unsupported or unknown, and the dimensions are the built-in ones."""
    found = config.read(RELEASED)
    assert (found.unsupported, found.notes) == ((), ())
    assert same(found, FLASH.name)
    # As Hugging Face transformers writes it.
    kinds = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
    rates = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
    rope = {"partial_rotary_factor": 0.125, "rope_type": "default"}
    written = without(
        "compress_ratios",
        "num_hash_layers",
        layer_types=[kinds[ratio] for ratio in FLASH.compress_ratios],
        mlp_layer_types=["hash_moe"] * 3 + ["moe"] * 40,
        compress_rates=rates,
        rope_parameters={"main": rope, "compress": rope},
        partial_rotary_factor=0.125,
        dtype="bfloat16",
    )
    found = config.read(written)
    assert (found.unsupported, found.notes) == ((), ())
    assert found.model.compress_ratios == FLASH.compress_ratios


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head_dim": 576}, "head_dim: expected 512, got 576"),
        ({"qk_rope_head_dim": 128}, "qk_rope_head_dim: expected 64, got 128"),
        ({"qk_nope_head_dim": 128}, "qk_nope_head_dim: expected 448, got 128"),
        ({"v_head_dim": 128}, "v_head_dim: expected 512, got 128"),
        ({"num_key_value_heads": 8}, "num_key_value_heads: expected 1, got 8"),
        ({"num_key_value_heads": True}, "num_key_value_heads: expected 1, got True"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor: expected 0.125, got 0.25"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.25}},
            "rope_parameters.partial_rotary_factor: expected 0.125, got 0.25",
        ),
        (
            {"rope_parameters": {"compress": {"partial_rotary_factor": 1.0}}},
            "rope_parameters.compress.partial_rotary_factor: expected 0.125, got 1.0",
        ),
        (
            {"compress_rates": {"compressed_sparse_attention": 8, "heavily_compressed_attention": 64}},
            "compress_rates.heavily_compressed_attention: expected 128, got 64",
        ),
        ({"compress_rates": {"sliding_attention": 16}}, "compress_rates.sliding_attention: expected 0 or 1, got 16"),
        ({"compress_rates": {"csa": 8, "hca": 64}}, "compress_rates.csa: unknown key"),
        ({"quantization_config": FP8 | {"quant_algo": "NVFP4"}}, "quantization_config.quant_algo: expected 'FP8'"),
        (
            {"quantization_config": FP8 | {"config_groups": {"group_0": {"weights": {"num_bits": 4}}}}},
            "quantization_config.config_groups.group_0.weights.num_bits: expected 8, got 4",
        ),
        (
            {"quantization_config": FP8 | {"config_groups": ["4"]}},
            "quantization_config.config_groups: expected nothing",
        ),
        ({"compress_rate_csa": 8}, "compress_rate_csa: expected 4, got 8"),
        ({"compress_rate_hca": "128"}, "compress_rate_hca: expected 128, got '128'"),
        ({"compress_ratios": [0, 2, 1] * 15}, "compress_ratios: expected 0, 4 or 128, got 1 in layer 2"),
        (
            {"layer_types": ["sliding_attention"] * 43},
            "layer_types: expected what compress_ratios says, ratio 4, got 'sliding_attention' in layer 2",
        ),
        ({"architectures": ["DeepseekV41ForCausalLM"]}, "architectures: expected 'DeepseekV4ForCausalLM', got"),
        ({"architectures": ["LlamaForCausalLM"]}, "architectures: expected 'DeepseekV4ForCausalLM', got"),
        ({"kv_source_layer_ids": [2, 8]}, "kv_source_layer_ids: a field of V4.1"),
        ({"index_source_layer_ids": [2]}, "index_source_layer_ids: a field of V4.1"),
        ({"candidate_topk_blocks": 2048}, "candidate_topk_blocks: a field of V4.1"),
        ({"engram_layer_ids": [1, 14]}, "engram_layer_ids: a field of V4.1"),
        ({"torch_dtype": "float16"}, "torch_dtype: expected 'bfloat16' or 'auto', got 'float16'"),
        ({"dtype": "float32"}, "dtype: expected 'bfloat16' or 'auto', got 'float32'"),
        (
            {"quantization_config": FP8 | {"weight_block_size": [64, 64]}},
            "quantization_config.weight_block_size: expected [128, 128], got [64, 64]",
        ),
        (
            {"quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}},
            "quantization_config.activation_scheme: expected 'dynamic', got 'static'",
        ),
        ({"quantization_config": FP8 | {"fmt": "e5m2"}}, "quantization_config.fmt: expected 'e4m3'"),
        ({"quantization_config": FP8 | {"scale_fmt": "e4m3"}}, "quantization_config.scale_fmt: expected 'ue8m0'"),
        ({"quantization_config": FP8 | {"kv_cache_scheme": {"num_bits": 4}}}, "kv_cache_scheme: expected nothing, got"),
        (
            {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
            "quantization_config.quant_method: expected 'fp8', got 'modelopt': NVFP4; fp8_einsum takes e4m3",
        ),
        (
            {"quantization_config": {"quant_method": "awq", "bits": 4}},
            "quant_method: expected 'fp8', got 'awq': 4; fp8",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method: expected 'fp8', got 'gptq'"),
        ({"quantization_config": {}}, "quant_method: expected 'fp8', got None"),
        (
            {"quantization_config": None, "compression_config": {"quant_method": "compressed-tensors"}},
            "compression_config.quant_method: expected 'fp8', got 'compressed-tensors'",
        ),
    ],
)
def test_what_the_ops_are_not_defined_for(change: dict[str, Any], words: str) -> None:
    found = config.read(RELEASED | change)
    assert words in "; ".join(found.unsupported)
    with pytest.raises(ValueError, match=r"config\.json: "):
        config.from_config(RELEASED | change)


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"index_topk_freq": 4, "zeta": {}}, "not looked at: index_topk_freq, zeta"),
        ({"quantization_config": FP8 | {"lm_head": True}}, "not looked at: quantization_config.lm_head"),
        ({"quantization_config": None}, "no quantization_config: fp8_einsum takes FP8 weights"),
        (
            {"quantization_config": FP8 | {"modules_to_not_convert": ["model.layers.0.attn.wo_a"]}},
            "the output projection is not quantised",
        ),
        ({"expert_dtype": "nvfp4"}, "the weights' size is unknown: expert_dtype: unknown value 'nvfp4'"),
        ({"n_routed_experts": None}, "the weights' size is unknown: the configuration has no n_routed_experts"),
        ({"num_hidden_layers": 4}, "compress_ratios: 44 entries for 4 layers; the first 4 were read"),
        ({"dspark_block_size": 5}, "check with --next-n 6"),
    ],
)
def test_what_is_said(change: dict[str, Any], note: str) -> None:
    found = config.read(RELEASED | change)
    assert note in "\n".join(found.notes)
    assert not found.unsupported


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": "4096"}, "hidden_size: expected a positive integer, got '4096'"),
        ({"hidden_size": 4096.0}, "hidden_size: expected a positive integer, got 4096.0"),
        ({"hidden_size": float("nan")}, "hidden_size: expected a positive integer, got nan"),
        ({"hidden_size": 2**31}, "expected a positive integer below 2**31, got 2147483648"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers: expected an integer of at least 0, got -1"),
        ({"o_groups": 3}, "o_groups: expected a divisor of 64 attention heads, got 3"),
        ({"window_size": 256}, "window_size: expected sliding_window's 128, got 256"),
        ({"compress_ratios": {"0": 4}}, "compress_ratios: expected a list of integers, got {'0': 4}"),
        ({"compress_ratios": [[0]] * 43}, "compress_ratios: expected a list of integers, got [[0], [0]"),
        ({"compress_ratios": ["4"] * 43}, "compress_ratios: expected a list of integers"),
        ({"compress_ratios": [4] * 42}, "compress_ratios: expected 0, 4 or 128 for each of 43 layers, got 42 entries"),
        ({"compress_rates": [4, 128]}, "compress_rates: expected an object, got [4, 128]"),
        ({"layer_types": "sliding_attention"}, "layer_types: expected a list of strings"),
        ({"layer_types": [[]] * 43}, "layer_types: expected a list of strings"),
        ({"architectures": "DeepseekV4ForCausalLM"}, "architectures: expected a list of strings"),
        ({"quantization_config": ["fp8"]}, "quantization_config: expected an object, got ['fp8']"),
        ({"dspark_block_size": "5"}, "dspark_block_size: expected a positive integer, got '5'"),
        ({"model_type": "deepseek_v41"}, "model_type: expected 'deepseek_v4', got 'deepseek_v41'"),
        ({"model_type": ["deepseek_v4"]}, "model_type: expected 'deepseek_v4', got ['deepseek_v4']"),
    ],
)
def test_what_makes_no_sense(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        config.read(RELEASED | change)


def test_official_names() -> None:
    """DeepSeek's own ``inference/config.json`` has other names; one alias is in use in others' files."""
    with pytest.raises(ValueError, match=r"this is inference/config\.json; give the model's own"):
        config.read({"dim": 4096, "n_layers": 43, "n_heads": 64, "window_size": 128})
    assert config.read(without("sliding_window", window_size=128)).model.window == 128


def test_a_text_model_inside_another() -> None:
    outer = {"model_type": "deepseek_v4_vl", "architectures": ["DeepseekV4VLForConditionalGeneration"]}
    found = config.read(outer | {"text_config": RELEASED, "vision_config": {"depth": 3}})
    assert same(found, FLASH.name)
    assert found.notes == ("text_config: the text model of 'deepseek_v4_vl' was read, and nothing else of it",)
    assert not found.unsupported
    assert config.read({"model_type": "deepseek_v4", "text_config": RELEASED}).model == found.model
    # Its quantisation may stand outside, and a V4.1 is one inside another model, too.
    nested = {"text_config": without("quantization_config"), "quantization_config": {"quant_method": "awq"}}
    assert "got 'awq'" in config.read(outer | nested).unsupported[0]
    later = outer | {"architectures": ["DeepseekV41ForConditionalGeneration"], "text_config": RELEASED}
    assert "DeepseekV41" in config.read(later).unsupported[0]
    with pytest.raises(ValueError, match="model_type: expected 'deepseek_v4', got 'qwen'"):
        config.read(outer | {"text_config": {"model_type": "qwen"}})


def test_quantisation_that_another_file_states(tmp_path: Path) -> None:
    write(tmp_path / "config.json", without("quantization_config"))
    write(tmp_path / "hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}})
    (reason,) = config.read(tmp_path).unsupported
    assert reason.startswith("hf_quant_config.json.quant_method: expected 'fp8', got 'modelopt': NVFP4")


def test_folders_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's id, ``models--*`` and ``snapshots``; what ``refs/main`` names, else the newest."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    name = "deepseek-ai/DeepSeek-V4-Flash"
    with pytest.raises(OSError, match=f"run `hf download {name} config.json`; its dimensions are built in: flash"):
        config.read(name)
    model = tmp_path / "hub" / "models--deepseek-ai--DeepSeek-V4-Flash"
    (model / "snapshots" / "cc").mkdir(parents=True)
    with pytest.raises(OSError, match=r"no snapshot in it has a config\.json"):
        config.read(name)
    blob = write(model / "blobs" / "abc")
    for age, revision in enumerate(("bb", "aa")):
        path = write(model / "snapshots" / revision / "config.json", without(hidden_size=(age + 1) * 512))
        os.utime(path, (1000 - age, 1000 - age))
    for source in (name, model, model / "snapshots", str(model)):
        assert config.read(source).model.hidden == 512
    write(model / "refs" / "main").write_text("aa\n")
    assert config.read(name).model.hidden == 1024
    (model / "refs" / "main").write_text("dd")
    (model / "snapshots" / "dd").mkdir()
    (model / "snapshots" / "dd" / "config.json").symlink_to(blob)
    assert same(config.read(name), FLASH.name)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HOME", "/nowhere")
    assert same(config.read(name), FLASH.name)
    write(tmp_path / name / "config.json", without(hidden_size=256))  # a path comes first
    assert config.read(name).model.hidden == 256


def test_folders_without_one(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"no config\.json in this folder"):
        config.read(tmp_path)
    (tmp_path / "model-Q4_K_M.gguf").touch()
    with pytest.raises(OSError, match=r"no config\.json beside the GGUF files"):
        config.read(tmp_path)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "expected a JSON object, got list"),
        (b"null", "expected a JSON object, got NoneType"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        ("{}".encode("utf-16"), "not UTF-8"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"GGUF\x03\0\0\0\0", "not JSON, but a GGUF file: give the model's config.json"),
        (b"\x40\0\0\0\0\0\0\0{", "not JSON, but a safetensors file"),
        (b"PK\x03\x04....", "not JSON, but a zip archive"),
        (b"{" + b" " * config.MAX_BYTES, "expected a config.json of at most 4194304 bytes, got 4194305"),
    ],
)
def test_files_that_are_none(tmp_path: Path, raw: bytes, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: .*{re.escape(words)}"):
        config.read(path)


def test_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(RELEASED).encode())
    assert same(config.read(path), FLASH.name)


def test_a_large_gguf_is_not_read(tmp_path: Path) -> None:
    """3 GB in 1 GiB of address space beside what the interpreter has."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    os.truncate(path, 3 << 30)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "from dsv4_backends.contract import config\n"
        "try: config.read(sys.argv[1])\n"
        "except ValueError as error: print(error)"
    )
    child = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60, check=True)
    assert "a GGUF file" in child.stdout


def test_what_is_no_regular_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A FIFO without a writer does not block."""
    fifo, loop, folder = tmp_path / "fifo", tmp_path / "loop", tmp_path / "folder"
    os.mkfifo(fifo)
    loop.symlink_to(loop)
    (folder / "config.json").mkdir(parents=True)
    code = "import sys; from dsv4_backends.contract import config; config.read(sys.argv[1])"
    child = subprocess.run([sys.executable, "-c", code, fifo], capture_output=True, text=True, timeout=60, check=False)
    assert "expected a regular file" in child.stderr
    for path in ("/dev/zero", folder):
        with pytest.raises(ValueError, match="expected a regular file"):
            config.read(path)
    monkeypatch.chdir(tmp_path)  # the name of a socket has to be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        with pytest.raises(OSError, match="socket"):
            config.read("socket")
    with pytest.raises(OSError, match="loop"):
        config.read(loop)


@pytest.mark.parametrize("source", ["", "a\0b", "~nobody-of-this-name/x", "x" * 5000, "a/b/c"])
def test_no_path(source: str) -> None:
    with pytest.raises((ValueError, OSError)):
        config.read(source)


def test_built_in() -> None:
    with pytest.raises(OSError, match="FLASH: no such file or folder; flash and pro are built in"):
        config.read("FLASH")
    for name, model in (("flash", FLASH), ("pro", PRO)):
        assert config.read(name) == config.Configuration(model)


ODD: tuple[Any, ...] = (
    None, True, 0, -1, 1, 7, 2**40, 10**5000, 0.5, float("nan"), "", "x", "4", "\n", "\ud800", [], [1], ["x"],
    [[]], [None], [True], {}, {"x": 1}, {"quant_method": "fp8"}, {"quant_method": {}}, {"main": 3}, [{}] * 44,
)  # fmt: skip


@pytest.mark.parametrize("key", [*RELEASED, "text_config", "layer_types", "compress_rates", "rope_parameters", "dtype"])
def test_no_value_of_a_field_is_an_internal_error(key: str) -> None:
    """Any content of a file is read, or raises a ``ValueError`` of one line that names the file."""
    for value in ODD:
        try:
            found = config.read(RELEASED | {key: value})
        except ValueError as error:
            words = str(error)
            assert words.startswith("config.json: ")
        else:
            words = "".join((*found.unsupported, *found.notes))
        assert words.encode(errors="surrogatepass").decode(errors="replace").isprintable(), (value, words)
        assert len(words) < 1000


@pytest.mark.parametrize(
    ("text", "ident"),
    [
        ("https://huggingface.co/deepseek-ai/DeepSeek-V4-Flash", "deepseek-ai/DeepSeek-V4-Flash"),
        ("https://huggingface.co/a/b/tree/main", "a/b"),
        ("hf://a/b@main", "a/b"),
        ("a/b@main", "a/b"),
    ],
)
def test_an_address_is_refused_with_what_an_id_is(text: str, ident: str) -> None:
    with pytest.raises(
        FileNotFoundError, match=f"like org/name: run `hf download {ident} config.json` and give {ident},"
    ):
        config.read(text)


def test_other_addresses() -> None:
    with pytest.raises(FileNotFoundError, match=r"not a path: download the model's config\.json"):
        config.read("s3://bucket/a/config.json")
