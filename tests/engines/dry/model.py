"""A DeepSeek V4 small enough for a CPU, with every kind of layer: window, ratio 4 and ratio 128."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RATIOS = (0, 4, 128)
CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "torch_dtype": "bfloat16",
    "vocab_size": 512,
    "hidden_size": 1024,
    "moe_intermediate_size": 256,
    "num_hidden_layers": len(RATIOS),
    "num_attention_heads": 16,
    "num_key_value_heads": 1,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 512,
    "o_lora_rank": 256,
    "o_groups": 2,
    "num_experts_per_tok": 6,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "topk_method": "noaux_tc",
    "max_position_embeddings": 8192,
    "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
    "compress_ratios": list(RATIOS),
    "rope_scaling": {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "num_hash_layers": 1,
    "swiglu_limit": 10.0,
    "sliding_window": 128,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "num_nextn_predict_layers": 0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "initializer_range": 0.02,
}
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0"}


def write(folder: Path, experts: str) -> None:
    """``config.json`` of the model with experts in ``"fp4"``, in ``"fp8"``, or all of it in ``"bf16"``."""
    quantised = {"expert_dtype": experts, "quantization_config": {**FP8, "weight_block_size": [128, 128]}}
    config = CONFIG if experts == "bf16" else CONFIG | quantised
    (folder / "config.json").write_text(json.dumps(config, indent=1))
