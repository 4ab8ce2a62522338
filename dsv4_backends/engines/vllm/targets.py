"""What is replaced in vLLM: each name, its role in vLLM, its op, and what replaces it."""

from __future__ import annotations

from ..patching import Target

DEEP_GEMM = "vllm.utils.deep_gemm"
FLASH_MLA = "vllm.models.deepseek_v4.nvidia.flashmla"

_OUR_DEEP_GEMM = "dsv4_backends.compat.deep_gemm"
_OUR_FLASH_MLA = "dsv4_backends.compat.flash_mla"
MODEL = "vllm.models.deepseek_v4"
_OURS = "dsv4_backends.engines.vllm"
_LACKING = ("<9.0",)
"""Where vLLM does not support its kernels around attention: on 8.0 and 8.6 they do not compile, on 8.9 not all."""
_METADATA = ("context_lens", "block_size", "num_sms", "indices")
_LOGITS = ("q", "kv", "weights", "cu_seqlen_ks", "cu_seqlen_ke")
_PAGED = ("q", "kv_cache", "weights", "context_lens", "block_tables", "schedule_metadata", "max_model_len")
_O_PROJ = f"{MODEL}.nvidia.ops.o_proj"
_OWN_MHC = {
    "mhc_pre_tilelang": "pre",
    "mhc_pre_broadcast_tilelang": "pre_broadcast",
    "mhc_fused_post_pre_tilelang": "fused_post_pre",
    "mhc_post_tilelang": "post",
    "hc_head_fused_kernel_tilelang": "head",
}
_OF_DRAFTS = ("mhc_post_tilelang", "hc_head_fused_kernel_tilelang")
_MHC = {"model": tuple(_OWN_MHC), "mtp": _OF_DRAFTS, "dspark": _OF_DRAFTS}
"""The hyper-connection's functions by vLLM's name, and the modules that call them."""
SM120 = "flashmla_sm120"
"""The option that runs attention on the ops on 12.x."""


def _slot(
    attribute: str, ours: str, op: str, about: str, caller: str, *signatures: tuple[str, ...], goes_with: str = ""
) -> Target:
    """One of the names under which vLLM keeps DeepGEMM's functions."""
    return Target(DEEP_GEMM, attribute, op, about, f"{_OUR_DEEP_GEMM}:{ours}", goes_with, caller, signatures)


def _is_there(module: str) -> Target:
    ours = "dsv4_backends.engines.vllm.rules:has_deep_gemm"
    about = "whether there are indexer kernels"
    return Target(module, "has_deep_gemm", "", about, ours, "_fp8_fp4_paged_mqa_logits_impl")


def _without_tilelang(module: str, attribute: str) -> Target:
    """One of the hyper-connection's functions that need TileLang."""
    ours = f"{_OURS}.hyper_connections:{_OWN_MHC[attribute]}"
    about = "hyper-connections without TileLang"
    return Target(f"{MODEL}.nvidia.{module}", attribute, "hc_prenorm_gemm", about, ours, without="tilelang")


# Our schedule is empty and must not reach vLLM's own kernel, so it goes with the kernel.
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
        "indexer's schedule",
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
    Target(
        f"{MODEL}.compressor",
        "DeepseekCompressor._compress_norm_rope_store",
        "compress_norm_rope_insert",
        "compressed keys",
        f"{_OURS}.attention:compress",
        around=True,
        lacking=_LACKING,
        without="cutlass",
        kernels=(
            "SparseAttnCompressNormRopeStoreC4Kernel",
            "SparseAttnCompressC128Block8Kernel",
            "SparseAttnNormRopeStoreKernel",
        ),
    ),
    Target(
        f"{MODEL}.compressor",
        "compress_norm_rope_store_triton",
        "indexer_compress_insert",
        "indexer, compressed keys",
        f"{_OURS}.attention:compress_indexer",
        lacking=_LACKING,
        kernels=("FusedKVCompressNormRopeInsertIndexerTritonKernel",),
    ),
    Target(
        f"{MODEL}.attention",
        "fused_indexer_q_rope_quant",
        "indexer_q_rope_quant",
        "indexer, query",
        f"{_OURS}.attention:indexer_query",
        lacking=_LACKING,
        kernels=("FusedIndexerQRopeQuantTritonKernel", "IndexerQFp8Kernel"),
    ),
    Target(
        FLASH_MLA,
        "dequantize_and_gather_k_cache",
        "gather_dequant_kv",
        "attention, keys of a prefill chunk",
        f"{_OURS}.attention:gather",
        lacking=_LACKING,
        kernels=("DequantizeAndGatherKCacheKernel", "DequantGatherKCacheKernel"),
    ),
    Target(
        _O_PROJ,
        "fused_inv_rope_fp8_quant",
        "inverse_rope_quant",
        "inverse RoPE, FP8",
        f"{_OURS}.attention:quantised_inverse_rope",
        around=True,
        lacking=_LACKING,
        kernels=("FusedInvRopeFP8QuantKernel",),
    ),
    Target(
        _O_PROJ,
        "fused_inv_rope_fp8_quant",
        "inverse_rope",
        "inverse RoPE, bf16",
        f"{_OURS}.attention:inverse_rope",
        around=True,
        lacking=_LACKING,
    ),
    Target(
        "vllm.model_executor.kernels.linear.scaled_mm.marlin",
        "MarlinFP8ScaledMMLinearKernel.process_weights_after_loading",
        "",
        "output projection's weight, kept in FP8",
        f"{_OURS}.attention:output_weight",
        around=True,
        lacking=_LACKING,
    ),
    Target(
        "vllm.model_executor.layers.sparse_attn_indexer",
        "pack_seq_triton",
        "",
        "queries of unequal lengths",
        f"{_OURS}.attention:pack",
        around=True,
        lacking=_LACKING,
    ),
    Target(
        "vllm.model_executor.warmup.jit_warmup",
        "JitWarmupRegistry._add",
        "",
        "warm-up, without replaced kernels",
        f"{_OURS}.warm_up:add",
        around=True,
        caller="JitWarmupRegistry._add",
        signatures=(("self", "kernel", "args", "kwargs"),),
    ),
    Target(
        "vllm.v1.worker.gpu_worker",
        "kernel_warmup",
        "",
        "warm-up, with our kernels",
        f"{_OURS}.warm_up:compile_ours",
        around=True,
    ),
    Target(
        "vllm.v1.attention.backends.mla.sparse_swa",
        "DeepseekSparseSWAMetadataBuilder.build_tile_scheduler",
        "",
        "attention's schedule on 12.x",
        f"{_OURS}.attention:schedule",
        goes_with="flash_mla_with_kvcache",
        around=True,
        lacking=("==12.*",),
        option=SM120,
    ),
    *(_without_tilelang(module, name) for module in ("model", "mtp", "dspark") for name in _MHC[module]),
    *(
        Target(
            f"{MODEL}.nvidia.model",
            f"{owner}.__init__",
            "",
            f"warm-up without {package}",
            f"{_OURS}.warm_up:construct_without_{short}",
            around=True,
            without=package,
        )
        for owner, package, short in (
            ("DeepseekV4DecoderLayer", "cutlass", "cutedsl"),
            ("DeepseekV4DecoderLayer", "tilelang", "tilelang"),
            ("DeepseekV4Model", "tilelang", "tilelang"),
        )
    ),
)
