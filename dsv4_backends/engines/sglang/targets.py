"""What is replaced in SGLang: each name, its role in SGLang, its op, and what replaces it.

Most of SGLang's V4 code imports ``deep_gemm`` inside the functions that call it, so our module is put behind that
import (``Target.within``). SGLang calls FlashMLA through one module of its own, whose functions are replaced.
"""

from __future__ import annotations

from ..patching import Target

ENVIRON = "sglang.srt.environ"
INTERFACE = "sglang.kernels.ops.attention.flash_mla_interface"
DEEP_GEMM = "deep_gemm"
FLASH_MLA = "flash_mla"
OFF: dict[str, str] = {
    "SGLANG_OPT_USE_TOPK_V2": "off: this top-k uses clusters, which 9.0 has first",
    "SGLANG_OPT_USE_TILELANG_MHC_PRE": "off, as SGLang itself sets it on 12.x: hyper-connections",
    "SGLANG_OPT_USE_JIT_INDEXER_METADATA": "off: a kernel for a schedule that nothing reads",
}
"""The settings of SGLang whose default becomes off below 9.0, and why. The user's value takes precedence."""

_OURS = "dsv4_backends.engines.sglang"
_LACKING = ("<9.0",)
_INDEXER = "sglang.srt.layers.attention.dsv4.indexer"
_BACKEND = "sglang.srt.layers.attention.deepseek_v4_backend"
_MHC = "sglang.kernels.ops.layernorm.mhc"
_MARLIN = "sglang.srt.layers.quantization.mxfp4_marlin_moe"
_WRAPPER = "sglang.srt.layers.deep_gemm_wrapper.entrypoint"
_MODEL = "sglang.srt.models.deepseek_v4"
_SCHEDULE = ("cache_seqlens", "num_q_tokens_per_head_k", "num_heads_k", "num_heads_q", "is_fp8_kvcache", "topk")
_SPARSE = ("q", "kv", "indices", "sm_scale", "d_v", "attn_sink", "topk_length", "use_legacy")
_DECODE = (
    *("q", "k_cache", "block_table", "cache_seqlens", "head_dim_v", "tile_scheduler_metadata", "num_splits"),
    *("softmax_scale", "causal", "descale_q", "descale_k", "is_fp8_kvcache", "indices", "attn_sink", "extra_k_cache"),
    *("extra_indices_in_kvcache", "topk_length", "extra_topk_length", "kv_format", "use_legacy"),
)
_INDEX = (
    *("self", "x", "q_lora", "c4_indexer", "forward_batch", "alt_streams", "enable_multi_stream", "q_lora_ready"),
    *("skip_compressor", "q_lora_quant"),
)
_POST_PRE = (
    *("x", "residual", "post_layer_mix", "comb_res_mix", "fn", "hc_scale", "hc_base", "rms_eps", "hc_pre_eps"),
    *("hc_sinkhorn_eps", "hc_post_mult_value", "sinkhorn_repeat", "n_splits", "tile_n", "norm_weight", "norm_eps"),
)


def _library(
    attribute: str, op: str, about: str, within: str, caller: str, signature: tuple[str, ...], goes_with: str = ""
) -> Target:
    """A function of DeepGEMM, which SGLang imports inside its caller."""
    ours = f"dsv4_backends.compat.deep_gemm:{attribute}"
    return Target(DEEP_GEMM, attribute, op, about, ours, goes_with, caller, (signature,), within=within)


def _flash_mla(attribute: str, op: str, about: str, signature: tuple[str, ...], goes_with: str = "") -> Target:
    """A function of SGLang's module around FlashMLA."""
    return Target(INTERFACE, attribute, op, about, f"{_OURS}.calls:{attribute}", goes_with, attribute, (signature,))


def _off(setting: str, about: str) -> Target:
    return Target(ENVIRON, f"Envs.{setting}", "", about, lacking=_LACKING)


TARGETS = (
    _library(
        "fp8_paged_mqa_logits",
        "paged_mqa_logits",
        "indexer, decode",
        _INDEXER,
        "C4IndexerBackendMixin.forward_c4_indexer",
        _INDEX,
    ),
    _library(
        "get_paged_mqa_logits_metadata",
        "",
        "indexer's schedule",
        "sglang.srt.layers.attention.dsv4.metadata",
        "PagedIndexerMetadata.__post_init__",
        ("self",),
        goes_with="fp8_paged_mqa_logits",
    ),
    _library(
        "fp8_mqa_logits",
        "mqa_logits",
        "indexer, prefill of one long request",
        _INDEXER,
        "C4IndexerBackendMixin._nonpaged_mqa_logits",
        ("q_indexer", "weights", "kv", "plan", "rows"),
    ),
    _library(
        "fp8_einsum",
        "fp8_einsum",
        "output projection, with SGLANG_OPT_FP8_WO_A_GEMM",
        _MODEL,
        "_fp8_wo_a_einsum",
        ("o_fp8", "o_s", "weight", "weight_scale", "recipe", "out"),
    ),
    _library(
        "tf32_hc_prenorm_gemm",
        "hc_prenorm_gemm",
        "hyper-connections after a layer",
        _MHC,
        "mhc_fused_post_pre",
        _POST_PRE,
    ),
    Target(
        _WRAPPER,
        "tf32_hc_prenorm_gemm",
        "hc_prenorm_gemm",
        "hyper-connections",
        f"{_OURS}.calls:tf32_hc_prenorm_gemm",
        caller="tf32_hc_prenorm_gemm",
        signatures=(("x", "fn", "out", "sqrsum", "num_splits"),),
    ),
    Target(
        _MHC,
        "_use_deep_gemm_hc_prenorm",
        "",
        "whether the hyper-connections call DeepGEMM",
        f"{_OURS}.calls:product_is_ours",
        goes_with="tf32_hc_prenorm_gemm",
        caller="_use_deep_gemm_hc_prenorm",
        signatures=((),),
        lacking=_LACKING,
        without=DEEP_GEMM,
    ),
    Target(
        FLASH_MLA,
        "flash_mla_with_kvcache",
        "sparse_mla_decode",
        "attention, without the FlashMLA wheel",
        "dsv4_backends.compat.flash_mla:flash_mla_with_kvcache",
        caller="flash_mla_with_kvcache",
        signatures=(_DECODE,),
        without=FLASH_MLA,
        within=INTERFACE,
    ),
    _flash_mla("flash_mla_with_kvcache", "sparse_mla_decode", "attention, decode", _DECODE),
    _flash_mla("flash_mla_sparse_fwd", "sparse_mla_prefill", "attention, prefill", _SPARSE),
    _flash_mla("get_mla_metadata", "", "attention's schedule", _SCHEDULE, goes_with="flash_mla_with_kvcache"),
    Target(
        _BACKEND,
        "dequantize_k_cache_paged_dsv4",
        "gather_dequant_kv",
        "attention, keys of a prefill chunk",
        f"{_OURS}.calls:dequantize_k_cache_paged_dsv4",
        lacking=_LACKING,
    ),
    Target(
        _MARLIN,
        "get_platform",
        "",
        "experts in MXFP4: allows Marlin",
        f"{_OURS}.calls:platform_with_marlin",
        around=True,
        caller="Mxfp4MarlinMoEMethod.process_weights_after_loading",
        signatures=(("self", "layer"),),
        lacking=_LACKING,
    ),
    *(_off(setting, about) for setting, about in OFF.items()),
    Target(
        ENVIRON,
        "Envs.SGLANG_ENABLE_JIT_DEEPGEMM",
        "",
        "off: the linear layers' GEMMs, which would call DeepGEMM",
        without=DEEP_GEMM,
    ),
)
