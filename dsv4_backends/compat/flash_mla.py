"""FlashMLA's functions for DeepSeek V4, over the ops.

The signatures are the union of what the release lines take. Where two lines put different things in one place (vLLM's
copy: ``out``; SGLang's: a switch), the type of the argument distinguishes them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor

from .. import ops
from ..contract import CONTRACTS
from ..contract.layouts import HEAD_DIM, KV_BYTES
from ..errors import ContractError, UnsupportedError
from ..runtime import bind
from ..selection import policy

__all__ = [
    "FlashMLASchedMeta",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
]

FORMATS = {
    656: "DeepSeek V3.2",
    528: "DeepSeek V4.1",
    288: "DeepSeek V4.1 FP4",
    352: "DeepSeek V3.2 NVFP4",
}
"""Bytes a token of the cache formats that the library reads and no op takes."""


@dataclasses.dataclass
class FlashMLASchedMeta:
    """The schedule that a caller makes once and passes to every decode call of the same shapes.

    Providers plan for themselves. The object keeps the shapes of its first call, and a call with others is an
    error, as it is in the library.
    """

    have_initialized: bool = False
    config: tuple[object, ...] | None = None
    tile_scheduler_metadata: Tensor | None = None
    num_splits: Tensor | None = None
    native: Any = dataclasses.field(default=None, repr=False, compare=False)
    """The library's own object, for calls that are passed on to it."""


def get_mla_metadata(*args: object, **kwargs: object) -> tuple[FlashMLASchedMeta, None]:
    """An empty ``FlashMLASchedMeta``, and None. The arguments of older releases are ignored."""
    return FlashMLASchedMeta(), None


def _unsupported(function: str, argument: str, expected: str, got: object) -> UnsupportedError:
    return UnsupportedError(f"flash_mla.{function}: argument {argument}: expected {expected}, got {got}")


def _cache(function: str, argument: str, cache: Tensor) -> None:
    width = cache.shape[-1]
    if width != KV_BYTES:
        got = f"{width} ({FORMATS[width]})" if width in FORMATS else str(width)
        raise _unsupported(function, argument, f"the DeepSeek V4 cache of {KV_BYTES} bytes a token", got)


def _query(function: str, q: Tensor) -> None:
    if q.shape[-1] != HEAD_DIM:
        got = f"{q.shape[-1]}{' (DeepSeek V3.2)' if q.shape[-1] == 576 else ''}"
        raise _unsupported(function, "q", f"{HEAD_DIM} dimensions a head", got)


def flash_mla_sparse_fwd(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
    out: Tensor | bool | None = None,
    use_legacy: bool | None = None,
    return_log2_lse: bool | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sparse attention over contiguous keys: the op ``sparse_mla_prefill``.

    vLLM's copy has ``out`` in the eighth place, SGLang's ``use_legacy`` and ``return_log2_lse`` in the eighth and
    ninth: a bool in the place of ``out`` is the latter.

    Args:
        q: bf16 ``[s_q, h_q, 512]``.
        kv: bf16 ``[s_kv, 1, 512]``.
        indices: int32 ``[s_q, 1, topk]``; whatever is not a row of ``kv`` is invalid.
        sm_scale: Softmax scale.
        d_v: 512.
        attn_sink: fp32 ``[h_q]``.
        topk_length: int32 ``[s_q]``.
        out: bf16 ``[s_q, h_q, 512]`` to write to.
        use_legacy: Accepted: which of its kernels runs is a provider's own affair.
        return_log2_lse: None: natural logarithms; True: base 2; False: None for both.

    Returns:
        out bf16 ``[s_q, h_q, 512]``, max_logits and lse fp32 ``[s_q, h_q]``, sink excluded.

    Raises:
        UnsupportedError: queries of other dimensions (DeepSeek V3.2).
        ContractError: an argument breaks the op's contract.
    """
    name = "flash_mla_sparse_fwd"
    if isinstance(out, bool):
        out, return_log2_lse = None, use_legacy if return_log2_lse is None else return_log2_lse
    _query(name, q)
    if d_v != HEAD_DIM:
        raise _unsupported(name, "d_v", str(HEAD_DIM), d_v)
    result, max_logits, lse = ops.sparse_mla_prefill(
        q, kv, indices, sm_scale, attn_sink=attn_sink, topk_length=topk_length, out=out
    )
    if return_log2_lse is None:
        return result, max_logits, lse
    if not return_log2_lse:
        return result, None, None
    return result, max_logits * math.log2(math.e), lse * math.log2(math.e)


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: Any,
    num_splits: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool | None = None,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    out: Tensor | bool | None = None,
    enable_batch_invariant: bool = False,
    use_legacy: bool | str | None = False,
    kv_format: str | None = None,
    descale_q: Tensor | None = None,
    descale_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sparse attention over the packed FP8 cache, in one or two scopes: the op ``sparse_mla_decode``.

    vLLM's copy has ``(out, enable_batch_invariant)`` in the seventeenth place and after it, SGLang's
    ``(enable_batch_invariant, use_legacy, kv_format, ...)``: a bool in the place of ``out`` is the latter.

    Args:
        q: bf16 ``[b, s_q, h_q, 512]``.
        k_cache: uint8, int8 or e4m3 ``[pages, page_size, 1, 584]``.
        block_table, cache_seqlens: Not looked at; sparse attention needs neither.
        head_dim_v: 512.
        tile_scheduler_metadata: From ``get_mla_metadata``; the library's own object is accepted too.
        num_splits: None.
        softmax_scale: Default: 512 ** -0.5.
        causal: False.
        is_fp8_kvcache: True, or None.
        indices: int32 ``[b, s_q, topk]``; -1 is invalid.
        attn_sink: fp32 ``[h_q]``.
        extra_k_cache, extra_indices_in_kvcache, extra_topk_length: The second scope.
        topk_length: int32 ``[b]``.
        out: bf16 ``[b, s_q, h_q, 512]`` to write to.
        enable_batch_invariant: True asks for a provider that claims it.
        use_legacy: Accepted: which of its kernels runs is a provider's own affair.
        kv_format: None or ``"V4"``.
        descale_q, descale_k: None.

    Returns:
        out bf16 ``[b, s_q, h_q, 512]``, and lse fp32 ``[b, h_q, s_q]``, a transposed view, sink excluded.

    Raises:
        UnsupportedError: dense attention, another cache format or model, or batch invariance that the chosen provider
            does not claim.
        ContractError: an argument breaks the op's contract, or the metadata has been used with other shapes.
    """
    name = "flash_mla_with_kvcache"
    if isinstance(out, bool):
        enable_batch_invariant, out = out, None
    formats = [x for x in (use_legacy, kv_format) if isinstance(x, str)]
    descaled = [x for x in (kv_format, descale_q, descale_k) if isinstance(x, Tensor)]
    if indices is None:
        raise _unsupported(name, "indices", "int32 [b, s_q, topk]", "None, which asks for dense attention")
    if causal:
        raise _unsupported(name, "causal", "False, as the indices say what is seen", causal)
    if is_fp8_kvcache is False:
        raise _unsupported(name, "is_fp8_kvcache", "True", "False, which asks for a bf16 cache")
    if head_dim_v != HEAD_DIM:
        raise _unsupported(name, "head_dim_v", str(HEAD_DIM), head_dim_v)
    if num_splits is not None:
        raise _unsupported(name, "num_splits", "None", type(num_splits).__name__)
    if formats and formats != ["V4"]:
        raise _unsupported(name, "kv_format", "None or 'V4'", repr(formats[0]))
    if descaled:
        raise _unsupported(name, "descale_q and descale_k", "None, as the cache holds its scales", "a tensor")
    _cache(name, "k_cache", k_cache)
    if extra_k_cache is not None:
        _cache(name, "extra_k_cache", extra_k_cache)
    _query(name, q)
    given: dict[str, Any] = {
        "q": q,
        "k_cache": k_cache,
        "indices": indices,
        "sm_scale": HEAD_DIM**-0.5 if softmax_scale is None else softmax_scale,
        "attn_sink": attn_sink,
        "topk_length": topk_length,
        "extra_k_cache": extra_k_cache,
        "extra_indices": extra_indices_in_kvcache,
        "extra_topk_length": extra_topk_length,
        "out": out,
    }
    if enable_batch_invariant:
        _batch_invariant(name, given)
    if isinstance(tile_scheduler_metadata, FlashMLASchedMeta):
        _remember(
            tile_scheduler_metadata,
            (
                tuple(q.shape[:3]),
                k_cache.shape[1],
                indices.shape[-1],
                None if extra_k_cache is None else extra_k_cache.shape[1],
                None if extra_indices_in_kvcache is None else extra_indices_in_kvcache.shape[-1],
                enable_batch_invariant,
            ),
        )
    result, lse = ops.sparse_mla_decode(**given)
    return result, lse.transpose(1, 2)


def _batch_invariant(name: str, given: dict[str, Any]) -> None:
    op = "sparse_mla_decode"
    bound = bind.serving(op, CONTRACTS[op].check(**given), given)
    if not bound.implementation.batch_invariant:
        who = f"the provider {bound.provider}, which does not claim it"
        hint = f"the triton provider does with {policy.PREFIX}BATCH_INVARIANT=1"
        raise _unsupported(name, "enable_batch_invariant", "False", f"True and {who} ({hint})")


def _remember(metadata: FlashMLASchedMeta, config: tuple[object, ...]) -> None:
    if not metadata.have_initialized:
        metadata.have_initialized, metadata.config = True, config
    elif metadata.config != config:
        raise ContractError(
            "flash_mla.flash_mla_with_kvcache: argument tile_scheduler_metadata: expected the shapes of its first call "
            f"(query, page size, topk, second page size, second topk, batch invariant) {metadata.config}, got {config}"
        )


def own(library: Any, name: str) -> Callable[..., Any] | None:
    """The library's function, for a call that ours passes on. It gets metadata of the library's own kind.

    None where the library only shares the name with FlashMLA (AppMana's): its functions take other arguments.
    """
    if not hasattr(library, "flash_mla_sparse_fwd"):
        return None
    function = cast("Callable[..., Any]", getattr(library, name))
    if name != "flash_mla_with_kvcache":
        return function

    def call(*args: Any, **kwargs: Any) -> Any:
        def translate(value: Any) -> Any:
            if not isinstance(value, FlashMLASchedMeta):
                return value
            if value.native is None:
                value.native = library.get_mla_metadata()[0]
            return value.native

        return function(*map(translate, args), **{key: translate(value) for key, value in kwargs.items()})

    return call
