"""vLLM's own Triton kernels of the attention path, as a provider.

To compare results and times of ours with. Each op calls the function that vLLM's layers call. The provider is
experimental, so it serves only if it is named. If the CuTe DSL is installed, vLLM uses its kernels in that instead; the
kept figures are without.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from dsv4_backends import OPS, Implementation, ProviderSpec, Reason, Tier, hookimpl


@hookimpl
def dsv4_providers() -> Any:
    def implementation(op: str) -> Implementation:
        refuses = f"vllm_kernels:refuses_{op}" if f"refuses_{op}" in globals() else None
        return Implementation(op=op, target=f"vllm_kernels:{op}", refuses=refuses, capability=(">=8.9",))

    yield ProviderSpec(
        name="vllm_kernels",
        summary="vLLM's own Triton kernels, for comparison",
        tier=Tier.EXPERIMENTAL,
        implementations=tuple(implementation(op) for op in OPS if op in globals()),
    )


def _compress(
    positions: Any,
    requests: Any,
    slots: Any,
    state: Any,
    block_table: Any,
    norm_weight: Any,
    eps: float,
    cos_sin: Any,
    ratio: int,
    k_cache: Any,
    *,
    head_dim: int,
    quant_block: int,
    scale_dim: int,
) -> Any:
    from vllm.models.deepseek_v4.common.ops.fused_compress_quant_cache import compress_norm_rope_store_triton

    if len(positions):
        compress_norm_rope_store_triton(
            state_cache=state,
            num_actual=len(positions),
            token_to_req_indices=requests,
            positions=positions,
            slot_mapping=slots,  # of the state: only its sign is looked at
            block_table=block_table,
            block_size=state.shape[1],
            state_width=state.shape[2] // 2,
            cos_sin_cache=cos_sin,
            kv_cache=k_cache,
            k_cache_metadata=SimpleNamespace(slot_mapping=slots),
            pdl_kwargs={"launch_pdl": False},
            head_dim=head_dim,
            rope_head_dim=64,
            compress_ratio=ratio,
            overlap=state.shape[2] == 4 * head_dim,
            use_fp4_cache=False,
            rms_norm_weight=norm_weight,
            rms_norm_eps=eps,
            quant_block=quant_block,
            token_stride=576 if head_dim == 512 else 128,
            scale_dim=scale_dim,
        )
    return k_cache


def compress_norm_rope_insert(
    positions: Any,
    requests: Any,
    slots: Any,
    state: Any,
    block_table: Any,
    norm_weight: Any,
    eps: float,
    cos_sin: Any,
    ratio: int,
    k_cache: Any,
) -> Any:
    call = (positions, requests, slots, state, block_table, norm_weight, eps, cos_sin, ratio, k_cache)
    return _compress(*call, head_dim=512, quant_block=64, scale_dim=8)


def refuses_compress_norm_rope_insert(
    positions: Any,
    requests: Any,
    slots: Any,
    state: Any,
    block_table: Any,
    norm_weight: Any,
    eps: float,
    cos_sin: Any,
    ratio: int,
    k_cache: Any,
) -> Reason | None:
    return _no_power_of_two(ratio)


def _no_power_of_two(ratio: int) -> Reason | None:
    return Reason("shape", f"the ratio is a power of two in vLLM, not {ratio}") if ratio & (ratio - 1) else None


def indexer_compress_insert(
    positions: Any,
    requests: Any,
    slots: Any,
    state: Any,
    block_table: Any,
    norm_weight: Any,
    eps: float,
    cos_sin: Any,
    ratio: int,
    k_cache: Any,
    *,
    hadamard: bool = False,
) -> Any:
    call = (positions, requests, slots, state, block_table, norm_weight, eps, cos_sin, ratio, k_cache)
    return _compress(*call, head_dim=128, quant_block=128, scale_dim=4)


def refuses_indexer_compress_insert(
    positions: Any,
    requests: Any,
    slots: Any,
    state: Any,
    block_table: Any,
    norm_weight: Any,
    eps: float,
    cos_sin: Any,
    ratio: int,
    k_cache: Any,
    *,
    hadamard: bool = False,
) -> Reason | None:
    return _no_power_of_two(ratio) or _hadamard(hadamard)


def _hadamard(hadamard: bool) -> Reason | None:
    return Reason("shape", "vLLM has no Hadamard step") if hadamard else None


def indexer_q_rope_quant(
    q: Any, positions: Any, cos_sin: Any, weights: Any, scale: float, *, hadamard: bool = False
) -> Any:
    from vllm.models.deepseek_v4.common.ops.fused_indexer_q import fused_indexer_q_rope_quant

    return fused_indexer_q_rope_quant(positions, q, cos_sin, weights, scale, 1.0)


def refuses_indexer_q_rope_quant(
    q: Any, positions: Any, cos_sin: Any, weights: Any, scale: float, *, hadamard: bool = False
) -> Reason | None:
    return _hadamard(hadamard) or (None if q.shape[0] else Reason("shape", "vLLM launches nothing for no tokens"))


def gather_dequant_kv(
    k_cache: Any, seq_lens: Any, block_table: Any, out: Any, *, gather_lens: Any = None, offset: int = 0
) -> Any:
    from vllm.models.deepseek_v4.common.ops.cache_utils import dequantize_and_gather_k_cache

    dequantize_and_gather_k_cache(out, k_cache, seq_lens, gather_lens, block_table, k_cache.shape[1], offset)
    return out


def inverse_rope_quant(x: Any, positions: Any, cos_sin: Any, groups: int, *, packed: bool = False) -> Any:
    return _inverse_rope(x, positions, cos_sin, groups, packed=packed, quantize=True)


def inverse_rope(x: Any, positions: Any, cos_sin: Any, groups: int) -> Any:
    return _inverse_rope(x, positions, cos_sin, groups, packed=False, quantize=False)[0]


def _inverse_rope(x: Any, positions: Any, cos_sin: Any, groups: int, *, packed: bool, quantize: bool) -> Any:
    from vllm.models.deepseek_v4.common.ops.fused_inv_rope_fp8_quant import fused_inv_rope_fp8_quant

    per_group = x.shape[1] // groups
    return fused_inv_rope_fp8_quant(
        x, positions, cos_sin, groups, per_group, tma_aligned_scales=packed, quantize=quantize
    )
