"""The real vLLM over the ops, without its compiled parts: ``FAKE_SM=9.0 pytest tests/engines/vllm_suite.py``.

Not part of the usual suite: vLLM needs an environment of its own. The plugin is loaded the way vLLM loads it, vLLM's
own functions are called, and their results are compared with the oracle. ``TEST_PIN`` and ``TEST_ORDER`` are what
``DSV4_BACKENDS_PIN`` and ``_ORDER`` shall be; tensors are on the first GPU where there is one.
"""

from __future__ import annotations

import importlib
import json
import logging
import multiprocessing
import os
import re
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
import torch
from paths import ROOT
from torch import Tensor

from dsv4_backends import UnsupportedError
from dsv4_backends.contract import CONTRACTS, Case, layouts
from dsv4_backends.engines import hook, patching
from dsv4_backends.engines import vllm as engine
from dsv4_backends.runtime import bind
from dsv4_backends.selection import policy
from dsv4_backends.testing import checks, numerics, oracle

pytestmark = pytest.mark.filterwarnings("default")

SM = os.environ.setdefault("FAKE_SM", "9.0")
WISHES = {key: os.environ[f"TEST_{key}"] for key in ("PIN", "ORDER") if os.environ.get(f"TEST_{key}")}
MAJOR = int(SM.partition(".")[0])
DEVICE = checks.default_device()

# What a user's environment would say, before vLLM starts.
OPTIONS = {"ENGINE_OPTIONS": "flashmla_sm120"} if MAJOR == 12 else {}
SETTINGS = {f"{policy.PREFIX}{key}": value for key, value in {"ENGINE": "1", **OPTIONS, **WISHES}.items()}
os.environ.update(SETTINGS)
fake_cuda.install(Path(tempfile.mkdtemp()))

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's own warnings are its own affair
    plugins = importlib.import_module("vllm.plugins")
    plugins.load_general_plugins()
    WAITED = hook.waiting()
    STARTED = engine.plan()
    dg = importlib.import_module("vllm.utils.deep_gemm")
    o_proj = importlib.import_module("vllm.models.deepseek_v4.nvidia.ops.o_proj")
    flashmla = importlib.import_module("vllm.models.deepseek_v4.nvidia.flashmla")
    tilelang = importlib.import_module("vllm.model_executor.kernels.mhc.tilelang")
    indexer = importlib.import_module("vllm.v1.attention.backends.mla.indexer")
    layer = importlib.import_module("vllm.model_executor.layers.sparse_attn_indexer")
    sparse_swa = importlib.import_module("vllm.v1.attention.backends.mla.sparse_swa")
    source = importlib.import_module("vllm.v1.attention.ops.flashmla")
    attention = importlib.import_module("vllm.models.deepseek_v4.attention")
    compressor = importlib.import_module("vllm.models.deepseek_v4.compressor")
    model = importlib.import_module("vllm.models.deepseek_v4.nvidia.model")
    marlin = importlib.import_module("vllm.model_executor.kernels.linear.scaled_mm.marlin")
    jit_warmup = importlib.import_module("vllm.model_executor.warmup.jit_warmup")
    if DEVICE.type == "cpu":
        # Without Triton's driver vLLM has a stand-in for Triton, which this module cannot be imported with on Hopper.
        mamba: Any = types.ModuleType("vllm.model_executor.layers.mamba.ops.ssd_chunk_scan")
        mamba.__getattr__ = lambda name: None
        sys.modules[mamba.__name__] = mamba
    for last in ("models.deepseek_v4.nvidia.mtp", "models.deepseek_v4.nvidia.dspark", "v1.worker.gpu_worker"):
        importlib.import_module(f"vllm.{last}")
CUDA_STARTED = torch.cuda.is_initialized()
LIBRARY_IMPORTED = [m for m in sys.modules if m == "deep_gemm" or m.startswith("vllm.third_party.deep_gemm")]

COMPRESSED = "max_seqlen_k" in (dg.fp8_fp4_mqa_logits.__code__.co_varnames)
"""0.33 asks for compressed logits, 0.32 for all columns."""


@pytest.fixture(autouse=True)
def settings(clean_settings: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    yield
    if not engine.ENGINE.rows:
        engine.apply()


def calls(attribute: str) -> int:
    return sum(row.calls for row in engine.plan().rows if row.target.attribute == attribute)


def cases(op: str) -> list[Any]:
    return [pytest.param(case, id=case.name) for case in CONTRACTS[op].at_level("smoke")]


def agree(op: str, arguments: dict[str, Any], results: tuple[Tensor, ...], names: tuple[str, ...] = ()) -> None:
    """Compare with the oracle; ``names``: only these results."""
    contract = CONTRACTS[op]
    expected = dict(zip(contract.returns, oracle.expected(op, arguments), strict=True))
    if not names:
        results = oracle.finished(op, arguments, results)
    for name, result in zip(names or contract.returns, results, strict=True):
        error = numerics.compare(result, expected[name].to(result.device), contract.tolerances[name])
        assert error.ok, f"{name}: {error}"


# ---------------------------------------------------------------------------------------------- how it came in


def test_loaded_by_its_entry_point() -> None:
    assert plugins.plugins_loaded
    assert "vllm.models.deepseek_v4.nvidia.flashmla" in WAITED or "vllm.utils.deep_gemm" in WAITED
    assert STARTED.version is not None
    assert STARTED.version.startswith(("0.32.0", "0.33.0"))
    assert STARTED.enabled
    assert STARTED.ok, [(row.target.key, row.reasons) for row in STARTED.rows]
    assert hook.waiting() == ()
    assert hook._FINDER not in sys.meta_path


def test_nothing_was_started() -> None:
    """Neither CUDA, which a process that forks must not have, nor DeepGEMM before vLLM asks for it."""
    assert not CUDA_STARTED
    assert LIBRARY_IMPORTED == []


def test_the_platform_is_what_it_says() -> None:
    platform = importlib.import_module("vllm.platforms").current_platform
    assert platform.is_cuda()
    assert str(platform.get_device_capability().to_int()) == SM.replace(".", "")


def test_every_target_is_replaced() -> None:
    dg._lazy_init()
    states = {row.target.attribute: row.state for row in engine.plan().rows}
    assert states.pop("get_mla_metadata") == patching.NOT_NEEDED
    schedule = states.pop("DeepseekSparseSWAMetadataBuilder.build_tile_scheduler")
    assert schedule == (patching.REPLACED if OPTIONS else patching.NOT_NEEDED)
    assert set(states.values()) == {patching.REPLACED}
    assert dg._lazy_init.__module__ == dg.__name__
    assert not hasattr(dg._lazy_init, "__wrapped__")


def test_the_pages_flags_are_vllms() -> None:
    """Every ``vllm serve`` of the page, and every flag and variable that its text names."""
    arguments = importlib.import_module("vllm.engine.arg_utils").AsyncEngineArgs
    parser = arguments.add_cli_args(importlib.import_module("vllm.utils.argparse_utils").FlexibleArgumentParser())
    known = {option for action in parser._actions for option in action.option_strings}
    page = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    page = "\n## ".join(part for part in page.split("\n## ") if not part.startswith("SGLang"))
    served = [line.split()[2:] for line in page.splitlines() if line.startswith("vllm serve ")]
    assert len(served) > 5
    named = [quoted.split() for quoted in re.findall(r"`(--[a-z][^`]*)`", page)]
    own = ("--tp", "--device", "--next-n", "--memory")  # of the command check
    for words in (*(line[1:] for line in served), *(words for words in named if words[0] not in own)):
        assert {word for word in words if word.startswith("--")} <= known, words
        if len(words) > 1:
            parser.parse_args(words)
    variables = importlib.import_module("vllm.envs").environment_variables
    assert set(re.findall(r"\bVLLM_\w+", page)) <= variables.keys()


def test_registering_again_changes_nothing() -> None:
    before = (dg._fp8_einsum_impl, flashmla.flash_mla_sparse_fwd, engine.ENGINE.rows)
    engine.register()
    plugins.load_general_plugins()
    assert before == (dg._fp8_einsum_impl, flashmla.flash_mla_sparse_fwd, engine.ENGINE.rows)


def _child(queue: Any) -> None:
    engine.register()
    out, squares = torch.empty(1, 2, 24), torch.empty(1, 2)
    dg.tf32_hc_prenorm_gemm(torch.ones(2, 64).bfloat16(), torch.ones(24, 64), out, squares, 1)
    queue.put((out.unique().tolist(), calls("_tf32_hc_prenorm_gemm_impl")))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the parent uses the GPU, so a fork of it cannot")
def test_in_a_forked_process() -> None:
    """What the parent replaced is replaced in the child, where the entry point is called once more."""
    before = calls("_tf32_hc_prenorm_gemm_impl")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == ([64.0], before + 1)
    child.join()
    assert child.exitcode == 0


# -------------------------------------------------------------------------------- vLLM's names reach the ops


@pytest.mark.parametrize("case", cases("fp8_einsum"))
def test_fp8_einsum(case: Case) -> None:
    o = CONTRACTS["fp8_einsum"].inputs(case, DEVICE)
    d = torch.empty((*o["x"].shape[:2], o["w"].shape[1]), dtype=torch.bfloat16, device=DEVICE)
    before = calls("_fp8_einsum_impl")
    dg.fp8_einsum("bhr,hdr->bhd", (o["x"], o["x_scale"]), (o["w"], o["w_scale"]), d, recipe=(1, 128, 128))
    agree("fp8_einsum", o, (d,))
    assert calls("_fp8_einsum_impl") == before + 1


@pytest.mark.parametrize("case", cases("mqa_logits"))
def test_mqa_logits(case: Case) -> None:
    o = CONTRACTS["mqa_logits"].inputs(case, DEVICE)
    arguments = ((o["q"], None), (o["k"], o["k_scale"]), o["weights"], o["row_starts"], o["row_ends"])
    if COMPRESSED:
        o["max_seqlen_k"] = o.get("max_seqlen_k") or max(len(o["k"]), 1)
        logits = dg.fp8_fp4_mqa_logits(*arguments, o["max_seqlen_k"])
        assert logits.shape == (len(o["q"]), o["max_seqlen_k"])
    else:
        o.pop("max_seqlen_k", None)
        logits = dg.fp8_fp4_mqa_logits(*arguments, clean_logits=False)
        assert logits.shape == (len(o["q"]), len(o["k"]))
    agree("mqa_logits", o, (logits,))


@pytest.mark.parametrize("case", cases("paged_mqa_logits"))
def test_paged_mqa_logits(case: Case) -> None:
    o = CONTRACTS["paged_mqa_logits"].inputs(case, DEVICE)
    b, next_n = o["q"].shape[:2]
    lens = o["context_lens"] if o["context_lens"].dim() == 2 else o["context_lens"].unsqueeze(1).expand(b, next_n)
    lens = lens.contiguous()
    cache = o["k_cache"] if o["k_cache"].dim() == 4 else o["k_cache"].unsqueeze(2)
    schedule = dg.get_paged_mqa_logits_metadata(lens, cache.shape[1], 8)
    slots = 4 if next_n == 4 and MAJOR == 9 else 8
    assert schedule.shape == (slots + 1, 2)
    buffer = torch.empty((9, 2), dtype=torch.int32, device=DEVICE)[: schedule.shape[0]]
    buffer[:] = schedule
    more = {} if COMPRESSED else {"clean_logits": False}
    before = calls("_fp8_fp4_paged_mqa_logits_impl")
    logits = dg.fp8_fp4_paged_mqa_logits(
        (o["q"], None),
        cache,
        o["weights"],
        lens,
        o["block_table"],
        buffer,
        max_model_len=o["max_context_len"],
        indices=None,
        **more,
    )
    agree("paged_mqa_logits", o, (logits,))
    assert calls("_fp8_fp4_paged_mqa_logits_impl") == before + 1


@pytest.mark.parametrize("case", cases("hc_prenorm_gemm"))
def test_hc_prenorm_gemm(case: Case) -> None:
    o = CONTRACTS["hc_prenorm_gemm"].inputs(case, DEVICE)
    splits = o.pop("num_splits", None) or 1
    out = torch.full((splits, len(o["x"]), len(o["fn"])), float("nan"), device=DEVICE)
    squares = torch.full((splits, len(o["x"])), float("nan"), device=DEVICE)
    dg.tf32_hc_prenorm_gemm(o["x"], o["fn"], out, squares, splits)
    agree("hc_prenorm_gemm", o, (out.sum(0), squares.sum(0)))


@pytest.mark.parametrize("case", cases("sparse_mla_prefill"))
def test_flash_mla_sparse_fwd(case: Case) -> None:
    o = CONTRACTS["sparse_mla_prefill"].inputs(case, DEVICE)
    kv = o["kv"] if o["kv"].dim() == 3 else o["kv"].unsqueeze(1)
    indices = o["indices"] if o["indices"].dim() == 3 else o["indices"].unsqueeze(1)
    out = torch.empty_like(o["q"], memory_format=torch.contiguous_format)
    result, *rest = flashmla.flash_mla_sparse_fwd(
        q=o["q"],
        kv=kv,
        indices=indices,
        sm_scale=o["sm_scale"],
        attn_sink=o.get("attn_sink"),
        topk_length=o.get("topk_length"),
        out=out,
    )
    assert result is out
    agree("sparse_mla_prefill", o, (out, *rest))


@pytest.mark.parametrize("case", cases("sparse_mla_decode"))
def test_flash_mla_with_kvcache(case: Case) -> None:
    o = CONTRACTS["sparse_mla_decode"].inputs(case, DEVICE)

    def heads(cache: Tensor | None) -> Tensor | None:
        return cache if cache is None or cache.dim() == 4 else cache.unsqueeze(2)

    out, lse = flashmla.flash_mla_with_kvcache(
        q=o["q"],
        k_cache=heads(o["k_cache"]),
        block_table=None,
        head_dim_v=512,
        tile_scheduler_metadata=sparse_swa.get_mla_metadata()[0],
        cache_seqlens=None,
        is_fp8_kvcache=True,
        indices=o["indices"],
        topk_length=o.get("topk_length"),
        softmax_scale=o["sm_scale"],
        attn_sink=o.get("attn_sink"),
        extra_k_cache=heads(o.get("extra_k_cache")),
        extra_indices_in_kvcache=o.get("extra_indices"),
        extra_topk_length=o.get("extra_topk_length"),
        out=torch.empty_like(o["q"], memory_format=torch.contiguous_format),
    )
    agree("sparse_mla_decode", o, (out, lse.transpose(1, 2)))


@pytest.mark.parametrize("case", cases("inverse_rope_quant"))
def test_inverse_rope_before_an_fp8_projection(case: Case) -> None:
    o = CONTRACTS["inverse_rope_quant"].inputs(case, DEVICE)
    padded = torch.nn.functional.pad(o["x"], (0, 0, 0, 3), value=float("nan"))  # heads that are not there
    results = o_proj.fused_inv_rope_fp8_quant(
        padded,
        o["positions"],
        o["cos_sin"],
        n_groups=o["groups"],
        heads_per_group=o["x"].shape[1] // o["groups"],
        tma_aligned_scales=o.get("packed", False),
    )
    agree("inverse_rope_quant", o, results)


@pytest.mark.parametrize("case", cases("inverse_rope"))
def test_inverse_rope_before_a_projection_in_bf16(case: Case) -> None:
    o = CONTRACTS["inverse_rope"].inputs(case, DEVICE)
    heads = o["x"].shape[1] // o["groups"]
    result, nothing = o_proj.fused_inv_rope_fp8_quant(
        o["x"], o["positions"], o["cos_sin"], o["groups"], heads, quantize=False
    )
    assert nothing.numel() == 0
    agree("inverse_rope", o, (result,))


@pytest.mark.parametrize("case", cases("indexer_q_rope_quant"))
def test_indexer_query(case: Case) -> None:
    o = CONTRACTS["indexer_q_rope_quant"].inputs(case, DEVICE)
    o.pop("hadamard", None)  # vLLM has none
    head_scale = o["q"].shape[1] ** -0.5
    results = attention.fused_indexer_q_rope_quant(
        o["positions"], o["q"], o["cos_sin"], o["weights"], o["scale"] / head_scale, head_scale, use_fp4=False
    )
    agree("indexer_q_rope_quant", o, results)


def in_place(op: str, o: dict[str, Any], call: Callable[[], object]) -> None:
    """Compare what a call writes with what the oracle would have written."""
    contract = CONTRACTS[op]
    expected = oracle.expected(op, {k: v.clone() if isinstance(v, Tensor) else v for k, v in o.items()})
    call()
    for name, want, got in zip(
        contract.returns, expected, oracle.finished(op, o, (o[contract.returns[0]],)), strict=True
    ):
        error = numerics.compare(got, want.to(got.device), contract.tolerances[name])
        assert error.ok, f"{name}: {error}"


@pytest.mark.parametrize("case", cases("gather_dequant_kv"))
def test_gather(case: Case) -> None:
    o = CONTRACTS["gather_dequant_kv"].inputs(case, DEVICE)
    arguments = {name: o[name] for name in ("seq_lens", "block_table")}
    page_size, lens, offset = o["k_cache"].shape[1], o.get("gather_lens"), o.get("offset", 0)
    more = {"gather_lens": lens, "block_size": page_size, "offset": offset, **arguments}
    in_place("gather_dequant_kv", o, lambda: flashmla.dequantize_and_gather_k_cache(o["out"], o["k_cache"], **more))


@pytest.mark.parametrize("op", ["compress_norm_rope_insert", "indexer_compress_insert"])
@pytest.mark.parametrize("name", ["small", "no tokens", "without overlap", "ratio 128", "wide pages", "decode"])
def test_compressors(op: str, name: str) -> None:
    """Both by the method that decides between vLLM's kernels, called as the layer calls it."""
    (case,) = (case for case in CONTRACTS[op].at_level("smoke") if case.name == name)
    o = CONTRACTS[op].inputs(case, DEVICE)
    dim, width = len(o["norm_weight"]), o["state"].shape[2] // 2
    block_scale = (64, 576, 8) if dim == 512 else (128, 128, 4)
    layer_of_cache = types.SimpleNamespace(kv_cache=o["k_cache"])
    this = types.SimpleNamespace(
        head_dim=dim,
        rope_head_dim=64,
        compress_ratio=o["ratio"],
        overlap=width == 2 * dim,
        use_fp4_cache=False,
        k_cache_prefix="cache",
        norm=types.SimpleNamespace(weight=o["norm_weight"]),
        rms_norm_eps=o["eps"],
        _static_forward_context={"cache": layer_of_cache},
        _use_two_stage_fused_compressor=False,
        **dict(zip(("_quant_block", "_token_stride", "_scale_dim"), block_scale, strict=True)),
    )
    state = types.SimpleNamespace(
        token_to_req_indices=o["requests"],
        slot_mapping=torch.zeros_like(o["slots"]),
        block_table=o["block_table"],
        block_size=o["state"].shape[1],
    )
    metadata = {"cache": types.SimpleNamespace(slot_mapping=o["slots"])}
    method = compressor.DeepseekCompressor._compress_norm_rope_store
    rotary = types.SimpleNamespace(cos_sin_cache=o["cos_sin"])
    before = sum(bind.stats().get(op, {}).values())
    in_place(op, o, lambda: method(this, state, o["state"], width, o["positions"], rotary, metadata, {}))
    assert sum(bind.stats()[op].values()) == before + 1


@pytest.mark.parametrize("scales", [torch.float32, torch.float8_e8m0fnu])
@pytest.mark.parametrize("in_bf16", [False, True])
def test_the_output_projections_weight(monkeypatch: pytest.MonkeyPatch, scales: torch.dtype, in_bf16: bool) -> None:
    """Marlin's kernel leaves it as it is, or in bf16; any other weight is Marlin's."""
    monkeypatch.setenv("DSV4_BACKENDS_ENGINE_OPTIONS", "wo_a_bf16" if in_bf16 else "")
    groups, rows, columns = 2, 256, 384
    weight = torch.randn(groups * rows, columns).to(torch.float8_e4m3fn)
    scale = torch.randint(-9, 3, (groups * rows // 128, columns // 128)).float().exp2()
    loaded = torch.nn.Module()
    loaded.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    loaded.weight_scale_inv = torch.nn.Parameter(scale.to(scales), requires_grad=False)
    loaded.is_bmm, loaded.bmm_batch_size, loaded.weight_block_size = True, groups, [128, 128]
    kernel = object.__new__(marlin.MarlinFP8ScaledMMLinearKernel)
    kernel.process_weights_after_loading(loaded)
    if in_bf16:
        whole = weight.float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        assert torch.equal(loaded.weight, whole.bfloat16())
    else:
        assert torch.equal(loaded.weight.view(torch.uint8), weight.view(groups, rows, columns).view(torch.uint8))
        assert torch.equal(loaded.weight_scale_inv, scale.view(groups, rows // 128, columns // 128))
    loaded.is_bmm = False
    with pytest.raises(AttributeError):  # Marlin's own begins, and this is no whole layer
        kernel.process_weights_after_loading(loaded)


def test_warm_up_without_what_is_replaced() -> None:
    """vLLM does not compile what nothing calls, and packs FP8 as bytes."""
    common = importlib.import_module("vllm.v1.attention.ops.common")
    rope = importlib.import_module("vllm.models.deepseek_v4.common.ops.fused_inv_rope_fp8_quant")
    registry = jit_warmup.JitWarmupRegistry(None)
    with registry.activate():
        rope._FUSED_INV_ROPE_FP8_QUANT_KERNEL.register_warmup()
        assert len(registry) == 0
        common._UNPACK_SEQ_TRITON_KERNEL.register_warmup()
        common._PACK_SEQ_TRITON_KERNEL.register_warmup(dtype=torch.float8_e4m3fn, pad_value=-float("inf"))
    assert [kwargs for _, kwargs in registry._registrations[common._PACK_SEQ_TRITON_KERNEL]] == [
        {"dtype": torch.uint8, "pad_value": 0}
    ]
    assert len(registry) == 2


@pytest.mark.skipif(MAJOR != 12, reason="elsewhere vLLM makes a schedule itself")
def test_the_schedule_on_12() -> None:
    builder = types.SimpleNamespace(_layer_types=["c4a", "c128a"])
    build = sparse_swa.DeepseekSparseSWAMetadataBuilder.build_tile_scheduler
    made = build(builder, 3)
    assert made["c4a"] is not None
    assert made["c4a"] is not made["c128a"]
    assert made["swaonly"] is None
    assert not any(build(builder, 0).values())


@pytest.mark.skipif(importlib.util.find_spec("tilelang") is not None, reason="TileLang's own serve")
def test_hyper_connections_without_tilelang() -> None:
    """The same as vLLM's definition in torch."""
    reference = importlib.import_module("vllm.model_executor.kernels.mhc.torch")
    torch.manual_seed(0)
    tokens, hc, hidden = 5, 4, 128
    streams = torch.randn(tokens, hc, hidden, device=DEVICE).bfloat16()
    fn = torch.randn(24, hc * hidden, device=DEVICE) * 0.05
    scale, base = torch.rand(3, device=DEVICE), torch.randn(24, device=DEVICE)
    numbers = (1e-6, 1e-6, 1e-6, 2.0, 20)
    want = reference.mhc_pre_torch(streams, fn, scale, base, *numbers)
    got = model.mhc_pre_tilelang(streams, fn, scale, base, *numbers)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=2e-2, rtol=2e-2)
    post, comb, x = want
    after = model.mhc_post_tilelang(x, streams, post, comb)
    torch.testing.assert_close(after, reference.mhc_post_torch(x, streams, post, comb))
    weight = torch.rand(hidden, device=DEVICE)
    fused = model.mhc_fused_post_pre_tilelang(x, streams, post, comb, fn, scale, base, *numbers, norm_weight=weight)
    torch.testing.assert_close(fused[0], after)
    y = reference.mhc_pre_torch(after, fn, scale, base, *numbers)[2].float()
    normed = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6) * weight
    torch.testing.assert_close(fused[3].float(), normed, atol=3e-2, rtol=3e-2)
    one = streams[:, 0]
    folded = fn.view(24, hc, hidden).sum(1)
    broadcast = model.mhc_pre_broadcast_tilelang(
        one, fn, scale, base, *numbers, norm_weight=weight, fn_broadcast=folded
    )
    alike = one.unsqueeze(1).expand(-1, hc, -1).contiguous()
    whole = model.mhc_pre_tilelang(alike, fn, scale, base, *numbers, norm_weight=weight)
    torch.testing.assert_close(broadcast[0], alike)
    for part, other in zip(broadcast[1:], whole, strict=True):
        torch.testing.assert_close(part, other, atol=3e-2, rtol=3e-2)


def test_what_no_op_covers_is_an_error_where_vllm_has_nothing() -> None:
    # DeepGEMM cannot be loaded here, or does not have this expression.
    with pytest.raises((UnsupportedError, RuntimeError)):
        dg.fp8_einsum("abc,abc->abc", (torch.ones(1), torch.ones(1)), (torch.ones(1), torch.ones(1)), torch.ones(1))


# ---------------------------------------------------------------------------------------- vLLM's own callers


@pytest.mark.parametrize("tokens", [1, 7])
def test_output_projection(tokens: int) -> None:
    """The layer's output projection, from rotated and quantised attention output on."""
    activation = importlib.import_module("vllm.model_executor.layers.fusion.quant_activation").QuantizedActivation
    key = importlib.import_module("vllm.model_executor.layers.quantization.utils.quant_utils").kFp8Dynamic128Sym
    groups, inner, width = 2, 1024, 256
    recipe, packed = o_proj.compute_fp8_einsum_recipe()
    assert recipe == ((1, 1, 128) if MAJOR >= 10 else (1, 128, 128))
    torch.manual_seed(tokens)
    x, x_scale = layouts.quantize_e4m3(torch.randn(tokens, groups, inner), 128)
    w, by_row = layouts.quantize_e4m3(torch.randn(groups, width, inner), 128)
    if recipe == (1, 128, 128):  # one scale for 128 rows
        w_scale = by_row.unflatten(1, (-1, 128)).amax(2)
        values = torch.randn(groups, width, inner) / w_scale.repeat_interleave(128, 1).repeat_interleave(128, 2)
        w = values.clamp(-448, 448).to(torch.float8_e4m3fn)
    else:
        w_scale = by_row
    x, x_scale, w, w_scale = (t.to(DEVICE) for t in (x, x_scale, w, w_scale))
    arguments = {"x": x, "x_scale": x_scale, "w": w, "w_scale": w_scale}
    if packed:
        x_scale, w_scale = (layouts.e8m0_pack(layouts.e8m0_encode(s)) for s in (x_scale, w_scale))
    # vLLM keeps the tokens of a scale beside each other, padded.
    aligned = torch.zeros((groups, x_scale.shape[2], tokens + -tokens % 4), dtype=x_scale.dtype, device=DEVICE)
    strided = aligned.permute(2, 0, 1)[:tokens].copy_(x_scale)
    before = calls("_fp8_einsum_impl")
    z = o_proj.deep_gemm_fp8_o_proj(
        activation(x, strided, torch.bfloat16, x.shape, key),
        torch.arange(tokens),
        torch.zeros(tokens, 64),
        types.SimpleNamespace(weight=w, weight_scale=w_scale),
        lambda flat: flat,
        n_groups=groups,
        heads_per_group=2,
        nope_dim=448,
        rope_dim=64,
        o_lora_rank=width,
        einsum_recipe=recipe,
        tma_aligned_scales=packed,
    )
    agree("fp8_einsum", arguments, (z.view(tokens, groups, width),))
    assert calls("_fp8_einsum_impl") == before + 1


@pytest.mark.parametrize(("hidden", "k"), [(256, 1024), (256, 256)], ids=["streams", "broadcast"])
def test_hyper_connection(monkeypatch: pytest.MonkeyPatch, hidden: int, k: int) -> None:
    """The prenorm helper; the second shape is the first layer's, for which it has no other way."""
    kernels: Any = types.ModuleType("vllm.model_executor.kernels.mhc.tilelang_kernels")
    kernels.compute_num_split = lambda block_k, k, grid: 3
    monkeypatch.setitem(sys.modules, kernels.__name__, kernels)
    torch.manual_seed(k)
    x, fn = torch.randn(5, k, device=DEVICE).bfloat16(), torch.randn(24, k, device=DEVICE)
    out, squares = tilelang._hc_prenorm_gemm_outputs(x, fn, hidden_size=hidden, hc_mult=4, use_tilelang_fallback=False)
    assert out.shape == (3, 5, 24)
    agree("hc_prenorm_gemm", {"x": x, "fn": fn}, (out.sum(0), squares.sum(0)))


def _cache(pages: int, page_size: int) -> tuple[Tensor, Tensor]:
    """A cache as vLLM makes it, pages padded to 576 bytes and every second slot written; and those slots."""
    stride = page_size * 584
    stride += -stride % 576
    raw = torch.full((pages, stride), 0xFF, dtype=torch.uint8, device=DEVICE)
    cache = raw.as_strided((pages, page_size, 584), (stride, 584, 1))
    slots = torch.arange(1, pages * page_size, 2, device=DEVICE)
    layouts.write_kv(cache, slots, torch.randn(len(slots), 512, device=DEVICE).bfloat16())
    return cache, slots.int()


def _pick(slots: Tensor, rows: int, width: int, lens: Tensor) -> Tensor:
    picked = slots[torch.randint(0, len(slots), (rows, width), device=DEVICE)]
    return torch.where(torch.arange(width, device=DEVICE) < lens.unsqueeze(1), picked, -1).int()


@pytest.mark.parametrize("ratio", [0, 4, 128])
def test_decode_of_the_attention_layer(monkeypatch: pytest.MonkeyPatch, ratio: int) -> None:
    """``_forward_decode`` of the layer that vLLM builds for DeepSeek V4, for each kind of layer."""
    torch.manual_seed(ratio)
    tokens, heads, window = 3, 64, 128
    swa_cache, swa_slots = _cache(8, 64)
    swa_lens = torch.tensor([128, 1, 77], dtype=torch.int32, device=DEVICE)
    swa_indices = _pick(swa_slots, tokens, window, swa_lens).unsqueeze(1)
    sink = torch.randn(heads, device=DEVICE)
    sink[8:] = -float("inf")  # the padded heads
    q = torch.randn(tokens, heads, 512, device=DEVICE).bfloat16()
    o: dict[str, Any] = {"q": q.unsqueeze(1), "k_cache": swa_cache, "indices": swa_indices, "sm_scale": 512**-0.5}
    o |= {"attn_sink": sink, "topk_length": swa_lens}
    swa_metadata = types.SimpleNamespace(
        num_decodes=tokens,
        num_decode_tokens=tokens,
        is_valid_token=torch.ones(tokens, dtype=torch.bool, device=DEVICE),
        token_to_req_indices=torch.arange(tokens, dtype=torch.int32, device=DEVICE),
        decode_swa_indices=swa_indices,
        decode_swa_lens=swa_lens,
    )
    builder = types.SimpleNamespace(_layer_types=["swaonly", "c4a", "c128a"])
    schedule = sparse_swa.DeepseekSparseSWAMetadataBuilder.build_tile_scheduler(builder, tokens)
    for name in ("swaonly", "c4a", "c128a"):
        # vLLM has none on 12.x, where it takes another layer; this one asks for it all the same.
        setattr(swa_metadata, f"tile_sched_{name}", schedule.get(name) or sparse_swa.get_mla_metadata()[0])
    attention = types.SimpleNamespace(
        compress_ratio=ratio,
        scale=512**-0.5,
        attn_sink=sink,
        swa_cache_layer=types.SimpleNamespace(kv_cache=swa_cache),
        topk_indices_buffer=None,
    )
    cache = metadata = None
    if ratio:
        page_size = 256 // ratio
        cache, slots = _cache(40, page_size)
        lens = torch.tensor([16, 0, 9], dtype=torch.int32, device=DEVICE)
        chosen = _pick(slots, tokens, 16, lens)
        o |= {"extra_k_cache": cache, "extra_indices": chosen.unsqueeze(1), "extra_topk_length": lens}
        metadata = types.SimpleNamespace(
            block_size=256,
            block_table=torch.arange(40, dtype=torch.int32, device=DEVICE).expand(tokens, 40).contiguous(),
            c128a_global_decode_topk_indices=chosen.unsqueeze(1),
            c128a_decode_topk_lens=lens,
        )
        if ratio == 4:
            # The tables above map a request's own index to the same slot.
            attention.topk_indices_buffer = chosen
            if DEVICE.type == "cpu":  # a Triton kernel
                monkeypatch.setattr(flashmla, "compute_global_topk_indices_and_lens", lambda *_: (chosen, lens))
    output = torch.full_like(q, float("nan"))
    before = calls("flash_mla_with_kvcache")
    flashmla.DeepseekV4FlashMLAAttention._forward_decode(
        attention, q, cache, swa_metadata, metadata, swa_only=not ratio, output=output
    )
    agree("sparse_mla_decode", o, (output.unsqueeze(1),), ("out",))
    assert calls("flash_mla_with_kvcache") == before + 1
    served = bind.stats()["sparse_mla_decode"]
    assert sum(served.values()) >= 1


def test_the_indexer_can_be_built() -> None:
    """Its constructor refuses to work without DeepGEMM, and asks through this name."""
    assert layer.has_deep_gemm()
    assert indexer.has_deep_gemm()
    assert indexer._supports_native_decode(2)


# ------------------------------------------------------------------------------------------------ the way back


def test_undo_and_again(caplog: pytest.LogCaptureFixture) -> None:
    ours = (dg._fp8_einsum_impl, flashmla.flash_mla_sparse_fwd)
    assert engine.undo() == []
    if LIBRARY_IMPORTED == [] and DEVICE.type == "cpu":
        assert dg._fp8_einsum_impl is None
        with pytest.raises(RuntimeError, match="DeepGEMM backend is unavailable"):
            dg.fp8_einsum("bhr,hdr->bhd", None, None, None)
    assert flashmla.flash_mla_sparse_fwd is source.flash_mla_sparse_fwd
    assert flashmla.flash_mla_with_kvcache is source.flash_mla_with_kvcache
    assert layer.has_deep_gemm is importlib.import_module("vllm.utils.import_utils").has_deep_gemm
    assert dg._lazy_init.__qualname__ == "_lazy_init"
    assert not hasattr(dg._lazy_init, "__wrapped__")
    # At once, as every module has been imported.
    engine.apply()
    assert flashmla.flash_mla_sparse_fwd is not source.flash_mla_sparse_fwd
    out, squares = torch.empty(1, 2, 24, device=DEVICE), torch.empty(1, 2, device=DEVICE)
    x, fn = torch.ones(2, 64, device=DEVICE).bfloat16(), torch.ones(24, 64, device=DEVICE)
    with caplog.at_level(logging.WARNING, "dsv4_backends"):
        for _ in range(2):
            dg.tf32_hc_prenorm_gemm(x, fn, out, squares, 1)
    assert torch.all(out == 64)
    assert dg._fp8_einsum_impl not in (None, ours[0])
    (line,) = (record.message for record in caplog.records)
    assert line.startswith(f"vllm {engine.version()} runs on dsv4_backends: sparse_mla_prefill ")
    assert "hc_prenorm_gemm" in line


def test_undo_leaves_what_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    somebody = lambda *_: None  # noqa: E731
    ours = flashmla.flash_mla_sparse_fwd
    flashmla.flash_mla_sparse_fwd = somebody
    assert engine.undo() == ["vllm.models.deepseek_v4.nvidia.flashmla:flash_mla_sparse_fwd"]
    assert flashmla.flash_mla_sparse_fwd is somebody
    flashmla.flash_mla_sparse_fwd = source.flash_mla_sparse_fwd
    engine.apply()
    assert flashmla.flash_mla_sparse_fwd is not ours


# --------------------------------------------------------------------------------------------------- who served


def test_who_served(record_property: Callable[[str, object], None]) -> None:
    """For every op of the hook the first of the order that has it, or the pinned one; others what that one refuses."""
    served = bind.stats()
    record_property("served", json.dumps(served))
    order = policy.from_environment().order
    for op in sorted({target.op for target in engine.TARGETS if target.op}):
        resolution = bind.resolution(op, DEVICE)
        names = [candidate.name for candidate in resolution.candidates]
        wanted = resolution.pinned or next((name for name in order if name in names), "")
        if wanted:
            assert served[op].get(wanted), f"{op}: {wanted} has not served: {resolution.explain()}"
        assert sum(served[op].values()) > 0
