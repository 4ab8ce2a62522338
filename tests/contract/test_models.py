from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsv4_backends.contract import CONTRACTS
from dsv4_backends.contract.config import from_config
from dsv4_backends.contract.models import FLASH, MODELS, PRO, Model

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "head_dim": 512,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "sliding_window": 128,
    "hc_mult": 4,
    "max_position_embeddings": 1048576,
    "num_nextn_predict_layers": 1,
    "vocab_size": 129280,
    "q_lora_rank": 1024,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 2048,
    "num_hash_layers": 3,
    "expert_dtype": "fp4",
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],  # the last is the MTP layer's
}


def test_released_dimensions() -> None:
    assert (len(FLASH.compress_ratios), len(PRO.compress_ratios)) == (43, 61)
    assert [FLASH.compress_ratios.count(r) for r in (0, 4, 128)] == [2, 21, 20]
    assert [PRO.compress_ratios.count(r) for r in (0, 4, 128)] == [0, 30, 31]
    assert (FLASH.rank(1).hc_k, PRO.rank(1).hc_k, FLASH.rank(1).hc_n) == (16384, 28672, 24)
    assert FLASH.rank(1).o_in == PRO.rank(1).o_in == 4096
    assert (FLASH.rank(1).topk, PRO.rank(1).topk) == (640, 1152)


def test_from_config(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    for source in (CONFIG, path, str(path), tmp_path):
        model = from_config(source)
        assert Model(**{**vars(model), "name": FLASH.name}) == FLASH
    assert from_config("pro") is PRO


def test_from_layer_types() -> None:
    kinds = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
    config = {k: v for k, v in CONFIG.items() if k != "compress_ratios"}
    config["layer_types"] = [kinds[r] for r in FLASH.compress_ratios]
    assert from_config(config).compress_ratios == FLASH.compress_ratios


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type: expected 'deepseek_v4', got 'llama'"),
        ({"hidden_size": None}, "hidden_size: expected a positive integer, got None"),
        ({"o_groups": 0}, "o_groups: expected a positive integer, got 0"),
        ({"head_dim": 128}, "head_dim: expected 512, got 128"),
        ({"compress_ratios": [0] * 5}, "compress_ratios: expected 0, 4 or 128 for each of 43 layers"),
        ({"compress_ratios": [2] * 43}, "compress_ratios: expected 0, 4 or 128"),
        ({"compress_ratios": None}, "expected compress_ratios or layer_types"),
        ({"compress_ratios": None, "layer_types": ["full"] * 43}, "layer_types: expected"),
    ],
)
def test_foreign_configs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_config(CONFIG | change)


def test_files_that_are_no_config(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(OSError, match=r"config\.json"):
        from_config(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        from_config(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object, got list"):
        from_config(path)


@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_ranks(model: Model, tp: int) -> None:
    rank = model.rank(tp)
    assert rank.heads * tp == model.heads
    assert rank.o_groups * tp == model.o_groups
    # The contracts' cases hold this rank's shapes.
    short = model.name.rpartition("-")[2].lower()
    for op in ("sparse_mla_prefill", "sparse_mla_decode"):
        assert any(c.name.startswith(f"{short} tp{tp}") and c.params["h_q"] == rank.heads for c in CONTRACTS[op].cases)
    assert any(
        c.params["h"] == rank.o_groups and c.params["r"] == 4096 and c.name.startswith(f"{short} tp{tp}")
        for c in CONTRACTS["fp8_einsum"].cases
    )


@pytest.mark.parametrize(
    ("tp", "what"),
    [(3, "64 attention heads"), (64 * 8 + 4, "attention heads"), (12, "attention heads"), (0, "at least 1")],
)
def test_ranks_that_do_not_divide(tp: int, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        FLASH.rank(tp)


def test_more_ranks_than_groups() -> None:
    """Each rank has one group with its heads, and several have the same."""
    for tp in (16, 32):
        rank = FLASH.rank(tp)
        assert (rank.replicas, rank.heads, rank.o_groups, rank.o_in) == (tp // 8, 8, 1, 4096)
    assert FLASH.rank(8).replicas == 1
    odd = Model(**{**vars(FLASH), "heads": 48, "o_groups": 6})
    with pytest.raises(ValueError, match="6 output groups cannot be divided over tensor parallel size 4"):
        odd.rank(4)


def test_groups_that_do_not_divide_the_heads() -> None:
    with pytest.raises(ValueError, match="64 heads cannot be divided into 3 output groups"):
        Model(**{**vars(FLASH), "o_groups": 3})
    with pytest.raises(ValueError, match="o_groups: expected a divisor of 64 attention heads, got 3"):
        from_config(CONFIG | {"o_groups": 3})
