"""The replacements around attention: the ops, with the arguments of vLLM's functions.

A replacement with the parameter ``own`` wraps vLLM's own function, which gets the calls that the op does not cover.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...contract.layouts import HEAD_DIM, e8m0_decode
from ...errors import UnsupportedError
from ...selection import policy
from .. import OPTIONS

Own = Callable[..., Any]


def _require(function: str, argument: str, expected: object, got: object) -> None:
    """Raise if an argument has a value that no op covers."""
    if got != expected:
        raise UnsupportedError(f"{function}: argument {argument}: expected {expected}, got {got}")


def quantised_inverse_rope(
    own: Own,
    o: Tensor,
    positions: Tensor,
    cos_sin_cache: Tensor,
    n_groups: int,
    heads_per_group: int,
    nope_dim: int = 448,
    rope_dim: int = 64,
    quant_group_size: int = 128,
    tma_aligned_scales: bool = False,
    quantize: bool = True,
) -> tuple[Tensor, Tensor]:
    """``fused_inv_rope_fp8_quant`` before an FP8 projection. ``o`` may have more heads, as padding."""
    if not quantize:
        dims = (nope_dim, rope_dim, quant_group_size)
        rotated: tuple[Tensor, Tensor] = own(
            o, positions, cos_sin_cache, n_groups, heads_per_group, *dims, tma_aligned_scales, quantize
        )
        return rotated
    _require("fused_inv_rope_fp8_quant", "quant_group_size", 128, quant_group_size)
    _require("fused_inv_rope_fp8_quant", "rope_dim", 64, rope_dim)
    heads = o[:, : n_groups * heads_per_group]
    return ops.inverse_rope_quant(heads, positions, cos_sin_cache, n_groups, packed=tma_aligned_scales)


def inverse_rope(
    own: Own,
    o: Tensor,
    positions: Tensor,
    cos_sin_cache: Tensor,
    n_groups: int,
    heads_per_group: int,
    nope_dim: int = 448,
    rope_dim: int = 64,
    quant_group_size: int = 128,
    tma_aligned_scales: bool = False,
    quantize: bool = True,
) -> tuple[Tensor, Tensor]:
    """``fused_inv_rope_fp8_quant`` before a projection in bf16, without scales."""
    if quantize:
        dims = (nope_dim, rope_dim, quant_group_size)
        quantised: tuple[Tensor, Tensor] = own(
            o, positions, cos_sin_cache, n_groups, heads_per_group, *dims, tma_aligned_scales, quantize
        )
        return quantised
    _require("fused_inv_rope_fp8_quant", "rope_dim", 64, rope_dim)
    rotated = ops.inverse_rope(o[:, : n_groups * heads_per_group], positions, cos_sin_cache, n_groups)
    return rotated, torch.empty(0, dtype=torch.float32, device=o.device)


def indexer_query(
    positions: Tensor,
    index_q: Tensor,
    index_q_cos_sin_cache: Tensor,
    index_weights: Tensor,
    index_weights_softmax_scale: float,
    index_weights_head_scale: float,
    use_fp4: bool = False,
    weights_out_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """``fused_indexer_q_rope_quant``."""
    _require("fused_indexer_q_rope_quant", "use_fp4", False, use_fp4)
    _require("fused_indexer_q_rope_quant", "weights_out_dtype", torch.float32, weights_out_dtype)
    scale = index_weights_softmax_scale * index_weights_head_scale
    return ops.indexer_q_rope_quant(index_q, positions, index_q_cos_sin_cache, index_weights, scale)


def gather(
    out: Tensor,
    k_cache: Tensor,
    seq_lens: Tensor,
    gather_lens: Tensor | None,
    block_table: Tensor,
    block_size: int,
    offset: int,
    use_fnuz: bool = False,
) -> None:
    """``dequantize_and_gather_k_cache``."""
    _require("dequantize_and_gather_k_cache", "use_fnuz", False, use_fnuz)
    ops.gather_dequant_kv(k_cache, seq_lens, block_table, out, gather_lens=gather_lens, offset=offset)


def compress(
    own: Own,
    self: Any,
    state_metadata: Any,
    state_cache: Tensor,
    state_width: int,
    positions: Tensor,
    rotary_emb: Any,
    attn_metadata: dict[str, Any],
    pdl_kwargs: dict[str, Any],
) -> None:
    """``DeepseekCompressor._compress_norm_rope_store`` for attention; vLLM's own serves the indexer."""
    if self.head_dim != HEAD_DIM:
        own(self, state_metadata, state_cache, state_width, positions, rotary_emb, attn_metadata, pdl_kwargs)
        return
    cache = self._static_forward_context[self.k_cache_prefix].kv_cache
    _require("_compress_norm_rope_store", "kv_cache", torch.uint8, cache.dtype)
    tokens = state_metadata.slot_mapping.shape[0]
    ops.compress_norm_rope_insert(
        positions[:tokens],
        state_metadata.token_to_req_indices[:tokens],
        attn_metadata[self.k_cache_prefix].slot_mapping[:tokens],
        state_cache,
        state_metadata.block_table,
        self.norm.weight,
        self.rms_norm_eps,
        rotary_emb.cos_sin_cache,
        self.compress_ratio,
        cache,
    )


def compress_indexer(
    state_cache: Tensor,
    num_actual: int,
    token_to_req_indices: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    block_table: Tensor,
    block_size: int,
    state_width: int,
    cos_sin_cache: Tensor,
    kv_cache: Tensor,
    k_cache_metadata: Any,
    pdl_kwargs: dict[str, Any],
    head_dim: int,
    rope_head_dim: int,
    compress_ratio: int,
    overlap: bool,
    use_fp4_cache: bool,
    rms_norm_weight: Tensor,
    rms_norm_eps: float,
    quant_block: int,
    token_stride: int,
    scale_dim: int,
) -> None:
    """``compress_norm_rope_store_triton`` of the indexer's keys."""
    _require("compress_norm_rope_store_triton", "head_dim", 128, head_dim)
    _require("compress_norm_rope_store_triton", "use_fp4_cache", False, use_fp4_cache)
    ops.indexer_compress_insert(
        positions[:num_actual],
        token_to_req_indices[:num_actual],
        k_cache_metadata.slot_mapping[:num_actual],
        state_cache,
        block_table,
        rms_norm_weight,
        rms_norm_eps,
        cos_sin_cache,
        compress_ratio,
        kv_cache,
    )


def pack(own: Own, x: Tensor, lengths: Tensor, pad_value: float = -float("inf"), *args: Any, **kwargs: Any) -> Tensor:
    """``pack_seq_triton``, with FP8 passed as bytes. The padding, which nothing reads, is then 0 instead of -inf."""
    if x.dtype is not torch.float8_e4m3fn:
        packed: Tensor = own(x, lengths, pad_value, *args, **kwargs)
        return packed
    return own(x.view(torch.uint8), lengths, 0, *args, **kwargs).view(x.dtype)  # type: ignore[no-any-return]


def output_weight(own: Own, self: Any, layer: Any) -> None:
    """``process_weights_after_loading`` of Marlin's FP8 kernel: keeps the output projection's weight in FP8.

    Marlin would repack the weight for its own GEMM, but ``fp8_einsum`` multiplies by it. FP8 has half the bytes of
    bf16, and a decode step waits for these bytes. With the option ``wo_a_bf16`` the weight becomes bf16.
    """
    if not getattr(layer, "is_bmm", False):
        own(self, layer)
        return
    from vllm.model_executor.utils import replace_parameter  # type: ignore[import-not-found]

    name = self._block_scale_name(layer)
    weight, scale = layer.weight.data, getattr(layer, name).data
    scale = e8m0_decode(scale.view(torch.uint8)) if scale.dtype is torch.float8_e8m0fnu else scale.float()
    rows, columns = layer.weight_block_size
    if "wo_a_bf16" in policy.engine_options(OPTIONS):
        whole = scale.repeat_interleave(rows, 0)[: weight.shape[0]].repeat_interleave(columns, 1)
        replace_parameter(layer, "weight", (weight.float() * whole[:, : weight.shape[1]]).to(torch.bfloat16))
        return
    groups = layer.bmm_batch_size
    replace_parameter(layer, "weight", weight.unflatten(0, (groups, -1)))
    replace_parameter(layer, name, scale.unflatten(0, (groups, -1)).contiguous())


def schedule(own: Own, self: Any, num_decode_tokens: int) -> Any:
    """``build_tile_scheduler``. vLLM's makes no schedule on 12.x; this adds an empty one for each kind of layer."""
    from vllm.v1.attention.backends.mla import sparse_swa  # type: ignore[import-not-found]

    made = own(self, num_decode_tokens)
    if num_decode_tokens:
        for kind in self._layer_types:
            made[kind] = made[kind] or sparse_swa.get_mla_metadata()[0]
    return made
