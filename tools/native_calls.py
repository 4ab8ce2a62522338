"""Call DeepGEMM and FlashMLA directly, without this package's providers: the baseline for the adapters.

``prepare(op, arguments)`` takes the arguments of a contract (tensors on a Hopper GPU) and returns a closure without
arguments that makes the one library call. ``prepare`` does what an engine does outside a step's layers: padding, the
schedule, scale layouts, result buffers. The results are the library's: logits outside a row's range may hold anything,
heads and lse keep the library's padding and order.

It works with any build that is installed as ``deep_gemm`` or ``flash_mla``: tokenspeed's and SGLang's wheels and vLLM's
copies under ``vllm.third_party``. Needs only torch and the library. Compute capabilities other than 9.0 are refused,
since padding and scale layouts differ there.

Usage: python tools/native_calls.py [--op OP]   (runs a case of each op and compares it with the definition in fp64)
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Unsupported(Exception):
    """The library cannot serve this call, whatever is prepared; the message says why."""


@dataclass(frozen=True)
class NativeCall:
    """One prepared call.

    Attributes:
        library: What is called, e.g. ``"deep_gemm 2.5.0.post20260424"``.
        run: Makes the call on the current stream and returns what the library returns.
        view: Makes the contract's results from those of ``run``: padding cut off, and elements that the library
            leaves undefined filled. For checks, not for timing.
    """

    library: str
    run: Callable[[], Any]
    view: Callable[[Any], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Native:
    """How an op is called directly.

    Attributes:
        provider: Whose library it is.
        prepare: Makes the call from the op's arguments.
        cases: The contract's cases that this file runs by itself.
        planned: It depends on lengths, and so on ``step()``.
        compiled: The library compiles a kernel for almost every size.
        buffers: It writes to buffers that the caller has.
    """

    provider: str
    prepare: Callable[..., NativeCall]
    cases: tuple[str, ...]
    planned: bool
    compiled: bool
    buffers: bool


NATIVE: dict[str, Native] = {}
"""Every op that has a library function, in the order of this file."""


def direct(
    provider: str, *cases: str, planned: bool = False, compiled: bool = False, buffers: bool = False
) -> Callable[..., Any]:
    """Decorates the function, named as the op with an underscore, that prepares its direct call."""

    def register(prepare: Callable[..., NativeCall]) -> Callable[..., NativeCall]:
        NATIVE[prepare.__name__[1:]] = Native(provider, prepare, cases, planned, compiled, buffers)
        return prepare

    return register


@functools.cache
def _module(name: str, vendored: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
    try:
        return importlib.import_module(vendored)
    except ModuleNotFoundError:
        raise Unsupported(f"neither {name} nor {vendored} is installed") from None


def deep_gemm() -> Any:
    """The installed DeepGEMM."""
    return _module("deep_gemm", "vllm.third_party.deep_gemm")


def flash_mla() -> Any:
    """The installed FlashMLA."""
    return _module("flash_mla", "vllm.third_party.flashmla.flash_mla_interface")


def _label(module: Any) -> str:
    return f"{module.__name__} {getattr(module, '__version__', '(no version)')}"


def library(op: str) -> str:
    """The library that ``prepare`` would call for ``op``. Raises ``Unsupported`` where none is installed."""
    return _label(flash_mla() if NATIVE[op].provider == "flash_mla" else deep_gemm())


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise Unsupported(message)


def _padded(x: Tensor, dim: int, size: int, value: float) -> Tensor:
    """x with dimension ``dim`` filled up to ``size``, contiguous; x itself where nothing is missing."""
    missing = size - x.shape[dim]
    if missing == 0:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x, x.new_full(shape, value)], dim)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


# ------------------------------------------------------------------------------------------------------------ FlashMLA


def _heads(count: int) -> int:
    _need(count <= 128, f"{count} heads, at most 128")
    return 64 if count <= 64 else 128


def _legacy(function: Any) -> dict[str, Any]:
    # SGLang's wheel keeps the Hopper kernels and the 584-byte cache under this switch.
    return {"use_legacy": True} if "use_legacy" in inspect.signature(function).parameters else {}


@direct("flash_mla", "flash tp1", "pro tp8")
def _sparse_mla_prefill(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    *,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
    **others: Any,
) -> NativeCall:
    module = flash_mla()
    function = module.flash_mla_sparse_fwd
    rows, count, _ = q.shape
    _need(rows > 0 and kv.shape[0] > 0, "an empty call")
    heads = _heads(count)
    indices = indices.view(rows, -1)
    topk = max(_round_up(indices.shape[1], 128), 128)
    q = _padded(q, 1, heads, 0)
    kv = kv.unsqueeze(1) if kv.dim() == 2 else kv
    indices = _padded(indices, 1, topk, -1).unsqueeze(1)
    if attn_sink is not None:
        attn_sink = _padded(attn_sink, 0, heads, -torch.inf)
    extra = _legacy(function)

    def run() -> Any:
        return function(q, kv, indices, sm_scale, 512, attn_sink, topk_length, **extra)

    def view(results: Any) -> tuple[Tensor, ...]:
        return tuple(result[:, :count] for result in results)

    return NativeCall(_label(module), run, view)


@direct("flash_mla", "flash tp1", "pro tp8 mtp", "odd", planned=True)
def _sparse_mla_decode(
    q: Tensor,
    k_cache: Tensor,
    indices: Tensor,
    sm_scale: float,
    *,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    fresh_metadata: bool = False,
    **others: Any,
) -> NativeCall:
    module = flash_mla()
    function = module.flash_mla_with_kvcache
    b, s_q, count, _ = q.shape
    _need(b > 0 and s_q > 0, "an empty call")
    heads = _heads(count)
    q = _padded(q, 2, heads, 0)

    def scope(cache: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        topk = max(_round_up(index.shape[-1], 64), 64)
        return (cache.unsqueeze(2) if cache.dim() == 3 else cache), _padded(index, 2, topk, -1)

    k_cache, indices = scope(k_cache, indices)
    if extra_k_cache is not None and extra_indices is not None:
        extra_k_cache, extra_indices = scope(extra_k_cache, extra_indices)
    if attn_sink is not None:
        attn_sink = _padded(attn_sink, 0, heads, -torch.inf)
    keywords: dict[str, Any] = {
        "softmax_scale": sm_scale,
        "is_fp8_kvcache": True,
        "indices": indices,
        "attn_sink": attn_sink,
        "extra_k_cache": extra_k_cache,
        "extra_indices_in_kvcache": extra_indices,
        "topk_length": topk_length,
        "extra_topk_length": extra_topk_length,
    } | _legacy(function)
    metadata, _ = module.get_mla_metadata()

    def run() -> Any:
        schedule = module.get_mla_metadata()[0] if fresh_metadata else metadata
        return function(q, k_cache, None, None, 512, schedule, **keywords)

    if not fresh_metadata:
        run()  # fills the metadata

    def view(results: Any) -> tuple[Tensor, ...]:
        out, lse = results
        return out[:, :, :count], lse.transpose(1, 2)[:, :, :count]

    return NativeCall(_label(module), run, view)


# ------------------------------------------------------------------------------------------------------------ DeepGEMM


def _tensor(result: Any) -> Tensor:
    # SGLang's wheel uses tvm-ffi, which returns torch tensors for torch tensors.
    return result if isinstance(result, Tensor) else torch.utils.dlpack.from_dlpack(result)


def _check_indexer(q: Tensor) -> None:
    h, d = q.shape[-2:]
    _need(h in (32, 64), f"{h} indexer heads, not 32 or 64")
    _need(d in (32, 64, 128), f"head dimension {d}, not 32, 64 or 128")


@direct("deep_gemm", "v4", "v4 batch compressed", "v4 random", planned=True)
def _mqa_logits(
    q: Tensor,
    k: Tensor,
    k_scale: Tensor,
    weights: Tensor,
    row_starts: Tensor,
    row_ends: Tensor,
    *,
    max_seqlen_k: int | None = None,
    **others: Any,
) -> NativeCall:
    """The full form, cleaned, from a build that has it; otherwise the compressed form, not cleaned."""
    module = deep_gemm()
    _check_indexer(q)
    m, n = q.shape[0], k.shape[0]
    _need(m > 0 and n > 0 and max_seqlen_k != 0, "an empty call")
    q, k, weights = q.contiguous(), k.contiguous(), weights.contiguous()
    kv = (k, k_scale)
    old = hasattr(module, "fp8_mqa_logits")
    full = max_seqlen_k is None
    width = n if max_seqlen_k is None else max_seqlen_k

    def run() -> Any:
        if old:
            return module.fp8_mqa_logits(q, kv, weights, row_starts, row_ends, full, 0 if full else width)
        return module.fp8_fp4_mqa_logits((q, None), kv, weights, row_starts, row_ends, width)

    def view(result: Any) -> tuple[Tensor, ...]:
        logits = _tensor(result)
        columns = torch.arange(width, device=q.device)
        starts, ends = row_starts.clamp(0, n).unsqueeze(1), row_ends.clamp(0, n).unsqueeze(1)
        if old and full:
            return (logits,)
        if full:
            inside = (columns >= starts) & (columns < ends)
            return (logits.gather(1, (columns - starts).clamp(min=0)).where(inside, -torch.inf),)
        return (logits.where(columns < ends - starts, -torch.inf),)

    return NativeCall(_label(module), run, view)


@direct("deep_gemm", "v4", "v4 two tokens", planned=True)
def _paged_mqa_logits(
    q: Tensor,
    k_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    max_context_len: int,
    *,
    fresh_metadata: bool = False,
    **others: Any,
) -> NativeCall:
    """Not cleaned: no line cleans paged logits. The last token of a request must have the largest length."""
    module = deep_gemm()
    _check_indexer(q)
    b, next_n = q.shape[:2]
    page_size = k_cache.shape[1]
    _need(b > 0 and max_context_len > 0 and block_table.shape[1] > 0, "an empty call")
    old = hasattr(module, "fp8_paged_mqa_logits")
    _need(page_size in ((64,) if old else (32, 64)), f"a page size of {page_size}")
    _need(next_n in ((1, 2) if old else (1, 2, 4)), f"{next_n} tokens a request")
    cache = k_cache.unsqueeze(2) if k_cache.dim() == 3 else k_cache
    q, weights = q.contiguous(), weights.contiguous()
    lens = context_lens.unsqueeze(1).expand(b, next_n) if context_lens.dim() == 1 else context_lens
    # At least 1: release 2.8 gives the keys after a request without keys to that request's queries.
    valid, lens = lens, lens.clamp(1, max_context_len).contiguous()
    sms = module.get_num_sms() // (2 if next_n == 4 else 1)  # four tokens run on pairs of multiprocessors

    def schedule() -> Tensor:
        return module.get_paged_mqa_logits_metadata(lens, page_size, sms)

    metadata = schedule()

    def run() -> Any:
        meta = schedule() if fresh_metadata else metadata
        if old:
            return module.fp8_paged_mqa_logits(q, cache, weights, lens, block_table, meta, max_context_len, False)
        return module.fp8_fp4_paged_mqa_logits((q, None), cache, weights, lens, block_table, meta, max_context_len)

    def view(result: Any) -> tuple[Tensor, ...]:
        inside = torch.arange(max_context_len, device=q.device) < valid.reshape(-1, 1)
        return (_tensor(result).where(inside, -torch.inf),)

    return NativeCall(_label(module), run, view)


@direct("deep_gemm", "flash tp1", "flash e8m0", compiled=True, buffers=True)
def _fp8_einsum(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, **others: Any) -> NativeCall:
    module = deep_gemm()
    b, h, r = x.shape
    d = w.shape[1]
    blocks = -(-r // 128)
    _need(b > 0 and r > 0, "an empty call")
    _need(w_scale.shape[1] == -(-d // 128), "a scale for each row of w")

    def fp32(scale: Tensor) -> Tensor:
        if scale.dtype == torch.int32:  # four E8M0 codes, the first block lowest
            codes = torch.stack([(scale >> shift) & 0xFF for shift in (0, 8, 16, 24)], -1)
            scale = torch.exp2((codes.flatten(-2)[..., :blocks] - 127).float())
        return scale.float()

    # Tokens contiguous and padded to 16 bytes, as engines write them: the library then uses the scales as they are.
    raw = torch.zeros((h, blocks, _round_up(b, 4)), device=x.device)
    raw[..., :b] = fp32(x_scale).permute(1, 2, 0)
    sfa = raw[..., :b].permute(2, 0, 1)
    operands = (x, sfa), (w, fp32(w_scale).contiguous())
    out = torch.empty((b, h, d), dtype=torch.bfloat16, device=x.device)

    def run() -> Any:
        module.fp8_einsum("bhr,hdr->bhd", *operands, out, None, (1, 128, 128))
        return out

    return NativeCall(_label(module), run, lambda result: (result,))


@direct("deep_gemm", "flash m=13", "flash m=137 splits=4", compiled=True, buffers=True)
def _hc_prenorm_gemm(x: Tensor, fn: Tensor, *, num_splits: int | None = None, **others: Any) -> NativeCall:
    module = deep_gemm()
    m, k = x.shape
    n = fn.shape[0]
    _need(m > 0, "an empty call")
    _need(k > 0 and k % 64 == 0, f"k = {k}, not a multiple of 64")
    _need(n % 8 == 0 and 0 < n <= 32, f"n = {n}, not 8, 16, 24 or 32")
    _need(num_splits is None or num_splits <= k // 64, f"{num_splits} splits of {k // 64} blocks")
    _need(x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0, "rows of x that are not aligned to 16 bytes")
    lead = () if num_splits is None else (num_splits,)
    mixes = torch.empty((*lead, m, n), device=x.device)
    squares = torch.empty((*lead, m), device=x.device)

    def run() -> Any:
        module.tf32_hc_prenorm_gemm(x, fn, mixes, squares, num_splits)
        return mixes, squares

    return NativeCall(_label(module), run, lambda results: results)


def prepare(op: str, arguments: dict[str, Any], *, fresh_metadata: bool = False) -> NativeCall:
    """Prepare one direct call of the library function that computes ``op``.

    The first ``run`` of a DeepGEMM shape compiles its kernel (10 to 20 seconds); call it once before timing.

    Args:
        op: A contract's name.
        arguments: Its arguments, on a GPU; a given ``out`` is ignored.
        fresh_metadata: Compute schedule metadata, where the op has any, inside ``run``, as a caller does whose lengths
            changed; otherwise it is computed once here.

    Raises:
        Unsupported: nothing suitable is installed, or the library does not take this call's shapes.
    """
    capability = torch.cuda.get_device_capability(next(v for v in arguments.values() if isinstance(v, Tensor)).device)
    _need(capability == (9, 0), f"compute capability {capability}, this file prepares calls for (9, 0)")
    return NATIVE[op].prepare(**arguments, fresh_metadata=fresh_metadata)


def main() -> int:
    import argparse

    from dsv4_backends import CONTRACTS
    from dsv4_backends.testing import numerics, oracle

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=NATIVE, action="append")
    failures = 0
    for op in parser.parse_args().op or NATIVE:
        contract = CONTRACTS[op]
        for name in NATIVE[op].cases:
            try:
                made = contract.inputs(next(c for c in contract.cases if c.name == name), "cuda")
                call = prepare(op, made)
                results = oracle.finished(op, made, call.view(call.run()))
                wanted = oracle.expected(op, made)
                worst = {
                    result_name: round(numerics.compare(result, want, contract.tolerances[result_name]).ratio, 3)
                    for result_name, result, want in zip(contract.returns, results, wanted, strict=True)
                }
                good = all(ratio <= 1 for ratio in worst.values())
                print(f"{'ok' if good else 'WRONG':5} {op}: {name}: {call.library}: error over tolerance {worst}")
            except Exception as error:  # one failing row must not lose the others
                good = False
                print(f"ERROR {op}: {name}: {type(error).__name__}: {error}")
            failures += not good
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
