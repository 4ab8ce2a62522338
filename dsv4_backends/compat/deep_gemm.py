"""DeepGEMM's functions for DeepSeek V4, over the ops.

The signatures are the union of what the release lines take. Where two lines put different things in one place (2.6:
``clean_logits``; 2.8: ``max_seqlen_k``), the type of the argument distinguishes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .. import ops
from ..errors import UnsupportedError
from . import loaded

__all__ = [
    "fp8_einsum",
    "fp8_fp4_mqa_logits",
    "fp8_fp4_paged_mqa_logits",
    "fp8_mqa_logits",
    "fp8_paged_mqa_logits",
    "get_num_sms",
    "get_paged_mqa_logits_metadata",
    "get_pdl",
    "set_num_sms",
    "set_pdl",
    "tf32_hc_prenorm_gemm",
]

EXPRESSION = "bhr,hdr->bhd"
RECIPES = ((1, 128, 128), (1, 1, 128))
ROW_ALIGNMENT = 256
"""Elements that rows of logits are aligned to: DeepGEMM aligns them to 1024 bytes, and top-k kernels count on it."""

_num_sms: int | None = None
_pdl = False
_schedules: dict[tuple[torch.device, int], Tensor] = {}


def _unsupported(function: str, argument: str, expected: str, got: object) -> UnsupportedError:
    return UnsupportedError(f"deep_gemm.{function}: argument {argument}: expected {expected}, got {got}")


def _pair(function: str, argument: str, value: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise _unsupported(function, argument, "a pair of values and scales", type(value).__name__)
    return value[0], value[1]


def _fp8_query(function: str, q: Any) -> Tensor:
    """The values of a query that comes alone or beside its scales, of which FP8 has none."""
    values, scales = (q, None) if isinstance(q, Tensor) else _pair(function, "q", q)
    if scales is not None:
        kind = "FP4" if values.dtype in (torch.int8, torch.uint8) else str(values.dtype).removeprefix("torch.")
        raise _unsupported(
            function,
            "q",
            "an FP8 query with None for its scales (they are folded into weights)",
            f"a {kind} query with scales of its own, which no provider serves",
        )
    if values.dtype is not torch.float8_e4m3fn:
        raise _unsupported(function, "q", "an FP8 query (float8_e4m3fn)", values.dtype)
    return values


def _fp8_keys(function: str, argument: str, values: Tensor) -> Tensor:
    if values.dtype is not torch.float8_e4m3fn:
        raise _unsupported(function, argument, "FP8 keys (float8_e4m3fn)", values.dtype)
    return values


def _logits_dtype(function: str, dtype: torch.dtype) -> torch.dtype:
    if dtype not in (torch.float32, torch.bfloat16):
        raise _unsupported(function, "logits_dtype", "float32 or bfloat16", dtype)
    return dtype


def _aligned(width: int) -> int:
    return -(-width // ROW_ALIGNMENT) * ROW_ALIGNMENT


def fp8_einsum(
    expr: str,
    a: tuple[Tensor, Tensor],
    b: tuple[Tensor, Tensor],
    d: Tensor,
    c: Tensor | None = None,
    recipe: Sequence[int] = (1, 128, 128),
    epilogue: object = None,
    use_128x4_sfd_layout: bool = False,
) -> None:
    """Write ``"bhr,hdr->bhd"`` of FP8 operands to ``d``: the op ``fp8_einsum``.

    Args:
        expr: ``"bhr,hdr->bhd"``.
        a: e4m3 ``[b, h, r]`` and its scales: fp32 ``[b, h, ceil(r / 128)]``, or int32 with four E8M0 codes each.
        b: e4m3 ``[h, d, r]`` and its scales, one row for 128 of d or for each d.
        d: bf16 ``[b, h, d]``, written to.
        c: None: no accumulation.
        recipe: ``(1, 128, 128)`` or ``(1, 1, 128)``; the shapes of the scales say the same.
        epilogue, use_128x4_sfd_layout: Not served.

    Raises:
        UnsupportedError: another expression or recipe, or something to accumulate or to apply.
        ContractError: an argument breaks the op's contract.
    """
    name = "fp8_einsum"
    if expr != EXPRESSION:
        raise _unsupported(name, "expr", repr(EXPRESSION), repr(expr))
    if c is not None:
        raise _unsupported(name, "c", "None, as there is no accumulation", "a tensor")
    if tuple(recipe) not in RECIPES:
        raise _unsupported(name, "recipe", "(1, 128, 128) or (1, 1, 128)", tuple(recipe))
    if epilogue is not None or use_128x4_sfd_layout:
        raise _unsupported(name, "epilogue", "None", repr(epilogue))
    if not isinstance(d, Tensor) or d.dtype is not torch.bfloat16:
        raise _unsupported(name, "d", "a bf16 tensor", getattr(d, "dtype", type(d).__name__))
    x, x_scale = _pair(name, "a", a)
    w, w_scale = _pair(name, "b", b)
    ops.fp8_einsum(x, x_scale, w, w_scale, out=d)


def fp8_fp4_mqa_logits(
    q: tuple[Tensor, Tensor | None],
    kv: tuple[Tensor, Tensor],
    weights: Tensor,
    cu_seq_len_k_start: Tensor,
    cu_seq_len_k_end: Tensor,
    clean_logits: bool | int = True,
    max_seqlen_k: int | Tensor | None = 0,
    logits_dtype: torch.dtype = torch.float32,
    schedule_meta: Tensor | None = None,
) -> Tensor:
    """The indexer's logits over contiguous keys: the op ``mqa_logits``.

    2.6 calls ``(..., clean_logits, max_seqlen_k, logits_dtype)``, 2.8 calls ``(..., max_seqlen_k, schedule_meta)``: an
    int in the place of ``clean_logits`` is the latter.

    Args:
        q: e4m3 ``[m, h, d]`` and None.
        kv: e4m3 ``[n, d]`` and fp32 ``[n]``.
        weights: fp32 (or bf16) ``[m, h]``.
        cu_seq_len_k_start, cu_seq_len_k_end: int32 ``[m]``.
        clean_logits: Accepted; what lies outside a row's range is -inf in any case.
        max_seqlen_k: Columns of the compressed form, in which column j of a row is key ``start + j``; 0: all keys.
        logits_dtype: fp32 or bf16.
        schedule_meta: Accepted; providers plan for themselves.

    Returns:
        ``[m, n]``, or ``[m, max_seqlen_k]`` with rows aligned to 1024 bytes.

    Raises:
        UnsupportedError: a query with scales of its own (FP4, MXFP8), or keys that are not FP8.
        ContractError: an argument breaks the op's contract.
    """
    name = "fp8_fp4_mqa_logits"
    if type(clean_logits) is int:
        # The 2.8 line: this is max_seqlen_k, and what follows is the schedule.
        width = clean_logits
    elif isinstance(max_seqlen_k, Tensor):
        raise _unsupported(name, "max_seqlen_k", "an int", "a tensor")
    else:
        width = int(max_seqlen_k or 0)
    return _mqa_logits(name, q, kv, weights, cu_seq_len_k_start, cu_seq_len_k_end, width, logits_dtype)


def fp8_mqa_logits(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    weights: Tensor,
    cu_seq_len_k_start: Tensor,
    cu_seq_len_k_end: Tensor,
    clean_logits: bool = True,
    max_seqlen_k: int = 0,
) -> Tensor:
    """``fp8_fp4_mqa_logits`` in the form of releases up to 2.6: the query is a tensor, without scales."""
    return _mqa_logits(
        "fp8_mqa_logits", q, kv, weights, cu_seq_len_k_start, cu_seq_len_k_end, int(max_seqlen_k), torch.float32
    )


def _mqa_logits(
    name: str, q: Any, kv: Any, weights: Tensor, starts: Tensor, ends: Tensor, width: int, dtype: torch.dtype
) -> Tensor:
    queries, (keys, scales) = _fp8_query(name, q), _pair(name, "kv", kv)
    keys, dtype = _fp8_keys(name, "kv", keys), _logits_dtype(name, dtype)
    if scales.dtype is torch.int32:
        raise _unsupported(name, "kv", "one fp32 scale for each key", "packed int32 scales")
    # The wider form is the narrower one with more columns, so aligned rows cost nothing.
    columns = _aligned(width) if width > 0 else None
    logits = ops.mqa_logits(queries, keys, scales, weights.float(), starts, ends, max_seqlen_k=columns)
    return (logits[:, :width] if width > 0 else logits).to(dtype)


def fp8_fp4_paged_mqa_logits(
    q: tuple[Tensor, Tensor | None],
    kv_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    schedule_meta: Tensor | None,
    max_context_len: int,
    clean_logits: bool | Tensor | None = False,
    logits_dtype: torch.dtype = torch.float32,
    indices: Tensor | None = None,
) -> Tensor:
    """The indexer's logits over the paged key cache: the op ``paged_mqa_logits``.

    2.6 calls ``(..., clean_logits, logits_dtype, indices)``, 2.8 calls ``(..., indices)``: a tensor in the place of
    ``clean_logits`` is the latter.

    Args:
        q: e4m3 ``[b, next_n, h, d]`` and None.
        kv_cache: uint8 ``[pages, page_size, 1, d + 4]``, page-split.
        weights: fp32 (or bf16) ``[b * next_n, h]``.
        context_lens: int32 ``[b, next_n]``; or ``[b]``, then token j of a request sees all but the ``next_n - 1 - j``
            last keys.
        block_table: int32 ``[b, blocks]``.
        schedule_meta: Accepted; providers plan for themselves.
        max_context_len: Columns of the result.
        clean_logits: Accepted; what lies beyond a row's length is -inf in any case.
        logits_dtype: fp32 or bf16.
        indices: Accepted: the request that each row belongs to, where rows bring tables of their own.

    Returns:
        ``[b * next_n, max_context_len]``, rows aligned to 1024 bytes.

    Raises:
        UnsupportedError: a query with scales of its own (FP4, MXFP8).
        ContractError: an argument breaks the op's contract.
    """
    return _paged_mqa_logits(
        "fp8_fp4_paged_mqa_logits", q, kv_cache, weights, context_lens, block_table, max_context_len, logits_dtype
    )


def fp8_paged_mqa_logits(
    q: Tensor,
    kv_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    schedule_meta: Tensor | None,
    max_context_len: int,
    clean_logits: bool = False,
    indices: Tensor | None = None,
) -> Tensor:
    """``fp8_fp4_paged_mqa_logits`` in the form of releases up to 2.6: the query is a tensor, without scales."""
    return _paged_mqa_logits(
        "fp8_paged_mqa_logits", q, kv_cache, weights, context_lens, block_table, max_context_len, torch.float32
    )


def _paged_mqa_logits(
    name: str,
    q: Any,
    kv_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    queries, dtype = _fp8_query(name, q), _logits_dtype(name, dtype)
    head_dim = queries.shape[-1]
    if kv_cache.shape[-1] != head_dim + 4:
        got = f"{kv_cache.shape[-1]} bytes a token for {head_dim} dimensions"
        raise _unsupported(name, "kv_cache", "d + 4 bytes a token (FP8 keys and one fp32 scale)", got)
    next_n = queries.shape[1]
    if context_lens.dim() == 1 and next_n > 1:
        # Unlike the op's, DeepGEMM's one length of a request is that of its last token.
        context_lens = context_lens.unsqueeze(1) + torch.arange(
            1 - next_n, 1, dtype=torch.int32, device=context_lens.device
        )
    logits = ops.paged_mqa_logits(queries, kv_cache, weights.float(), context_lens, block_table, _aligned(width))
    return logits[:, :width].to(dtype)


def get_paged_mqa_logits_metadata(
    context_lens: Tensor, block_kv: int, num_sms: int, indices: Tensor | None = None
) -> Tensor:
    """A schedule for ``fp8_fp4_paged_mqa_logits``: empty, with the library's shape, since providers make their own.

    Returns:
        int32 ``[num_sms + 1, 2]``, zeros; the same tensor for the same device and number.
    """
    device = context_lens.device
    key = (device, num_sms)
    if (schedule := _schedules.get(key)) is None:
        schedule = torch.zeros((num_sms + 1, 2), dtype=torch.int32, device=device)
        # Memory that a graph's capture allocates belongs to the graph.
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            _schedules[key] = schedule
    return schedule


def tf32_hc_prenorm_gemm(a: Tensor, b: Tensor, d: Tensor, sqr_sum: Tensor, num_splits: int | None = None) -> None:
    """Write ``a @ b.T`` to ``d`` and the rows' sums of squares to ``sqr_sum``: the op ``hc_prenorm_gemm``.

    Args:
        a: bf16 ``[m, k]``.
        b: fp32 ``[n, k]``.
        d: fp32 ``[m, n]``, or partials ``[num_splits, m, n]``.
        sqr_sum: fp32 ``[m]``, or partials ``[num_splits, m]``.
        num_splits: Number of partials; None: ``d`` and ``sqr_sum`` have no leading dimension.

    Raises:
        ContractError: an argument breaks the op's contract.
    """
    ops.hc_prenorm_gemm(a, b, num_splits=num_splits, out=d, sqr_sum=sqr_sum)


def get_num_sms() -> int:
    """The number of multiprocessors that a schedule uses: as set, else that of the GPU, else 1."""
    if _num_sms is not None:
        return _num_sms
    if not torch.cuda.is_available():
        return 1
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count)


def set_num_sms(num_sms: int) -> None:
    """Set what ``get_num_sms`` returns, here and in the library if it is loaded. Other providers do not use it."""
    global _num_sms
    _num_sms = int(num_sms)
    if (library := loaded("deep_gemm")) is not None:
        library.set_num_sms(_num_sms)


def get_pdl() -> bool:
    """The value of the last ``set_pdl``."""
    return _pdl


def set_pdl(enable: bool) -> None:
    """Set whether the library's kernels may start early, if it is loaded. Other providers do not use it."""
    global _pdl
    _pdl = bool(enable)
    if (library := loaded("deep_gemm")) is not None:
        library.set_pdl(_pdl)


def own(library: Any, name: str) -> Callable[..., Any]:
    """The library's function, for a call that ours passes on. It gets a schedule of the library's making."""
    function = cast("Callable[..., Any]", getattr(library, name))
    if not name.endswith("paged_mqa_logits"):
        return function

    def call(
        q: Any, kv_cache: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor, *rest: Any, **named: Any
    ) -> Any:
        positional = list(rest)  # schedule_meta, max_context_len, then what the line takes
        indices = named.get("indices", next((x for x in positional[2:] if isinstance(x, Tensor)), None))
        extra = {} if indices is None else {"indices": indices}
        page_size, sms = kv_cache.shape[1], library.get_num_sms()
        schedule = library.get_paged_mqa_logits_metadata(context_lens, page_size, sms, **extra)
        if positional:
            positional[0] = schedule
        else:
            named["schedule_meta"] = schedule
        return function(q, kv_cache, weights, context_lens, block_table, *positional, **named)

    return call
