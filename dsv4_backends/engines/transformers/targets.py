"""What is replaced in transformers: parts of a model, in each model that ``enable`` is called for."""

from __future__ import annotations

from ..base import Engine
from ..patching import Target
from .sources import TESTED, unknown

_MODELING = "transformers.models.deepseek_v4.modeling_deepseek_v4"

TARGETS = (
    Target(_MODELING, "DeepseekV4Attention", "sparse_mla_prefill", "attention"),
    Target(_MODELING, "DeepseekV4Attention", "sparse_mla_decode", "attention of a few tokens over a packed cache"),
    Target(_MODELING, "DeepseekV4HCACompressor", "", "which compressed keys a query sees, ratio 128"),
    Target(_MODELING, "DeepseekV4CSACompressor", "", "which compressed keys a query sees, ratio 4"),
    Target(_MODELING, "DeepseekV4Indexer", "mqa_logits", "indexer"),
    Target(_MODELING, "DeepseekV4Indexer", "paged_mqa_logits", "indexer of a few tokens over a packed cache"),
    Target(_MODELING, "DeepseekV4HyperConnection", "hc_prenorm_gemm", "hyper-connections"),
    Target(_MODELING, "DeepseekV4HyperHead", "hc_prenorm_gemm", "the hyper-connections' head"),
    Target(_MODELING, "DeepseekV4GroupedLinear", "fp8_einsum", "output projection"),
)

ENGINE = Engine(
    name="transformers",
    targets=TARGETS,
    requirement=f"transformers=={TESTED}",
    gate=unknown,
    switch="call dsv4_backends.engines.transformers.enable(model) for each model",
)
