"""What is replaced in vLLM: each name, what it is to vLLM, the op behind it, and what stands there instead."""

from __future__ import annotations

from ..patching import Target

DEEP_GEMM = "vllm.utils.deep_gemm"
FLASH_MLA = "vllm.models.deepseek_v4.nvidia.flashmla"

_OUR_DEEP_GEMM = "dsv4_backends.compat.deep_gemm"
_OUR_FLASH_MLA = "dsv4_backends.compat.flash_mla"
_METADATA = ("context_lens", "block_size", "num_sms", "indices")
_LOGITS = ("q", "kv", "weights", "cu_seqlen_ks", "cu_seqlen_ke")
_PAGED = ("q", "kv_cache", "weights", "context_lens", "block_tables", "schedule_metadata", "max_model_len")


def _slot(
    attribute: str, ours: str, op: str, about: str, caller: str, *signatures: tuple[str, ...], goes_with: str = ""
) -> Target:
    """One of the names that vLLM keeps DeepGEMM's functions under."""
    return Target(DEEP_GEMM, attribute, op, about, f"{_OUR_DEEP_GEMM}:{ours}", goes_with, caller, signatures)


def _is_there(module: str) -> Target:
    ours = "dsv4_backends.engines.vllm.rules:has_deep_gemm"
    about = "whether there are indexer kernels"
    return Target(module, "has_deep_gemm", "", about, ours, "_fp8_fp4_paged_mqa_logits_impl")


# An empty schedule of ours must never reach a kernel of vLLM's own: it goes with the kernel.
TARGETS = (
    _slot("_fp8_einsum_impl", "fp8_einsum", "fp8_einsum", "output projection", "fp8_einsum", ("args", "kwargs")),
    _slot(
        "_fp8_fp4_mqa_logits_impl",
        "fp8_fp4_mqa_logits",
        "mqa_logits",
        "indexer, prefill",
        "fp8_fp4_mqa_logits",
        (*_LOGITS, "max_seqlen_k"),
        (*_LOGITS, "clean_logits"),
    ),
    _slot(
        "_fp8_fp4_paged_mqa_logits_impl",
        "fp8_fp4_paged_mqa_logits",
        "paged_mqa_logits",
        "indexer, decode",
        "fp8_fp4_paged_mqa_logits",
        (*_PAGED, "indices"),
        (*_PAGED, "clean_logits", "indices"),
    ),
    _slot(
        "_get_paged_mqa_logits_metadata_impl",
        "get_paged_mqa_logits_metadata",
        "paged_mqa_logits",
        "its schedule",
        "get_paged_mqa_logits_metadata",
        _METADATA,
        goes_with="_fp8_fp4_paged_mqa_logits_impl",
    ),
    _slot(
        "_tf32_hc_prenorm_gemm_impl",
        "tf32_hc_prenorm_gemm",
        "hc_prenorm_gemm",
        "hyper-connections",
        "tf32_hc_prenorm_gemm",
        ("x", "fn", "out", "sqrsum", "num_split"),
    ),
    Target(
        FLASH_MLA,
        "flash_mla_with_kvcache",
        "sparse_mla_decode",
        "attention, decode",
        f"{_OUR_FLASH_MLA}:flash_mla_with_kvcache",
    ),
    Target(
        FLASH_MLA,
        "flash_mla_sparse_fwd",
        "sparse_mla_prefill",
        "attention, prefill",
        f"{_OUR_FLASH_MLA}:flash_mla_sparse_fwd",
    ),
    Target(
        "vllm.v1.attention.backends.mla.sparse_swa",
        "get_mla_metadata",
        "",
        "attention's schedule",
        f"{_OUR_FLASH_MLA}:get_mla_metadata",
        "flash_mla_with_kvcache",
    ),
    _is_there("vllm.v1.attention.backends.mla.indexer"),
    _is_there("vllm.model_executor.layers.sparse_attn_indexer"),
)
