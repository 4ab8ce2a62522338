"""DeepGEMM's release lines: ``tokenspeed`` (2.5, pybind11), ``sgl`` (2.6, Python), ``vllm`` (2.8, ``torch.ops``).

Each function returns what its module holds, by name. ``arch`` is 9 (Hopper) or 10 (Blackwell).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsv4_backends.testing import oracle

GARBAGE = 12345.0
"""The content of elements that a kernel does not write."""
NUM_SMS = 132
HEADERS_25 = (
    "sm90_fp8_mqa_logits.cuh",
    "sm90_fp8_paged_mqa_logits.cuh",
    "sm90_fp8_gemm_1d2d.cuh",
    "sm90_tf32_hc_prenorm_gemm.cuh",
    "sm100_fp8_mqa_logits.cuh",
    "sm100_fp8_paged_mqa_logits.cuh",
    "sm100_fp8_fp4_gemm_1d1d.cuh",
    "sm100_tf32_hc_prenorm_gemm.cuh",
    "smxx_clean_logits.cuh",
)
HEADERS_28 = (
    "sm90_fp8_mqa_logits.cuh",
    "sm90_fp8_paged_mqa_logits.cuh",
    "sm90_fp8_gemm_1d2d.cuh",
    "sm90_tf32_hc_prenorm_gemm.cuh",
    "sm100_mqa_logits.cuh",
    "sm100_fp8_fp4_gemm_1d1d.cuh",
    "sm100_tf32_hc_prenorm_gemm.cuh",
    "sm120_fp8_mqa_logits.cuh",
    "sm120_fp8_paged_mqa_logits.cuh",
    "sm120_fp8_fp4_gemm_1d1d.cuh",
    "sm120_tf32_hc_prenorm_gemm.cuh",
)


class Pybind:
    """A function as pybind11 makes them: no signature for ``inspect``, a docstring that begins with one."""

    def __init__(self, doc: str, function: Callable[..., Any]) -> None:
        self.__doc__, self.__name__, self._function = doc + "\n", doc.partition("(")[0], function

    @property
    def __signature__(self) -> Any:
        raise ValueError(f"no signature found for builtin {self.__name__}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)


# -------------------------------------------------------------------------------------------------- semantics


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _canvas(rows: int, columns: int) -> Tensor:
    """A result as DeepGEMM allocates it: rows at a multiple of 1024 bytes, nothing written."""
    return torch.full((rows, _up(columns + 256, 256)), GARBAGE)[:, :columns]


def _check_indexer(q: Tensor, weights: Tensor) -> None:
    assert q.dtype == torch.float8_e4m3fn
    assert q.is_contiguous()
    assert q.shape[-2] in (32, 64)
    assert q.shape[-1] in (32, 64, 128)
    assert weights.dtype == torch.float32
    assert weights.shape == (q.shape[:-2].numel(), q.shape[-2])
    assert weights.is_contiguous()


def mqa_logits(q: Tensor, kv: Any, weights: Tensor, ks: Tensor, ke: Tensor, *, clean: bool, compressed: int) -> Tensor:
    k, k_scale = kv
    _check_indexer(q, weights)
    assert k.is_contiguous()
    assert k_scale.is_contiguous()
    assert k_scale.data_ptr() % 16 == 0
    assert ks.dtype == ke.dtype == torch.int32
    assert ks.is_contiguous()
    assert ke.is_contiguous()
    assert q.shape[0] > 0
    assert k.shape[0] > 0
    n = k.shape[0]
    # The kernel would loop for 2^32 keys, read them as unsigned, or write into the next row.
    assert ((ks >= 0) & (ks <= ke) & (ke <= n)).all(), "bounds that the kernel cannot take"
    if compressed:
        assert not clean
        assert (ke - ks).max() <= compressed, "the kernel would write into the next row"
    (full,) = oracle.of("mqa_logits")(q, k, k_scale, weights, ks, ke)
    logits = _canvas(q.shape[0], compressed or n)
    for i in range(q.shape[0]):
        start, end = int(ks[i]), int(ke[i])
        shift = start if compressed else 0
        logits[i, start - shift : end - shift] = full[i, start:end].float()
        if clean:
            logits[i, :start] = logits[i, end:] = -torch.inf
    return logits


def schedule(context_lens: Tensor, block_kv: int, num_sms: int, indices: Tensor | None = None) -> Tensor:
    assert context_lens.dim() == 2
    assert context_lens.dtype == torch.int32
    assert context_lens.is_contiguous()
    assert num_sms > 0
    assert indices is None
    made = torch.zeros((num_sms + 1, 2), dtype=torch.int32)
    # Which SM begins where is the kernel's affair; this much of the lengths is in it.
    made[0, 0], made[1, 0] = context_lens.shape[0], context_lens.shape[1]
    made[2, 0] = int((context_lens[:, -1].long() * torch.arange(1, len(context_lens) + 1)).sum() % 2**31)
    made[3, 0] = block_kv
    return made


def paged_mqa_logits(
    q: Tensor,
    cache: Tensor,
    weights: Tensor,
    lens: Tensor,
    table: Tensor,
    meta: Tensor,
    width: int,
    *,
    tokens: tuple[int, ...],
    pages: tuple[int, ...],
) -> Tensor:
    _check_indexer(q, weights)
    b, next_n, _, d = q.shape
    page_size = cache.shape[1]
    assert next_n in tokens
    assert page_size in pages
    assert cache.dtype == torch.uint8
    assert cache.shape[2:] == (1, d + 4)
    assert cache.stride()[1:] == (d + 4, d + 4, 1) or (cache.stride(1), cache.stride(3)) == (d + 4, 1)
    assert cache.stride(0) % 16 == 0
    assert table.dtype == torch.int32
    assert table.shape[0] == b
    assert table.stride(1) == 1
    assert lens.shape == (b, next_n), "two dimensions"
    # On Hopper a pair of multiprocessors shares the keys of four tokens.
    sms = NUM_SMS // (2 if next_n == 4 else 1)
    assert meta.shape == (sms + 1, 2)
    assert torch.equal(meta, schedule(lens, page_size, sms)), "a stale schedule"
    last = lens[:, -1]
    assert ((last >= 0) & (last <= width)).all(), "the kernel would write into the next row"
    assert ((last > 0) & (last <= page_size * table.shape[1])).all(), "the kernel would read beyond the table"
    assert (lens <= last[:, None]).all(), "the last column is the bound of the loop"
    if 4 in tokens:  # 2.8 goes from a request without keys to the next, and keeps its queries
        for i in (last == 0).nonzero().flatten().tolist():
            if i + 1 < b:
                q = q.clone()
                q[i + 1] = q[i]
    full = last[:, None].expand(b, next_n)
    # A page that is not there reads as 0.
    table = torch.where((table >= 0) & (table < len(cache)), table, 0)
    (found,) = oracle.of("paged_mqa_logits")(q, cache[:, :, 0], weights, full, table, width)
    # The kernel writes whole pages, whatever the lengths say, of what it has read.
    return torch.where(found.isinf(), GARBAGE, found.float()) + _canvas(b * next_n, width) * 0


def einsum(expr: str, a: Any, b: Any, d: Tensor, c: Tensor | None, recipe: Any, *, arch: int) -> None:
    (x, sfa), (w, sfb) = a, b
    assert expr == "bhr,hdr->bhd"
    assert c is None
    assert d.dtype == torch.bfloat16
    assert d.stride(-1) == 1
    assert x.stride(-1) == w.stride(-1) == 1
    for operand in (x, w, d):  # the tensor memory accelerator
        assert all(stride * operand.element_size() % 16 == 0 for stride in operand.stride()[:2])
        assert operand.data_ptr() % 16 == 0
    tokens, groups, r = x.shape
    assert r % 128 == 0
    assert w.shape[1] % 128 == 0
    blocks = r // 128
    if tuple(recipe) == (1, 1, 128):
        assert arch == 10
        rows = w.shape[1]
        words = -(-blocks // 4)
        assert sfa.dtype == sfb.dtype == torch.int32
        assert sfa.stride() == (1, words * _up(tokens, 4), _up(tokens, 4))
        assert sfb.stride() == (words * _up(rows, 4), 1, _up(rows, 4))
    else:
        assert tuple(recipe) == (1, 128, 128)
        assert sfa.dtype == sfb.dtype == torch.float32
        assert sfb.shape == (groups, w.shape[1] // 128, blocks)
        assert sfa.stride() == (1, blocks * _up(tokens, 4), _up(tokens, 4)) or sfa.is_contiguous()
        assert sfb.is_contiguous()
        if arch == 10:  # only the exponent is kept
            sfa, sfb = ((scale.view(torch.int32) >> 23 << 23).view(torch.float32) for scale in (sfa, sfb))
    d.copy_(oracle.of("fp8_einsum")(x, sfa, w, sfb)[0])


def prenorm_gemm(a: Tensor, b: Tensor, d: Tensor, sqr_sum: Tensor, num_splits: int | None = None) -> None:
    (m, k), n = a.shape, b.shape[0]
    assert a.dtype == torch.bfloat16
    assert b.dtype == d.dtype == sqr_sum.dtype == torch.float32
    assert k > 0
    assert k % 64 == 0
    assert n % 8 == 0
    assert n <= 32
    assert a.stride(0) * 2 % 16 == 0
    assert a.stride(1) == b.stride(1) == 1
    assert d.is_contiguous()
    assert sqr_sum.is_contiguous()
    splits = num_splits or 1
    assert num_splits is None or 1 <= num_splits <= k // 64, "a split without a block"
    assert d.shape == ((m, n) if num_splits is None else (splits, m, n))
    assert sqr_sum.shape == ((m,) if num_splits is None else (splits, m))
    for index, part in enumerate(torch.arange(k // 64).tensor_split(splits)):
        columns = slice(int(part[0]) * 64, int(part[-1]) * 64 + 64)
        mixes, squares = oracle.of("hc_prenorm_gemm")(a[:, columns], b[:, columns])
        d.view(splits, m, n)[index], sqr_sum.view(splits, m)[index] = mixes, squares


# -------------------------------------------------------------------------------------------------- the lines


def _num_sms() -> int:
    return NUM_SMS


def tokenspeed(arch: int = 9) -> dict[str, Any]:
    """tokenspeed-deepgemm 2.5.0.post20260424."""
    q = "q: torch.Tensor, "
    pair = "Tuple[torch.Tensor, torch.Tensor]"
    bounds = "cu_seq_len_k_start: torch.Tensor, cu_seq_len_k_end: torch.Tensor"
    paged = (
        "kv_cache: torch.Tensor, weights: torch.Tensor, context_lens: torch.Tensor, block_table: torch.Tensor, "
        "schedule_meta: torch.Tensor, max_context_len: int, clean_logits: bool = False, "
        "indices: Optional[torch.Tensor] = None"
    )

    def logits(
        q: Any, kv: Any, weights: Any, ks: Any, ke: Any, clean_logits: bool = True, max_seqlen_k: int = 0
    ) -> Any:
        return mqa_logits(q, kv, weights, ks, ke, clean=clean_logits, compressed=max_seqlen_k)

    def paged_logits(q: Any, c: Any, w: Any, lens: Any, t: Any, m: Any, n: int, clean_logits: bool = False) -> Any:
        assert not clean_logits
        return paged_mqa_logits(q, c, w, lens, t, m, n, tokens=(1, 2), pages=(64,))

    return {
        "get_num_sms": Pybind("get_num_sms() -> int", _num_sms),
        "fp8_mqa_logits": Pybind(
            f"fp8_mqa_logits({q}kv: {pair}, weights: torch.Tensor, {bounds}, clean_logits: bool = True, "
            "max_seqlen_k: int = 0) -> torch.Tensor",
            logits,
        ),
        "get_paged_mqa_logits_metadata": Pybind(
            "get_paged_mqa_logits_metadata(context_lens: torch.Tensor, block_kv: int, num_sms: int, "
            "indices: Optional[torch.Tensor] = None) -> torch.Tensor",
            schedule,
        ),
        "fp8_paged_mqa_logits": Pybind(f"fp8_paged_mqa_logits({q}{paged}) -> torch.Tensor", paged_logits),
        "fp8_einsum": Pybind(
            f"fp8_einsum(expr: str, a: {pair}, b: {pair}, d: torch.Tensor, c: Optional[torch.Tensor] = None, "
            "recipe: Tuple[int, int, int] = (1, 128, 128)) -> None",
            functools.partial(einsum, arch=arch),
        ),
        "tf32_hc_prenorm_gemm": Pybind(
            "tf32_hc_prenorm_gemm(a: torch.Tensor, b: torch.Tensor, d: torch.Tensor, sqr_sum: torch.Tensor, "
            "num_splits: Optional[int] = None) -> None",
            prenorm_gemm,
        ),
    }


def sgl(arch: int = 9) -> dict[str, Any]:
    """sgl-deep-gemm 0.1.4.post1, of the 2.6 line: Python functions over tvm-ffi."""

    def get_num_sms() -> int:
        return NUM_SMS

    def fp8_mqa_logits(q, kv, weights, ks, ke, clean_logits=False, max_seqlen_k=0):
        return mqa_logits(q, kv, weights, ks, ke, clean=clean_logits, compressed=max_seqlen_k)

    def get_paged_mqa_logits_metadata(context_lens, block_kv, num_sms, indices=None):
        return schedule(context_lens, block_kv, num_sms, indices)

    def fp8_paged_mqa_logits(
        q,
        kv_cache,
        weights,
        context_lens,
        block_table,
        schedule_meta,
        max_context_len,
        clean_logits=False,
        indices=None,
    ):
        assert not clean_logits
        rest = (kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len)
        return paged_mqa_logits(q, *rest, tokens=(1, 2), pages=(64,))

    def fp8_einsum(expr, a, b, d, c=None, recipe=(1, 128, 128)):
        einsum(expr, a, b, d, c, recipe, arch=arch)

    def tf32_hc_prenorm_gemm(a, b, d, sqr_sum, num_splits=None):
        prenorm_gemm(a, b, d, sqr_sum, num_splits)

    return {name: value for name, value in locals().items() if name != "arch"}


@functools.cache
def _torch_ops() -> Any:
    """The two functions that vLLM's copy takes from ``torch.ops``."""
    library = torch.library.Library("dsv4_fake_deep_gemm", "DEF")
    prenorm = "(Tensor a, Tensor b, Tensor(d!) d, Tensor(sqr_sum!) sqr_sum, int? num_splits=None) -> ()"
    library.define(f"tf32_hc_prenorm_gemm{prenorm}")
    metadata = "(Tensor context_lens, int block_kv, int num_sms, Tensor? indices=None) -> Tensor"
    library.define(f"get_paged_mqa_logits_metadata{metadata}")
    library.define("get_num_sms() -> int")
    library.impl("tf32_hc_prenorm_gemm", prenorm_gemm, "CPU")
    library.impl("get_paged_mqa_logits_metadata", schedule, "CPU")
    library.impl("get_num_sms", _num_sms, "CompositeExplicitAutograd")
    return library, torch.ops.dsv4_fake_deep_gemm


def vllm(arch: int = 9) -> dict[str, Any]:
    """vLLM 0.33.0's copy of DeepGEMM 2.8.1: the compressed form only."""

    def fp8_fp4_mqa_logits(q, kv, weights, cu_seq_len_k_start, cu_seq_len_k_end, max_seqlen_k, schedule_meta=None):
        assert schedule_meta is None
        assert max_seqlen_k > 0
        assert q[1] is None
        bounds = (cu_seq_len_k_start, cu_seq_len_k_end)
        return mqa_logits(q[0], kv, weights, *bounds, clean=False, compressed=max_seqlen_k)

    def fp8_fp4_paged_mqa_logits(
        q, kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len, indices=None
    ):
        assert q[1] is None
        rest = (kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len)
        return paged_mqa_logits(q[0], *rest, tokens=(1, 2, 4), pages=(32, 64))

    def fp8_einsum(expr, a, b, d, c=None, recipe=(1, 128, 128), epilogue=None, use_128x4_sfd_layout=False):
        einsum(expr, a, b, d, c, list(recipe), arch=arch)

    _, ops = _torch_ops()
    return {
        "fp8_fp4_mqa_logits": fp8_fp4_mqa_logits,
        "fp8_fp4_paged_mqa_logits": fp8_fp4_paged_mqa_logits,
        "fp8_einsum": fp8_einsum,
        "tf32_hc_prenorm_gemm": ops.tf32_hc_prenorm_gemm,
        "get_paged_mqa_logits_metadata": ops.get_paged_mqa_logits_metadata,
        "get_num_sms": ops.get_num_sms,
    }


LINES = {"tokenspeed": tokenspeed, "sgl": sgl, "vllm": vllm}
