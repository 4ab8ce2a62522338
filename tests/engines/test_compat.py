"""The native libraries' names over the ops: every case of every contract, called as each release line is called."""

from __future__ import annotations

import importlib
import inspect
import logging
import math
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor

from dsv4_backends import ContractError, UnsupportedError, compat
from dsv4_backends.compat import deep_gemm, flash_mla
from dsv4_backends.contract import CONTRACTS, Case
from dsv4_backends.runtime import bind
from dsv4_backends.testing import checks, numerics, oracle

DEVICE = checks.default_device()
LINES: dict[str, dict[str, Callable[..., tuple[Tensor, ...]]]] = {}
"""By op and release line: a call with a contract's arguments, made as that line is called; the contract's results."""
COVERED = {op for op, c in CONTRACTS.items() if re.search(r"Source: (DeepGEMM|FlashMLA) ", c.function.__doc__ or "")}
"""The ops whose ``Source:`` is a function of these libraries."""


def line(op: str, name: str) -> Callable[[Callable[..., tuple[Tensor, ...]]], Callable[..., tuple[Tensor, ...]]]:
    def add(call: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        LINES.setdefault(op, {})[name] = call
        return call

    return add


def heads(x: Tensor | None) -> Tensor | None:
    """With the dimension for the one KV head, which the libraries ask for."""
    return x if x is None or x.dim() == 4 else x.unsqueeze(2)


def one(x: Tensor) -> Tensor:
    """The same where there is no dimension for pages."""
    return x if x.dim() == 3 else x.unsqueeze(1)


@line("sparse_mla_prefill", "source")
def _(q: Tensor, kv: Tensor, indices: Tensor, sm_scale: float, **o: Any) -> tuple[Tensor, ...]:
    return flash_mla.flash_mla_sparse_fwd(q, kv, indices, sm_scale, 512, o.get("attn_sink"), o.get("topk_length"))  # type: ignore[return-value]


@line("sparse_mla_prefill", "vllm")
def _(q: Tensor, kv: Tensor, indices: Tensor, sm_scale: float, **o: Any) -> tuple[Tensor, ...]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    results = flash_mla.flash_mla_sparse_fwd(
        q, one(kv), one(indices), sm_scale, 512, o.get("attn_sink"), o.get("topk_length"), out
    )
    assert results[0] is out
    return results  # type: ignore[return-value]


@line("sparse_mla_prefill", "sglang")
def _(q: Tensor, kv: Tensor, indices: Tensor, sm_scale: float, **o: Any) -> tuple[Tensor, ...]:
    arguments = (q, one(kv), one(indices), sm_scale, 512, o.get("attn_sink"), o.get("topk_length"), True)
    out, max_logits, lse = flash_mla.flash_mla_sparse_fwd(*arguments, True)
    plain = flash_mla.flash_mla_sparse_fwd(*arguments, return_log2_lse=False)
    assert plain[1:] == (None, None)
    assert numerics.same_bits(flash_mla.flash_mla_sparse_fwd(*arguments, False)[0], out)
    assert flash_mla.flash_mla_sparse_fwd(*arguments, False)[1] is None
    assert max_logits is not None
    assert lse is not None
    return out, max_logits * math.log(2), lse * math.log(2)


def decode(o: dict[str, Any], **more: Any) -> tuple[Tensor, Tensor]:
    out, lse = flash_mla.flash_mla_with_kvcache(
        q=o["q"],
        k_cache=heads(o["k_cache"]),  # type: ignore[arg-type]
        block_table=None,
        cache_seqlens=None,
        head_dim_v=512,
        tile_scheduler_metadata=more.pop("metadata", None) or flash_mla.get_mla_metadata()[0],
        is_fp8_kvcache=True,
        indices=o["indices"],
        topk_length=o.get("topk_length"),
        softmax_scale=o["sm_scale"],
        attn_sink=o.get("attn_sink"),
        extra_k_cache=heads(o.get("extra_k_cache")),
        extra_indices_in_kvcache=o.get("extra_indices"),
        extra_topk_length=o.get("extra_topk_length"),
        **more,
    )
    b, s_q, h_q, _ = o["q"].shape
    assert lse.shape == (b, h_q, s_q)
    return out, lse.transpose(1, 2)


@line("sparse_mla_decode", "vllm")
def _(**o: Any) -> tuple[Tensor, ...]:
    out = torch.empty_like(o["q"], memory_format=torch.contiguous_format)
    result, lse = decode(o, out=out)
    assert result is out
    return result, lse


@line("sparse_mla_decode", "source")
def _(**o: Any) -> tuple[Tensor, ...]:
    metadata, nothing = flash_mla.get_mla_metadata(o.get("topk_length"), 1, 1)
    assert nothing is None
    arguments: tuple[Any, ...] = (o["q"], heads(o["k_cache"]), None, None, 512, metadata, None, o["sm_scale"])
    arguments += (False, True, o["indices"], o.get("attn_sink"), heads(o.get("extra_k_cache")))
    arguments += (o.get("extra_indices"), o.get("topk_length"), o.get("extra_topk_length"))
    first = flash_mla.flash_mla_with_kvcache(*arguments)
    assert metadata.have_initialized
    again = flash_mla.flash_mla_with_kvcache(*arguments)
    assert all(numerics.same_bits(a, b) for a, b in zip(first, again, strict=True))
    sglang = flash_mla.flash_mla_with_kvcache(*arguments, False, True, "V4", None, None)
    assert numerics.same_bits(sglang[0], first[0])
    return first[0], first[1].transpose(1, 2)


@line("mqa_logits", "2.6")
def _(q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, row_starts: Tensor, row_ends: Tensor, **o: Any) -> Any:
    width = o.get("max_seqlen_k")
    named = {"clean_logits": True} if width is None else {"clean_logits": False, "max_seqlen_k": width}
    logits = deep_gemm.fp8_fp4_mqa_logits((q, None), (k, k_scale), weights, row_starts, row_ends, **named)
    legacy = deep_gemm.fp8_mqa_logits(q, (k, k_scale), weights, row_starts, row_ends, width is None, width or 0)
    assert numerics.same_bits(legacy.contiguous(), logits.contiguous())
    return (logits,)


@line("mqa_logits", "2.8")
def _(q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, row_starts: Tensor, row_ends: Tensor, **o: Any) -> Any:
    width = o.get("max_seqlen_k")
    columns = width or max(len(k), 1)
    arguments = ((q, None), (k, k_scale), weights, row_starts, row_ends, columns)
    logits = deep_gemm.fp8_fp4_mqa_logits(*arguments)
    assert logits.shape == (len(q), columns)
    assert logits.numel() == 0 or logits.stride(0) % deep_gemm.ROW_ALIGNMENT == 0
    assert numerics.same_bits(deep_gemm.fp8_fp4_mqa_logits(*arguments, None).contiguous(), logits.contiguous())
    if width is not None:
        return (logits,)
    # Back from the compressed form, as a caller of 2.8 would do it.
    full = torch.full((len(q), len(k)), -math.inf, device=q.device)
    for i, (start, end) in enumerate(zip(row_starts.tolist(), row_ends.tolist(), strict=True)):
        start, end = max(start, 0), min(end, len(k))
        if end > start:
            full[i, start:end] = logits[i, : end - start]
    return (full,)


def paged(o: dict[str, Any]) -> tuple[Any, ...]:
    lens = o["context_lens"]
    b, next_n = o["q"].shape[:2]
    lens = lens if lens.dim() == 2 else lens.unsqueeze(1).expand(b, next_n).contiguous()
    page_size = o["k_cache"].shape[1]
    schedule = deep_gemm.get_paged_mqa_logits_metadata(lens, page_size, 7)
    return heads(o["k_cache"]), o["weights"], lens, o["block_table"], schedule, o["max_context_len"]


@line("paged_mqa_logits", "2.6")
def _(**o: Any) -> tuple[Tensor, ...]:
    logits = deep_gemm.fp8_fp4_paged_mqa_logits((o["q"], None), *paged(o), clean_logits=False, indices=None)
    legacy = deep_gemm.fp8_paged_mqa_logits(o["q"], *paged(o), False)
    assert numerics.same_bits(legacy.contiguous(), logits.contiguous())
    assert logits.numel() == 0 or logits.stride(0) % deep_gemm.ROW_ALIGNMENT == 0
    return (logits,)


@line("paged_mqa_logits", "2.8")
def _(**o: Any) -> tuple[Tensor, ...]:
    rows = torch.arange(len(o["q"]), dtype=torch.int32, device=o["q"].device)
    return (deep_gemm.fp8_fp4_paged_mqa_logits((o["q"], None), *paged(o), rows),)


@line("fp8_einsum", "all")
def _(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, **o: Any) -> tuple[Tensor, ...]:
    d = torch.empty((x.shape[0], x.shape[1], w.shape[1]), dtype=torch.bfloat16, device=x.device)
    per_row = w_scale.shape[1] == w.shape[1]
    recipe = (1, 1, 128) if per_row else (1, 128, 128)
    assert deep_gemm.fp8_einsum("bhr,hdr->bhd", (x, x_scale), (w, w_scale), d, recipe=recipe) is None
    return (d,)


@line("hc_prenorm_gemm", "all")
def _(x: Tensor, fn: Tensor, **o: Any) -> tuple[Tensor, ...]:
    splits = o.get("num_splits")
    lead = () if splits is None else (splits,)
    d = torch.full((*lead, len(x), len(fn)), math.nan, device=x.device)
    sqr_sum = torch.full((*lead, len(x)), math.nan, device=x.device)
    assert deep_gemm.tf32_hc_prenorm_gemm(x, fn, d, sqr_sum, splits) is None
    return d, sqr_sum


@pytest.mark.parametrize(
    ("op", "name", "case"),
    [
        pytest.param(op, name, case, id=f"{op}-{name}-{case.name}")
        for op, lines in LINES.items()
        for name in lines
        for case in CONTRACTS[op].at_level("smoke")
    ],
)
def test_values(op: str, name: str, case: Case) -> None:
    """Every smoke case through every line's call is what the oracle says."""
    contract = CONTRACTS[op]
    arguments = contract.inputs(case, DEVICE)
    results = oracle.finished(op, arguments, tuple(LINES[op][name](**arguments)))
    for result, expected, key in zip(results, oracle.expected(op, arguments), contract.returns, strict=True):
        error = numerics.compare(result, expected.to(result.device), contract.tolerances[key])
        assert error.ok, f"{key}: {error}"


def test_every_op_has_a_line() -> None:
    assert set(LINES) == COVERED


def test_one_length_of_a_request_is_its_last_tokens() -> None:
    """In DeepGEMM up to 2.5, token j of a request with one length L sees L - next_n + 1 + j keys."""
    (case,) = (c for c in CONTRACTS["paged_mqa_logits"].cases if c.name == "two tokens")
    o = CONTRACTS["paged_mqa_logits"].inputs(case, DEVICE)
    by_row = o["context_lens"]
    args = (heads(o["k_cache"]), o["weights"])
    rest = (o["block_table"], None, o["max_context_len"])
    flat = by_row[:, -1].contiguous()
    got = deep_gemm.fp8_paged_mqa_logits(o["q"], *args, flat, *rest, clean_logits=True)
    causal = torch.stack([flat - 1, flat], 1).clamp(min=0)
    want = deep_gemm.fp8_paged_mqa_logits(o["q"], *args, causal.int(), *rest)
    assert numerics.same_bits(got.contiguous(), want.contiguous())
    assert (got > -math.inf).sum(-1).tolist() == causal.flatten().tolist()


def test_logits_in_bf16() -> None:
    (case,) = (c for c in CONTRACTS["mqa_logits"].cases if c.name == "random ranges")
    o = CONTRACTS["mqa_logits"].inputs(case, DEVICE)
    args = ((o["q"], None), (o["k"], o["k_scale"]), o["weights"], o["row_starts"], o["row_ends"])
    narrow = deep_gemm.fp8_fp4_mqa_logits(*args, True, 0, torch.bfloat16)
    assert torch.equal(narrow, deep_gemm.fp8_fp4_mqa_logits(*args).bfloat16())


def test_schedule() -> None:
    """[slots + 1, 2], and the same memory every time, so that a captured graph can keep its address."""
    lens = torch.ones(3, 1, dtype=torch.int32, device=DEVICE)
    first = deep_gemm.get_paged_mqa_logits_metadata(lens, 64, 132)
    assert first.shape == (133, 2)
    assert first.dtype is torch.int32
    assert deep_gemm.get_paged_mqa_logits_metadata(lens + 5, 64, 132, indices=lens).data_ptr() == first.data_ptr()
    assert deep_gemm.get_paged_mqa_logits_metadata(lens, 64, 66).shape == (67, 2)


def test_num_sms_and_pdl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep_gemm, "_num_sms", None)
    monkeypatch.setattr(deep_gemm, "_pdl", False)
    assert deep_gemm.get_num_sms() >= 1
    deep_gemm.set_num_sms(20)
    assert deep_gemm.get_num_sms() == 20
    deep_gemm.set_pdl(True)
    assert deep_gemm.get_pdl() is True


# --------------------------------------------------------------------------------------- what no op covers


def _einsum() -> tuple[Any, ...]:
    o = CONTRACTS["fp8_einsum"].inputs(CONTRACTS["fp8_einsum"].cases[0], "cpu")
    d = torch.empty((o["x"].shape[0], o["x"].shape[1], o["w"].shape[1]), dtype=torch.bfloat16)
    return (o["x"], o["x_scale"]), (o["w"], o["w_scale"]), d


def _logits() -> dict[str, Any]:
    o = CONTRACTS["mqa_logits"].inputs(CONTRACTS["mqa_logits"].cases[0], "cpu")
    return {
        "q": (o["q"], None),
        "kv": (o["k"], o["k_scale"]),
        "weights": o["weights"],
        "cu_seq_len_k_start": o["row_starts"],
        "cu_seq_len_k_end": o["row_ends"],
    }


def _paged() -> dict[str, Any]:
    o = CONTRACTS["paged_mqa_logits"].inputs(CONTRACTS["paged_mqa_logits"].cases[0], "cpu")
    names = ("kv_cache", "weights", "context_lens", "block_table", "schedule_meta", "max_context_len")
    return {"q": (o["q"], None), **dict(zip(names, paged(o), strict=True))}


def _decode() -> dict[str, Any]:
    return CONTRACTS["sparse_mla_decode"].inputs(CONTRACTS["sparse_mla_decode"].cases[0], "cpu")


def _prefill(**change: Any) -> tuple[Any, ...]:
    o = CONTRACTS["sparse_mla_prefill"].inputs(CONTRACTS["sparse_mla_prefill"].cases[0], "cpu") | change
    return o["q"], o["kv"], o["indices"], o["sm_scale"]


FP4 = (torch.zeros(5, 8, 16, dtype=torch.int8), torch.zeros(5, 8, dtype=torch.int32))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: deep_gemm.fp8_einsum("bhd,hdr->bhr", *_einsum()), ["fp8_einsum", "expr", "bhd,hdr->bhr"]),
        (lambda: deep_gemm.fp8_einsum("bhr,hdr->bhd", *_einsum(), _einsum()[2]), ["argument c", "accumulation"]),
        (lambda: deep_gemm.fp8_einsum("bhr,hdr->bhd", *_einsum(), recipe=(1, 1, 32)), ["recipe", "(1, 1, 32)"]),
        (lambda: deep_gemm.fp8_einsum("bhr,hdr->bhd", *_einsum(), epilogue=1), ["epilogue"]),
        (lambda: deep_gemm.fp8_einsum("bhr,hdr->bhd", *_einsum()[:2], _einsum()[:2]), ["argument d", "tuple"]),
        (lambda: deep_gemm.fp8_einsum("bhr,hdr->bhd", _einsum()[2], *_einsum()[1:]), ["argument a", "pair"]),
        (lambda: deep_gemm.fp8_fp4_mqa_logits(**_logits() | {"q": FP4}), ["fp8_fp4_mqa_logits", "argument q", "FP4"]),
        (
            lambda: deep_gemm.fp8_fp4_mqa_logits(**_logits() | {"q": (_logits()["q"][0], FP4[1])}),
            ["argument q", "float8_e4m3fn query with scales of its own"],
        ),
        (lambda: deep_gemm.fp8_mqa_logits(**_logits() | {"q": FP4[0]}), ["fp8_mqa_logits", "argument q", "int8"]),
        (lambda: deep_gemm.fp8_fp4_mqa_logits(**_logits() | {"kv": FP4}), ["argument kv", "int8"]),
        (lambda: deep_gemm.fp8_fp4_mqa_logits(**_logits(), logits_dtype=torch.float16), ["logits_dtype", "float16"]),
        (lambda: deep_gemm.fp8_fp4_paged_mqa_logits(**_paged() | {"q": FP4}), ["paged", "argument q", "FP4"]),
        (
            lambda: deep_gemm.fp8_fp4_paged_mqa_logits(**_paged() | {"kv_cache": _paged()["kv_cache"][..., :20]}),
            ["kv_cache", "d + 4 bytes", "20 bytes"],
        ),
        (lambda: decode(_decode() | {"indices": None}), ["flash_mla_with_kvcache", "indices", "dense"]),
        (lambda: decode(_decode(), causal=True), ["causal"]),
        (lambda: decode(_decode(), kv_format="V41"), ["kv_format", "V41"]),
        (lambda: decode(_decode(), descale_q=torch.ones(1)), ["descale_q"]),
        (lambda: decode(_decode(), num_splits=torch.ones(1)), ["num_splits"]),
        (
            lambda: decode(_decode(), enable_batch_invariant=True),
            ["batch_invariant", "torch", "BATCH_INVARIANT"],
        ),
        (
            lambda: decode(_decode() | {"k_cache": torch.zeros(2, 4, 1, 656, dtype=torch.uint8)}),
            ["k_cache", "584", "656 (DeepSeek V3.2)"],
        ),
        (
            lambda: decode(_decode() | {"k_cache": torch.zeros(2, 4, 1, 528, dtype=torch.uint8)}),
            ["k_cache", "528 (DeepSeek V4.1)"],
        ),
        (
            lambda: decode(_decode() | {"extra_k_cache": torch.zeros(2, 4, 1, 288, dtype=torch.uint8)}),
            ["extra_k_cache", "288 (DeepSeek V4.1 FP4)"],
        ),
        (
            lambda: decode(_decode() | {"q": torch.zeros(2, 1, 8, 576).bfloat16()}),
            ["argument q", "576 (DeepSeek V3.2)"],
        ),
        (
            lambda: flash_mla.flash_mla_sparse_fwd(*_prefill(q=torch.zeros(3, 8, 576).bfloat16())),
            ["flash_mla_sparse_fwd", "argument q", "576 (DeepSeek V3.2)"],
        ),
        (lambda: flash_mla.flash_mla_sparse_fwd(*_prefill(), 256), ["d_v", "256"]),
    ],
)
def test_what_no_op_covers_is_named(call: Callable[[], Any], words: list[str]) -> None:
    with pytest.raises(UnsupportedError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def test_a_bf16_cache_and_other_values_are_named() -> None:
    o = _decode()
    args = (o["q"], heads(o["k_cache"]), None, None)
    metadata = flash_mla.get_mla_metadata()[0]
    with pytest.raises(UnsupportedError, match="is_fp8_kvcache: expected True"):
        flash_mla.flash_mla_with_kvcache(*args, 512, metadata, is_fp8_kvcache=False, indices=o["indices"])
    with pytest.raises(UnsupportedError, match="head_dim_v: expected 512, got 256"):
        flash_mla.flash_mla_with_kvcache(*args, 256, metadata, indices=o["indices"])


def test_what_breaks_the_contract_is_an_error_of_the_op() -> None:
    with pytest.raises(ContractError, match="mqa_logits: argument weights") as caught:
        deep_gemm.fp8_fp4_mqa_logits(**_logits() | {"weights": torch.zeros(4, 8)})
    assert not isinstance(caught.value, UnsupportedError)


def test_metadata_belongs_to_its_shapes() -> None:
    metadata = flash_mla.get_mla_metadata()[0]
    decode(_decode(), metadata=metadata)
    decode(_decode(), metadata=metadata)
    o = _decode()
    o["indices"] = o["indices"][..., :-1]
    with pytest.raises(ContractError, match="tile_scheduler_metadata"):
        decode(o, metadata=metadata)


def test_batch_invariance_where_it_is_claimed(fake_plugin: Callable[..., None], monkeypatch: Any) -> None:
    """By what the mode puts in place of the provider's usual function, once the mode is on."""
    source = """
from dsv4_backend_torch.sparse_mla import sparse_mla_decode
from dsv4_backends.provider import Implementation, ProviderSpec, Tier, hookimpl
def also(*args, **kwargs): raise AssertionError("only in the other mode")
@hookimpl
def dsv4_providers():
    own = dict(op="sparse_mla_decode", devices=("cpu",))
    yield ProviderSpec(name="steady", summary="s", tier=Tier.NATIVE, implementations=(
        Implementation(target="steady_plugin:also", **own),
        Implementation(
            target="steady_plugin:sparse_mla_decode", batch_invariant=True, only_batch_invariant=True, **own
        ),
    ))
"""
    fake_plugin("steady", source)
    with pytest.raises(UnsupportedError, match="enable_batch_invariant"):
        decode(_decode(), enable_batch_invariant=True)
    monkeypatch.setenv("DSV4_BACKENDS_BATCH_INVARIANT", "1")
    bind.reset()
    decode(_decode(), enable_batch_invariant=True)
    assert bind.stats()["sparse_mla_decode"] == {"steady": 1}


# ---------------------------------------------------------------------------------------- behind the names

DEEP_GEMM = """
from . import utils
__version__ = "2.6.1"
calls = []
def get_num_sms(): return 11
def use_deterministic_algorithms(on): calls.append(("deterministic", on))
def set_num_sms(n): calls.append(("set_num_sms", n))
def set_pdl(on): calls.append(("set_pdl", on))
def fp8_gemm_nt(a): return ("gemm", a)
def get_paged_mqa_logits_metadata(context_lens, block_kv, num_sms, indices=None):
    return ("schedule", block_kv, num_sms, indices is not None)
def fp8_fp4_paged_mqa_logits(q, kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len, *more):
    return ("paged", schedule_meta, max_context_len, *more)
def fp8_einsum(expr, a, b, d, c=None, recipe=(1, 128, 128)):
    return ("einsum", expr)
"""
FLASH_MLA = """
from .flash_mla_interface import *
__version__ = "1.0.0"
"""
INTERFACE = """
class FlashMLASchedMeta: pass
def get_mla_metadata(*a): return FlashMLASchedMeta(), None
def flash_mla_with_kvcache(q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, **more):
    assert isinstance(tile_scheduler_metadata, FlashMLASchedMeta), tile_scheduler_metadata
    return ("decode", tile_scheduler_metadata)
def flash_mla_sparse_fwd(q, kv, indices, sm_scale): return ("prefill",)
def flash_attn_varlen_func(): return ("varlen",)
"""


@pytest.fixture
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two libraries of the real names, which say that they were called."""
    files = {
        "deep_gemm/__init__.py": DEEP_GEMM,
        "deep_gemm/utils/__init__.py": "from .math import *\n",
        "deep_gemm/utils/math.py": "def ceil_div(a, b): return -(-a // b)\n",
        "deep_gemm/testing/__init__.py": "from .bench import *\ndef calc_diff(a, b): return 0.0\n",
        "deep_gemm/testing/bench.py": "def bench_kineto(fn, names): return fn()\n",
        "flash_mla/__init__.py": FLASH_MLA,
        "flash_mla/flash_mla_interface.py": INTERFACE,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    compat.uninstall()
    for name in [name for name in sys.modules if name.partition(".")[0] in compat.LIBRARIES]:
        del sys.modules[name]


def test_install_and_uninstall(libraries: Path) -> None:
    before = importlib.import_module("deep_gemm")
    with compat.install():
        import deep_gemm as front
        import flash_mla.flash_mla_interface as interface

        assert front is not before
        assert "bhr,hdr->bhd" in (front.fp8_einsum.__doc__ or "")
        assert inspect.signature(front.fp8_einsum) == inspect.signature(deep_gemm.fp8_einsum)
        assert front.fp8_gemm_nt(3) == ("gemm", 3)
        assert front.__version__ == "2.6.1"
        assert front.__path__ == before.__path__
        assert interface.FlashMLASchedMeta is flash_mla.FlashMLASchedMeta
        assert interface.flash_attn_varlen_func() == ("varlen",)
        assert importlib.util.find_spec("deep_gemm") is not None
        from deep_gemm.testing import calc_diff
        from deep_gemm.utils import ceil_div
        from flash_mla import flash_mla_sparse_fwd

        assert ceil_div(7, 2) == 4
        assert calc_diff(1, 2) == 0.0
        assert "fp8_gemm_nt" in dir(front)
        prefill = _prefill()
        assert numerics.same_bits(flash_mla_sparse_fwd(*prefill)[0], flash_mla.flash_mla_sparse_fwd(*prefill)[0])
        assert compat.native("deep_gemm") is before
        assert compat.native("flash_mla").flash_mla_sparse_fwd is not flash_mla_sparse_fwd
        with pytest.raises(AttributeError, match="nothing"):
            _ = front.nothing
    assert sys.modules["deep_gemm"] is before
    assert importlib.import_module("flash_mla.flash_mla_interface").flash_attn_varlen_func() == ("varlen",)
    assert compat.native("deep_gemm") is before


def test_install_is_idempotent_and_takes_back_its_own(libraries: Path) -> None:
    compat.install("flash_mla")
    assert "deep_gemm" not in sys.modules
    front = sys.modules["flash_mla"]
    with compat.install() as done:
        assert done.names == ("deep_gemm",)
        assert sys.modules["flash_mla"] is front
    assert sys.modules["flash_mla"] is front
    somebody = type(sys)("flash_mla")
    sys.modules["flash_mla"] = somebody
    compat.uninstall()
    assert sys.modules["flash_mla"] is somebody
    with pytest.raises(ValueError, match="'deepgemm'"):
        compat.install("deepgemm")


def test_what_no_op_covers_goes_to_the_library(libraries: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With metadata of the library's own, and said once."""
    compat._logged.clear()
    with compat.install():
        dg = importlib.import_module("deep_gemm")
        fm = importlib.import_module("flash_mla")
        o = _paged()
        o["q"] = FP4
        o["schedule_meta"] = dg.get_paged_mqa_logits_metadata(o["context_lens"], 64, 11)
        with caplog.at_level(logging.WARNING, "dsv4_backends"):
            result = dg.fp8_fp4_paged_mqa_logits(*o.values())
            dg.fp8_fp4_paged_mqa_logits(*o.values())
        assert result == ("paged", ("schedule", o["kv_cache"].shape[1], 11, False), o["max_context_len"])
        assert len([r for r in caplog.records if "passed on to deep_gemm itself" in r.message]) == 1
        rows = torch.arange(3, dtype=torch.int32)
        assert dg.fp8_fp4_paged_mqa_logits(*o.values(), rows)[1][3] is True
        assert dg.fp8_einsum("bhd,hdr->bhr", *_einsum()) == ("einsum", "bhd,hdr->bhr")
        metadata, _ = fm.get_mla_metadata()
        cache = torch.zeros(2, 4, 1, 656, dtype=torch.uint8)
        calls = [
            fm.flash_mla_with_kvcache(_decode()["q"], cache, None, None, 512, metadata, indices=_decode()["indices"])
            for _ in range(2)
        ]
        assert calls[0][1] is calls[1][1]
        dg.set_num_sms(9)
        dg.set_pdl(True)
        assert compat.native("deep_gemm").calls == [("set_num_sms", 9), ("set_pdl", True)]
    deep_gemm._num_sms, deep_gemm._pdl = None, False


SCRIPT = """
import torch
import deep_gemm
import flash_mla
from deep_gemm.testing import bench_kineto, calc_diff
from deep_gemm.utils.math import ceil_div
from flash_mla.flash_mla_interface import get_mla_metadata

if __name__ == "__main__":
    print(deep_gemm.__path__)
    deep_gemm.use_deterministic_algorithms(False)
    o = given["mqa_logits"]
    named = dict(q=(o["q"], None), kv=(o["k"], o["k_scale"]), weights=o["weights"],
                 cu_seq_len_k_start=o["row_starts"], cu_seq_len_k_end=o["row_ends"])
    got["mqa_logits"] = [deep_gemm.fp8_fp4_mqa_logits(**named, max_seqlen_k=o["max_seqlen_k"]),
                         deep_gemm.fp8_fp4_mqa_logits(**named, max_seqlen_k=o["max_seqlen_k"], schedule_meta=None)]
    positional = (o["q"], (o["k"], o["k_scale"]), o["weights"], o["row_starts"], o["row_ends"])
    got["mqa_logits"].append(
        deep_gemm.fp8_mqa_logits(*positional, max_seqlen_k=o["max_seqlen_k"], clean_logits=False))

    o = given["paged_mqa_logits"]
    cache = o["k_cache"].unsqueeze(2) if o["k_cache"].dim() == 3 else o["k_cache"]
    plan = deep_gemm.get_paged_mqa_logits_metadata(
        context_lens=o["context_lens"], block_kv=cache.shape[1], num_sms=deep_gemm.get_num_sms(), indices=None)
    named = dict(q=(o["q"], None), kv_cache=cache, weights=o["weights"], context_lens=o["context_lens"],
                 block_table=o["block_table"], schedule_meta=plan, max_context_len=o["max_context_len"])
    got["paged_mqa_logits"] = [deep_gemm.fp8_fp4_paged_mqa_logits(**named, indices=None),
                               deep_gemm.fp8_fp4_paged_mqa_logits(**named, clean_logits=False)]

    o = given["fp8_einsum"]
    z = torch.empty((*o["x"].shape[:2], o["w"].shape[1]), dtype=torch.bfloat16, device=o["x"].device)
    deep_gemm.fp8_einsum("bhr,hdr->bhd", (o["x"], o["x_scale"]), (o["w"], o["w_scale"]), z)
    got["fp8_einsum"] = [z]

    o = given["hc_prenorm_gemm"]
    d = torch.empty((16, len(o["x"]), len(o["fn"])), device=o["x"].device)
    s = torch.empty((16, len(o["x"])), device=o["x"].device)
    bench_kineto(lambda: deep_gemm.tf32_hc_prenorm_gemm(o["x"], o["fn"], d, s, num_splits=16), "tf32_hc_prenorm_gemm")
    got["hc_prenorm_gemm"] = [(d.sum(0), s.sum(0))]

    o = given["sparse_mla_prefill"]
    kv, indices = (t.unsqueeze(1) if t.dim() == 2 else t for t in (o["kv"], o["indices"]))
    got["sparse_mla_prefill"] = [flash_mla.flash_mla_sparse_fwd(
        o["q"], kv, indices, sm_scale=o["sm_scale"], attn_sink=o.get("attn_sink"), topk_length=o.get("topk_length"))]

    o = given["sparse_mla_decode"]
    caches = [c.unsqueeze(2) if c is not None and c.dim() == 3 else c for c in (o["k_cache"], o.get("extra_k_cache"))]
    plan, splits = flash_mla.get_mla_metadata()
    assert type(plan) is type(get_mla_metadata()[0])
    out, lse = flash_mla.flash_mla_with_kvcache(
        o["q"], caches[0], None, None, 512, plan, splits, o["sm_scale"], False, True, o["indices"], o.get("attn_sink"),
        caches[1], o.get("extra_indices"), o.get("topk_length"), o.get("extra_topk_length"))
    got["sparse_mla_decode"] = [(out, lse.transpose(1, 2))]
    assert ceil_div(7, 2) == 4 and calc_diff(out, out) == 0
"""
"""The imports and the forms of call that the libraries' own test scripts have, each op once."""


def test_a_script_by_the_libraries_names(libraries: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = {"mqa_logits": "compressed", "paged_mqa_logits": "two tokens", "sparse_mla_decode": "two scopes"}
    given = {}
    for op in COVERED:
        contract = CONTRACTS[op]
        cases = contract.at_level("smoke")
        case = next((case for case in cases if case.name == made.get(op)), cases[0])
        given[op] = contract.inputs(case, DEVICE)
    given["mqa_logits"].setdefault("max_seqlen_k", 7)
    (libraries / "script.py").write_text(SCRIPT)
    got: dict[str, list[Any]] = {}
    with compat.install():
        runpy.run_path(str(libraries / "script.py"), {"given": given, "got": got}, "__main__")
        assert compat.native("deep_gemm").calls == [("deterministic", False)]
    assert str(libraries) in capsys.readouterr().out
    assert set(got) == COVERED
    for op, several in got.items():
        given[op].pop("num_splits", None)
        for results in several:
            results = results if isinstance(results, tuple) else (results,)
            expected = oracle.expected(op, given[op])
            for result, want, key in zip(results, expected, CONTRACTS[op].returns, strict=True):
                error = numerics.compare(result, want.to(result.device), CONTRACTS[op].tolerances[key])
                assert error.ok, f"{op}: {key}: {error}"


def test_the_command_that_runs_a_script(libraries: Path) -> None:
    (libraries / "beside.py").write_text("word = 'beside'")
    script = libraries / "script.py"
    script.write_text(
        "import sys, deep_gemm, beside; print(sys.argv[1:], deep_gemm.fp8_einsum.__module__, beside.word)"
    )
    command = [sys.executable, "-m", "dsv4_backends.compat"]
    result = subprocess.run([*command, str(script), "--x"], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["['--x']", "dsv4_backends.compat.deep_gemm", "beside"]
    missing = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (missing.returncode, "SCRIPT" in missing.stderr) == (1, True)


def test_without_a_library() -> None:
    assert importlib.util.find_spec("deep_gemm") is None, "this test is about a machine without it"
    with compat.install():
        import deep_gemm as front

        assert front.__path__ == []
        with pytest.raises(AttributeError, match="no deep_gemm is installed behind it"):
            _ = front.fp8_gemm_nt
        with pytest.raises(ModuleNotFoundError, match=r"deep_gemm\.testing"):
            importlib.import_module("deep_gemm.testing")
        with pytest.raises(UnsupportedError, match="expr"):
            front.fp8_einsum("bhd,hdr->bhr", *_einsum())
        with pytest.raises(ModuleNotFoundError):
            compat.native("deep_gemm")
        assert sys.modules["deep_gemm"] is front
    assert "deep_gemm" not in sys.modules


ENGINES_IMPORT = """
import deep_gemm, deep_gemm.utils.layout, deep_gemm.utils.math, flash_mla
from deep_gemm import fp8_fp4_mqa_logits, fp8_fp4_paged_mqa_logits, fp8_paged_mqa_logits
from deep_gemm import get_paged_mqa_logits_metadata
from deep_gemm import per_block_cast_to_fp8, transform_sf_into_required_layout, transform_weights_for_mega_moe
from deep_gemm.utils import align, get_tma_aligned_size
from deep_gemm.utils.layout import get_mn_major_tma_aligned_tensor
from deep_gemm.utils.math import pack_ue8m0_to_int, transform_ue4m3_sf_into_required_layout
from flash_mla import fused_norm_rope_attn_rope_cast
from flash_mla.flash_mla_interface import FlashMLASchedMeta
deep_gemm.utils.layout.get_mn_major_tma_aligned_packed_ue8m0_tensor
flash_mla.get_mla_decoding_metadata
assert deep_gemm.__version__ and flash_mla.__version__
"""
"""What SGLang 0.5.23 imports of the two modules, at import and in functions. vLLM 0.33 has getattr with a default."""


def test_what_engines_import_exists_without_a_library() -> None:
    assert importlib.util.find_spec("deep_gemm") is None, "this test is about a machine without it"
    before = set(sys.modules)
    with compat.install():
        exec(ENGINES_IMPORT, {})
        for module, names in compat.IMPORTED.items():
            front = importlib.import_module(module)
            assert set(names) <= set(dir(front))
            for name in names:
                call = getattr(front, name)
                with pytest.raises(UnsupportedError, match=rf"^{module}\.{name}: no op .* covers it, and no "):
                    call(1, other=2)
        front = importlib.import_module("deep_gemm")
        Version(front.__version__)
        # SGLang and vLLM ask for these before they choose a path of their own.
        for name in (
            "fp8_gemm_nt",
            "m_grouped_fp8_fp4_gemm_nt_contiguous",
            "mega_mhc",
            "fp8_mega_moe",
            "bf16_mega_gate",
        ):
            assert not hasattr(front, name)
    assert not {name for name in set(sys.modules) - before if name.partition(".")[0] in compat.LIBRARIES}


def test_what_engines_import_is_the_librarys_where_it_has_it(libraries: Path) -> None:
    (libraries / "deep_gemm" / "utils" / "__init__.py").write_text(
        "from .math import *\ndef align(x, y): return 'own'\n"
    )
    with (libraries / "flash_mla" / "__init__.py").open("a") as file:
        file.write("def get_mla_decoding_metadata(): return 'own'\n")
    with compat.install():
        from deep_gemm.utils import align, ceil_div
        from flash_mla import fused_norm_rope_attn_rope_cast, get_mla_decoding_metadata

        assert align(1, 2) == get_mla_decoding_metadata() == "own"
        assert ceil_div(3, 2) == 2
        with pytest.raises(UnsupportedError, match="the library behind it has none either"):
            fused_norm_rope_attn_rope_cast()


def test_another_library_under_the_name_gets_no_calls(libraries: Path) -> None:
    """AppMana's flash-mla has flash_mla_with_kvcache with other arguments, and names of its own."""
    for file in ("__init__", "flash_mla_interface"):
        (libraries / "flash_mla" / f"{file}.py").write_text(
            "from fakes.flash_mla import appmana\nglobals().update(appmana())"
        )
    with compat.install("flash_mla"):
        front: Any = importlib.import_module("flash_mla")
        assert front.flash_sparse_mla_decode(1, 2, 3, 4) == "AppMana's own"
        with pytest.raises(UnsupportedError, match="dense attention"):
            front.flash_mla_with_kvcache(
                *(torch.zeros(1, 1, 1, 512),) * 2, None, None, 512, front.get_mla_metadata()[0]
            )


def test_a_library_that_does_not_load(libraries: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its Python modules are still there, and its own words are in every error."""
    (libraries / "deep_gemm" / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open')\n")
    with compat.install("deep_gemm"):
        front = importlib.import_module("deep_gemm")
        with pytest.raises(AttributeError, match=r"libcudart\.so\.13"):
            _ = front.fp8_gemm_nt
        assert importlib.import_module("deep_gemm.testing").calc_diff(1, 1) == 0.0
        with pytest.raises(UnsupportedError), caplog.at_level(logging.WARNING, "dsv4_backends"):
            front.fp8_einsum("bhd,hdr->bhr", *_einsum())
        assert "libcudart.so.13" in caplog.text
        a, b, d = _einsum()
        front.fp8_einsum("bhr,hdr->bhd", a, b, d)
        assert torch.isfinite(d.float()).all()


def test_importing_it_is_light() -> None:
    code = (
        "import sys; from dsv4_backends import compat\n"
        "assert not {'torch', 'dsv4_backends.ops'} & set(sys.modules)\n"
        "assert compat.flash_mla.flash_mla_sparse_fwd"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_whoever_keeps_a_front_has_the_library_after_uninstall(libraries: Path) -> None:
    """And ours again once it is installed again: there is one front for a name."""
    with compat.install():
        front: Any = importlib.import_module("deep_gemm")
        interface: Any = importlib.import_module("flash_mla.flash_mla_interface")
        ours = front.fp8_einsum
        assert compat.installed("deep_gemm")
    library = importlib.import_module("deep_gemm")
    assert not compat.installed("deep_gemm")
    assert front is not library
    assert front.fp8_einsum is library.fp8_einsum
    assert interface.flash_mla_sparse_fwd is compat.native("flash_mla.flash_mla_interface").flash_mla_sparse_fwd
    with compat.install():
        assert importlib.import_module("deep_gemm") is front
        assert front.fp8_einsum.__doc__ == ours.__doc__
        assert front.fp8_einsum is not library.fp8_einsum
