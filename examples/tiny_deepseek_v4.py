"""A tiny DeepSeek V4 of transformers: every kind of layer, hash and learned routing, the heads of the real one."""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.deepseek_v4 import DeepseekV4Config, DeepseekV4ForCausalLM

VOCABULARY = 64


def config(**changes: Any) -> DeepseekV4Config:
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 4,
        "compress_ratios": [0, 4, 128, 4],
        "num_hash_layers": 1,
        "num_attention_heads": 4,
        "q_lora_rank": 32,
        "o_groups": 2,
        "o_lora_rank": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "index_n_heads": 32,  # with few, scores of exactly 0 tie
        "index_topk": 16,
        "initializer_range": 0.2,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 16.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 65536,
        },
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return DeepseekV4Config(**values | changes)


def tiny(dtype: torch.dtype = torch.float32, **changes: Any) -> DeepseekV4ForCausalLM:
    """The model with weights drawn from a fixed seed; nothing that a layer adds or scales by is left at 0 or 1."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DeepseekV4ForCausalLM(config(**changes)).eval()
        for name, parameter in model.named_parameters():
            if name.endswith(("sinks", "position_bias", "base")):
                parameter.data.normal_()
            elif name.endswith("norm.weight"):
                parameter.data.uniform_(0.5, 1.5)
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):
                buffer.random_(0, model.config.n_routed_experts)
            elif name.endswith("e_score_correction_bias"):
                buffer.normal_()
    return model.to(dtype)


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
