"""The real SGLang over the ops, without its compiled packages: ``FAKE_SM=8.0 pytest tests/engines/sglang_suite.py``.

Not part of the usual suite: SGLang needs an environment of its own. The plugin is loaded by SGLang's own loader,
SGLang's own functions are called, and their results are compared with the oracle. On a CPU SGLang's Triton kernels run
in Triton's interpreter. ``TEST_PIN`` and ``TEST_ORDER`` are what ``DSV4_BACKENDS_PIN`` and ``_ORDER`` shall be; tensors
are on the first GPU where there is one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import fake_sglang
import pytest
import torch
from torch import Tensor

from dsv4_backends import UnsupportedError, compat
from dsv4_backends.contract import CONTRACTS, Case, layouts
from dsv4_backends.engines import hook, patching
from dsv4_backends.engines import sglang as engine
from dsv4_backends.runtime import bind
from dsv4_backends.selection import policy
from dsv4_backends.testing import checks, numerics, oracle

pytestmark = pytest.mark.filterwarnings("default")

DEVICE = checks.default_device()
ON_GPU = DEVICE.type == "cuda"
SM = os.environ.setdefault("FAKE_SM", "8.0")
WISHES = {key: os.environ[f"TEST_{key}"] for key in ("PIN", "ORDER") if os.environ.get(f"TEST_{key}")}

# What a user's environment would say, before SGLang starts.
SETTINGS = {f"{policy.PREFIX}{key}": value for key, value in {"ENGINE": "sglang", **WISHES}.items()}
os.environ.update(SETTINGS)
if ON_GPU:  # a kernel that SGLang compiles with nvcc, for a schedule
    os.environ.setdefault("SGLANG_OPT_USE_JIT_INDEXER_METADATA", "0")
fake_sglang.install(gpu=not ON_GPU)
SERVED: dict[str, dict[str, int]] = {}
"""Calls over all tests, by op and provider: ``bind.stats()`` starts anew where a test changes the settings."""
LIBRARIES = tuple(name for name in compat.LIBRARIES if importlib.util.find_spec(name) is not None)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # SGLang's own warnings are its own affair
    plugins = importlib.import_module("sglang.srt.plugins")
    envs = importlib.import_module("sglang.srt.environ").envs
    TOPK_V2 = vars(type(envs))["SGLANG_OPT_USE_TOPK_V2"]
    plugins.load_plugins()
    WAITED = hook.waiting()
    STARTED = engine.plan()
    IMPORTED_EARLY = [name for name in WAITED if name in sys.modules]
    indexer = importlib.import_module("sglang.srt.layers.attention.dsv4.indexer")
    metadata = importlib.import_module("sglang.srt.layers.attention.dsv4.metadata")
    backend = importlib.import_module("sglang.srt.layers.attention.deepseek_v4_backend")
    interface = importlib.import_module("sglang.kernels.ops.attention.flash_mla_interface")
    dequant = importlib.import_module("sglang.kernels.ops.attention.dsv4.dequant_k_cache")
    kv_store = importlib.import_module("sglang.kernels.ops.kvcache.dsv4_main_kv_store")
    prefill = importlib.import_module("sglang.srt.layers.attention.dsv4.sparse_prefill_utils")
    wrapper = importlib.import_module("sglang.srt.layers.deep_gemm_wrapper.entrypoint")
    configurer = importlib.import_module("sglang.srt.layers.deep_gemm_wrapper.configurer")
    marlin = importlib.import_module("sglang.srt.layers.quantization.mxfp4_marlin_moe")
    marlin_fp4 = importlib.import_module("sglang.srt.layers.quantization.marlin_utils_fp4")
    marlin_utils = importlib.import_module("sglang.srt.layers.quantization.marlin_utils")
    mhc = importlib.import_module("sglang.kernels.ops.layernorm.mhc")
    model = importlib.import_module("sglang.srt.models.deepseek_v4")
    topk = importlib.import_module("sglang.srt.layers.attention.dsa.dsa_topk_backend").DSATopKBackend
    pool = importlib.import_module("sglang.srt.mem_cache.deepseek_v4_memory_pool")
    KVLayout = importlib.import_module("sglang.kernels.ops.attention.dsv4.kv_layout").KVLayout
ORIGINALS = {(module, attribute): original for module, attribute, original, _ in engine.ENGINE.patches.done}
"""What stood where something is replaced."""
BELOW_9 = not ON_GPU and int(SM.partition(".")[0]) < 9


@pytest.fixture(autouse=True)
def settings(clean_settings: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    yield
    if not engine.ENGINE.rows:
        engine.apply()


def calls(attribute: str, module: str = "") -> int:
    rows = [row for row in engine.plan().rows if row.target.attribute == attribute]
    return sum(row.calls for row in rows if not module or row.target.module == module)


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
    assert plugins._plugins_loaded
    assert backend.__name__ in WAITED
    assert STARTED.version == "0.5.23"
    assert STARTED.enabled
    assert STARTED.ok, [(row.target.key, row.reasons) for row in STARTED.rows]
    assert IMPORTED_EARLY == []
    assert hook.waiting() == ()
    assert hook._FINDER not in sys.meta_path


def test_every_target_is_replaced() -> None:
    not_needed = {row.target.key for row in engine.plan().rows if row.state == patching.NOT_NEEDED}
    assert not_needed == set() if not ON_GPU else all(row.target.lacking for row in engine.plan().rows if row.reasons)
    states = {row.target.key: row.state for row in engine.plan().rows}
    assert {state for key, state in states.items() if key not in not_needed} == {patching.REPLACED}
    assert len(states) == len(engine.TARGETS) - sum(
        t.without in LIBRARIES and not t.lacking for t in engine.TARGETS if t.without
    )


def test_loading_again_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = (interface.flash_mla_with_kvcache, sys.modules["deep_gemm"], engine.ENGINE.rows)
    engine.register()
    monkeypatch.setattr(plugins, "_plugins_loaded", False)
    plugins.load_plugins()
    after = (interface.flash_mla_with_kvcache, sys.modules["deep_gemm"], engine.ENGINE.rows)
    assert all(one is other for one, other in zip(before, after, strict=True))


def test_sglangs_own_list_of_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    group = plugins.GENERAL_PLUGINS_GROUP
    for text in ("", "dsv4_backends", "other, dsv4_backends"):
        monkeypatch.setenv("SGLANG_PLUGINS", text)
        assert "dsv4_backends" in plugins.load_plugins_by_group(group)
        assert engine.ENGINE.left_out() == ""
    monkeypatch.setenv("SGLANG_PLUGINS", "other")
    assert "dsv4_backends" not in plugins.load_plugins_by_group(group)
    assert engine.ENGINE.left_out().startswith("SGLANG_PLUGINS=other does not name dsv4_backends")


def test_nothing_happens_without_the_variable() -> None:
    code = """
import sys
from sglang.srt.plugins import load_plugins
load_plugins()
from dsv4_backends.engines import hook, sglang
assert hook.waiting() == () and sglang.ENGINE.rows == ()
assert not {'deep_gemm', 'flash_mla'} & sys.modules.keys()
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(policy.PREFIX)}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, check=True, timeout=120)


@pytest.mark.skipif(ON_GPU, reason="the scheduler imports compiled packages")
def test_in_a_scheduler() -> None:
    """A spawned process has imported much of SGLang before it loads the plugin, and then imports the model."""
    code = """
import importlib, sys
import fake_sglang
fake_sglang.COMPILED += ("uvicorn",)
fake_sglang.install(gpu=True)
scheduler = importlib.import_module("sglang.srt.managers.scheduler")
from dsv4_backends.engines import hook, sglang
early = {target.within or target.module for target in sglang.TARGETS} & sys.modules.keys()
assert {"sglang.srt.environ", "sglang.srt.layers.deep_gemm_wrapper.entrypoint"} <= early, early
try:
    scheduler.run_scheduler_process(None, None, 0, 0, 0, None, None)  # goes no further than to the plugins
except AttributeError:
    pass
importlib.import_module("sglang.srt.models.deepseek_v4")
importlib.import_module("sglang.srt.layers.attention.deepseek_v4_backend")
importlib.import_module("sglang.srt.layers.quantization.mxfp4_marlin_moe")
importlib.import_module("sglang.kernels.ops.attention.flash_mla_interface")
assert hook.waiting() == ()
assert {row.state for row in sglang.plan().rows} == {"replaced"}, sglang.plan().rows
configurer = importlib.import_module("sglang.srt.layers.deep_gemm_wrapper.configurer")
assert not configurer.ENABLE_JIT_DEEPGEMM
assert sglang.undo() == []
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(fake_sglang.__file__), *sys.path])}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, check=True, timeout=300)


@pytest.fixture(autouse=True)
def count() -> Iterator[None]:
    before = bind.stats()
    yield
    for op, calls_of in bind.stats().items():
        for provider, after in calls_of.items():
            earlier = before.get(op, {}).get(provider, 0)
            per_op = SERVED.setdefault(op, {})
            per_op[provider] = per_op.get(provider, 0) + (after - earlier if after >= earlier else after)


# ------------------------------------------------------------------------------ SGLang's names reach the ops


@pytest.mark.parametrize("case", cases("fp8_einsum"))
def test_fp8_einsum(case: Case) -> None:
    o = CONTRACTS["fp8_einsum"].inputs(case, DEVICE)
    before = calls("fp8_einsum")
    d = model._fp8_wo_a_einsum(o["x"], o["x_scale"], o["w"], o["w_scale"], recipe=(1, 128, 128))
    agree("fp8_einsum", o, (d,))
    assert calls("fp8_einsum") == before + 1


@pytest.mark.parametrize("case", cases("mqa_logits"))
def test_mqa_logits(case: Case) -> None:
    """SGLang's caller for one long request, row by row of a plan."""
    o = CONTRACTS["mqa_logits"].inputs(case, DEVICE)
    o["max_seqlen_k"] = o.get("max_seqlen_k") or max(len(o["k"]), 1)
    plan = types.SimpleNamespace(ks=o["row_starts"], ke=o["row_ends"], max_seqlen_k=o["max_seqlen_k"])
    before = calls("fp8_mqa_logits")
    logits = indexer.C4IndexerBackendMixin._nonpaged_mqa_logits(
        q_indexer=o["q"], weights=o["weights"], kv=(o["k"], o["k_scale"]), plan=plan, rows=slice(0, len(o["q"]))
    )
    agree("mqa_logits", o, (logits,))
    assert calls("fp8_mqa_logits") == before + 1


@pytest.mark.parametrize("case", cases("paged_mqa_logits"))
def test_paged_mqa_logits(case: Case) -> None:
    import deep_gemm

    o = CONTRACTS["paged_mqa_logits"].inputs(case, DEVICE)
    b, next_n = o["q"].shape[:2]
    lens = o["context_lens"] if o["context_lens"].dim() == 2 else o["context_lens"].unsqueeze(1).expand(b, next_n)
    lens = lens.contiguous()
    cache = o["k_cache"] if o["k_cache"].dim() == 4 else o["k_cache"].unsqueeze(2)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(lens, cache.shape[1], deep_gemm.get_num_sms())
    before = calls("fp8_paged_mqa_logits")
    arguments = (o["q"], cache, o["weights"], lens, o["block_table"], schedule, o["max_context_len"], False)
    agree("paged_mqa_logits", o, (deep_gemm.fp8_paged_mqa_logits(*arguments),))
    assert calls("fp8_paged_mqa_logits") == before + 1


@pytest.mark.parametrize("case", cases("hc_prenorm_gemm"))
@pytest.mark.parametrize("by", ["deep_gemm", "wrapper"])
def test_hc_prenorm_gemm(case: Case, by: str) -> None:
    import deep_gemm

    o = CONTRACTS["hc_prenorm_gemm"].inputs(case, DEVICE)
    splits = o.pop("num_splits", None) or 1
    out = torch.full((splits, len(o["x"]), len(o["fn"])), float("nan"), device=DEVICE)
    squares = torch.full((splits, len(o["x"])), float("nan"), device=DEVICE)
    module = deep_gemm if by == "deep_gemm" else wrapper
    before = calls("tf32_hc_prenorm_gemm", module.__name__)
    module.tf32_hc_prenorm_gemm(o["x"], o["fn"], out, squares, num_splits=splits)
    agree("hc_prenorm_gemm", o, (out.sum(0), squares.sum(0)))
    assert calls("tf32_hc_prenorm_gemm", module.__name__) == before + 1


@pytest.mark.parametrize("use_legacy", [True, False])
@pytest.mark.parametrize("case", cases("sparse_mla_prefill"))
def test_flash_mla_sparse_fwd(case: Case, use_legacy: bool) -> None:
    o = CONTRACTS["sparse_mla_prefill"].inputs(case, DEVICE)
    o.pop("out", None)
    kv = o["kv"] if o["kv"].dim() == 3 else o["kv"].unsqueeze(1)
    indices = o["indices"] if o["indices"].dim() == 3 else o["indices"].unsqueeze(1)
    out, max_logits, lse = interface.flash_mla_sparse_fwd(
        q=o["q"],
        kv=kv,
        indices=indices,
        sm_scale=o["sm_scale"],
        d_v=512,
        attn_sink=o.get("attn_sink"),
        topk_length=o.get("topk_length"),
        use_legacy=use_legacy,
    )
    if use_legacy:  # the older kernels' logarithms are to base 2
        max_logits, lse = (t * torch.log(torch.tensor(2.0)).item() for t in (max_logits, lse))
    agree("sparse_mla_prefill", o, (out, max_logits, lse))


def flash_mla_arguments(o: dict[str, Any]) -> dict[str, Any]:
    """A decode call as SGLang's backend makes it."""

    def heads(cache: Tensor | None) -> Tensor | None:
        return cache if cache is None or cache.dim() == 4 else cache.unsqueeze(2)

    return {
        "q": o["q"],
        "k_cache": heads(o["k_cache"]),
        "head_dim_v": 512,
        "block_table": None,
        "cache_seqlens": None,
        "softmax_scale": o["sm_scale"],
        "is_fp8_kvcache": True,
        "indices": o["indices"],
        "topk_length": o.get("topk_length"),
        "attn_sink": o.get("attn_sink"),
        "extra_k_cache": heads(o.get("extra_k_cache")),
        "extra_indices_in_kvcache": o.get("extra_indices"),
        "extra_topk_length": o.get("extra_topk_length"),
    }


@pytest.mark.parametrize("case", cases("sparse_mla_decode"))
def test_flash_mla_with_kvcache(case: Case) -> None:
    o = CONTRACTS["sparse_mla_decode"].inputs(case, DEVICE)
    o.pop("out", None)
    before = calls("flash_mla_with_kvcache", interface.__name__)
    out, lse = interface.flash_mla_with_kvcache(
        **flash_mla_arguments(o), tile_scheduler_metadata=backend._create_flashmla_metadata()
    )
    agree("sparse_mla_decode", o, (out, lse.transpose(1, 2)))
    assert calls("flash_mla_with_kvcache", interface.__name__) == before + 1


@pytest.mark.skipif("flash_mla" in LIBRARIES, reason="FlashMLA's own is behind it")
def test_in_front_of_flash_mla() -> None:
    """Without the wheel SGLang's module can be imported, and what it imports is ours."""
    import flash_mla

    (case, *_) = CONTRACTS["sparse_mla_decode"].at_level("smoke")
    o = CONTRACTS["sparse_mla_decode"].inputs(case, DEVICE)
    o.pop("out", None)
    before = calls("flash_mla_with_kvcache", "flash_mla")
    out, lse = flash_mla.flash_mla_with_kvcache(
        **flash_mla_arguments(o), tile_scheduler_metadata=flash_mla.get_mla_metadata()[0]
    )
    agree("sparse_mla_decode", o, (out, lse.transpose(1, 2)))
    assert calls("flash_mla_with_kvcache", "flash_mla") == before + 1
    assert interface.flash_mla is flash_mla


def test_what_no_op_covers() -> None:
    """It reaches SGLang's own function, which ends at a library that is not there; or is an error with its argument."""
    before = sum(row.passed_on for row in engine.plan().rows)
    query, cache = torch.ones(1, 1, 64, 576).bfloat16(), torch.zeros(2, 64, 1, 656, dtype=torch.uint8)
    indices = torch.zeros(1, 1, 64, dtype=torch.int32)
    if "flash_mla" not in LIBRARIES:
        with pytest.raises(UnsupportedError, match=r"k_cache.*DeepSeek V3.2"):
            interface.flash_mla_with_kvcache(
                q=query,
                k_cache=cache,
                block_table=None,
                cache_seqlens=None,
                head_dim_v=512,
                tile_scheduler_metadata=interface.get_mla_metadata()[0],
                is_fp8_kvcache=True,
                indices=indices,
            )
        with pytest.raises((UnsupportedError, AttributeError, AssertionError)):
            interface.get_mla_metadata(torch.ones(1, dtype=torch.int32), 1, 1)
        assert sum(row.passed_on for row in engine.plan().rows) == before + 2
    one = torch.ones(1, device=DEVICE)
    with pytest.raises((UnsupportedError, RuntimeError)):
        sys.modules["deep_gemm"].fp8_einsum("abc,abc->abc", (one, one), (one, one), one)


# ------------------------------------------------------------------------------------------- the cache's bytes


def written(pages: int, page_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A cache of SGLang's size with every slot written by SGLang's own kernel; and the keys."""
    cache, keys = _written(pages, page_size, seed)
    return cache.clone(), keys


@functools.cache
def _written(pages: int, page_size: int, seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    keys = (torch.randn(pages * page_size, 512) * 3).bfloat16()
    data, scales = layouts.pack_kv(keys)
    cache = torch.zeros((pages, KVLayout.V4.page_bytes(page_size)), dtype=torch.uint8, device=DEVICE)
    pack = kv_store.NopeFp8RopeBf16Pack(
        data[:, :448].contiguous().view(torch.float8_e4m3fn).to(DEVICE),
        data[:, 448:].contiguous().view(torch.bfloat16).to(DEVICE),
        scales[:, :7].contiguous().to(DEVICE),
    )
    slots = torch.randperm(pages * page_size)
    kv_store.SetKAndS.execute(
        types.SimpleNamespace(page_size=page_size),
        cache,
        slots.to(DEVICE),
        pack,
    )
    by_slot = torch.empty_like(keys)
    by_slot[slots] = keys
    return cache, by_slot.to(DEVICE)


def entries(cache: Tensor, page_size: int) -> Tensor:
    """As SGLang's backend views it for FlashMLA."""
    return cache[:, : page_size * 584].view(len(cache), page_size, 1, 584)


@pytest.mark.parametrize("page_size", [256, 64, 2])
def test_pages_byte_by_byte(page_size: int) -> None:
    """What SGLang's kernel writes is what the contract's layout says, every byte of every page and the padding."""
    cache, keys = written(3, page_size)
    ours = torch.zeros_like(cache)
    layouts.write_kv(entries(ours, page_size), torch.arange(3 * page_size, device=DEVICE), keys)
    assert torch.equal(cache, ours)
    data, scales = layouts.kv_page_views(entries(cache, page_size))
    data_stride, scale_base, scale_stride = KVLayout.V4.row_addressing(page_size)
    assert (data.stride(1), scales.storage_offset(), scales.stride(1)) == (data_stride, scale_base, scale_stride)
    assert cache.stride(0) == data.stride(0) == scales.stride(0)


@pytest.mark.parametrize("page_size", [256, 64, 2])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_gathered_keys(page_size: int, dtype: torch.dtype) -> None:
    """Bit for bit what SGLang's own kernel makes of the same slots, in a part of a workspace or a new tensor."""
    cache, keys = written(3, page_size)
    slots = torch.tensor([0, 3 * page_size - 1, page_size, 1, 1, page_size - 1], dtype=dtype, device=DEVICE)
    workspace = torch.full((10, 1, 512), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    before = calls("dequantize_k_cache_paged_dsv4")
    for arguments in ({"layout": KVLayout.V4, "out": workspace[3:9]}, {}):
        result = backend.dequantize_k_cache_paged_dsv4(cache, slots, page_size=page_size, **arguments)
        own = dequant.dequantize_k_cache_paged_dsv4(cache, slots, page_size=page_size)
        assert torch.equal(result.view(torch.int16), own.view(torch.int16))
        torch.testing.assert_close(result[:, 0].float(), keys[slots.long()].float(), atol=0.3, rtol=0.1)
    assert torch.equal(workspace[3:9].view(torch.int16), result.view(torch.int16))
    assert workspace[:3].isnan().all()
    assert workspace[9:].isnan().all()
    replaced = next(r for r in engine.plan().rows if r.target.attribute == "dequantize_k_cache_paged_dsv4")
    assert calls("dequantize_k_cache_paged_dsv4") == before + (2 if replaced.state == patching.REPLACED else 0)


@pytest.mark.skipif(ON_GPU, reason="not replaced there")
def test_another_layout_is_sglangs_own() -> None:
    cache = torch.zeros(2, KVLayout.V41.page_bytes(64), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"V4\.1 KV cache dequantization requires"):
        backend.dequantize_k_cache_paged_dsv4(
            cache, torch.zeros(1, dtype=torch.int32), page_size=64, layout=KVLayout.V41
        )


# ---------------------------------------------------------------------------------------- SGLang's own callers


class Pool(pool.DeepSeekV4TokenToKVPool):
    """SGLang's pool with the caches of one layer."""

    def __init__(self, window: Tensor, extra: Tensor | None, extra_page_size: int) -> None:
        self.window, self.extra, self.extra_page_size = window, extra, extra_page_size

    request_window = None
    get_swa_key_buffer_radix = lambda self, layer: self.window  # noqa: E731
    get_extra_key_buffer = lambda self, layer: self.extra  # noqa: E731
    get_swa_key_page_size = lambda self: 256  # noqa: E731
    get_extra_key_page_size = lambda self, layer: self.extra_page_size  # noqa: E731
    get_swa_key_bytes_per_token = lambda self: 584  # noqa: E731
    get_extra_key_bytes_per_token = lambda self, layer: 584  # noqa: E731
    get_swa_key_layout = lambda self: KVLayout.V4  # noqa: E731
    get_extra_key_layout = lambda self, layer: KVLayout.V4  # noqa: E731


def attention(this_pool: Pool, core: Any, **more: Any) -> Any:
    """SGLang's attention backend, as far as one call of it goes."""
    made: Any = object.__new__(backend.DeepseekV4AttnBackend)
    values: dict[str, Any] = {
        "mtp_enabled": False,
        "token_to_kv_pool": this_pool,
        "forward_metadata": types.SimpleNamespace(core_attn_metadata=core, sparse_prefill_cache=None),
        "trtllm_attn": False,
        "softmax_scale": 512**-0.5,
        "head_dim_v": 512,
        "is_dsv41": False,
        "_swa_interleaved": False,
        "_use_sparse_prefill": lambda *args, **kwargs: False,
        "_mega_paged_prefill": lambda *args, **kwargs: False,
        "_flash_mla_with_kvcache": interface.flash_mla_with_kvcache,
        "sparse_prefill_kv_buffer": prefill.SparsePrefillKVBuffer(DEVICE),
        "is_dspark_draft": False,
    }
    for name, value in (values | more).items():
        setattr(made, name, value)
    return made


def picked(slots: int, rows: int, width: int, lens: Tensor) -> Tensor:
    """Random slots, -1 beyond each row's length."""
    chosen = torch.randint(0, slots, (rows, width), dtype=torch.int32)
    chosen[torch.arange(width) >= lens.unsqueeze(1).cpu()] = -1
    return chosen.to(DEVICE)


@pytest.mark.parametrize("ratio", [0, 4, 128])
@pytest.mark.parametrize("padded", [0, 2])
def test_decode_of_the_attention_layer(ratio: int, padded: int) -> None:
    """With ``padded`` rows as SGLang's graphs have them: length 1 and slot 0, on a page whose bytes are all NaN."""
    tokens, heads, page_size = 3, 64, {0: 0, 4: 64, 128: 2}[ratio]
    window, _ = written(2, 256)
    window[0] = 0xFF
    extra = written(8, page_size, seed=1)[0] if ratio else None
    torch.manual_seed(ratio)
    q = torch.randn(tokens + padded, heads, 512, device=DEVICE).bfloat16()
    sink = torch.randn(heads, device=DEVICE)
    swa_lens = torch.tensor([128, 1, 77], dtype=torch.int32, device=DEVICE)
    swa_indices = picked(256, tokens, 128, swa_lens)
    swa_indices[swa_indices >= 0] += 256
    core: Any = object.__new__(backend.DSV4AttnMetadata)
    core.swa_page_indices, core.swa_topk_lengths = swa_indices, swa_lens
    o: dict[str, Any] = {"q": q[:tokens].unsqueeze(1), "k_cache": entries(window, 256)}
    o |= {"indices": swa_indices.unsqueeze(1), "sm_scale": 512**-0.5, "attn_sink": sink, "topk_length": swa_lens}
    schedule = backend._create_flashmla_metadata()
    if ratio:
        lens = torch.tensor([64, 1, 30], dtype=torch.int32, device=DEVICE)
        chosen = picked(8 * page_size, tokens, 64, lens)
        o |= {"extra_k_cache": entries(extra, page_size), "extra_indices": chosen.unsqueeze(1)}
        o |= {"extra_topk_length": lens}
        names = {4: ("c4_sparse_page_indices", "c4_sparse_topk_lengths", "c4_flashmla_metadata")}
        names[128] = ("c128_page_indices", "c128_topk_lengths_clamp1", "c128_flashmla_metadata")
        for name, value in zip(names[ratio], (chosen, lens, schedule), strict=True):
            setattr(core, name, value)
    else:
        core.c0_flashmla_metadata = schedule
    this = attention(Pool(window, extra, page_size), core)
    layer = types.SimpleNamespace(layer_id=0, v_head_dim=512, tp_q_head_num=heads)
    batch = types.SimpleNamespace(forward_mode=types.SimpleNamespace(is_idle=lambda: False))
    before = calls("flash_mla_with_kvcache", interface.__name__)
    out = this.forward(q, q, q, layer, batch, ratio, save_kv_cache=False, attn_sink=sink)
    assert out.shape == (tokens + padded, heads, 512)
    agree("sparse_mla_decode", o, (out[:tokens].unsqueeze(1),), ("out",))
    assert calls("flash_mla_with_kvcache", interface.__name__) == before + 1


@pytest.mark.parametrize("ratio", [0, 4])
def test_prefill_of_the_attention_layer(ratio: int) -> None:
    """SGLang gathers the keys of a chunk and calls the sparse prefill; page 0, which its padding names, is all NaN."""
    heads, tokens, page_size = 16, 5, 64
    window, window_keys = written(2, 256)
    extra, extra_keys = written(4, page_size, seed=1)
    window[0], extra[0] = 0xFF, 0xFF
    swa_ids = torch.arange(300, 300 + 20, dtype=torch.int32, device=DEVICE)
    compressed_ids = torch.tensor([70, 71, 100, 0, 0], dtype=torch.int32, device=DEVICE)  # 0: padding
    keys = window_keys[swa_ids.long()]
    if ratio:
        keys = torch.cat([extra_keys[compressed_ids.long()], keys])
    first = 5 if ratio else 0
    indices = torch.full((tokens, 128), -1, dtype=torch.int32, device=DEVICE)
    lens = torch.zeros(tokens, dtype=torch.int32, device=DEVICE)
    for row in range(tokens):
        used = [*((0, 2) if ratio else ()), *range(first + row, first + row + 7)]
        indices[row, : len(used)] = torch.tensor(used, dtype=torch.int32, device=DEVICE)
        lens[row] = len(used)
    cache = types.SimpleNamespace(
        swa_token_ids=swa_ids,
        swa_page_size=256,
        c0_combined_indices=indices,
        c0_combined_lens=lens,
        layer_inputs=lambda *args: (compressed_ids, indices, lens),
    )
    this = attention(Pool(window, extra, page_size), None)
    this.forward_metadata.sparse_prefill_cache = cache
    torch.manual_seed(ratio)
    q = torch.randn(tokens, 1, heads, 512, device=DEVICE).bfloat16()
    sink = torch.randn(heads, device=DEVICE)
    before = (calls("flash_mla_sparse_fwd"), calls("dequantize_k_cache_paged_dsv4"))
    out = this._forward_prefill_sparse(q, 0, ratio, None, this.token_to_kv_pool, None, sink)
    exact = layouts.unpack_kv(*(part.to(DEVICE) for part in layouts.pack_kv(keys)))
    o = {"q": q.squeeze(1), "kv": exact.unsqueeze(1), "indices": indices.unsqueeze(1), "sm_scale": 512**-0.5}
    agree("sparse_mla_prefill", o | {"attn_sink": sink, "topk_length": lens}, (out,), ("out",))
    assert calls("flash_mla_sparse_fwd") == before[0] + 1
    assert ON_GPU or calls("dequantize_k_cache_paged_dsv4") == before[1] + 1 + bool(ratio)


@pytest.mark.parametrize("padded", [0, 3])
def test_the_indexer(padded: int) -> None:
    """From the query to the chosen slots; padded rows have length 1 and table 0, and page 0 is all NaN."""
    tokens, heads, pages, chosen = 4, 64, 12, 16
    torch.manual_seed(padded)
    cache = torch.zeros(pages, 64, 1, 132, dtype=torch.uint8, device=DEVICE)
    layouts.write_indexer_keys(
        cache, torch.arange(pages * 64, device=DEVICE), torch.randn(pages * 64, 128, device=DEVICE)
    )
    cache[0] = 0xFF
    lens = torch.tensor([130, 64, 20, 7], dtype=torch.int32, device=DEVICE)
    table = torch.stack([torch.randperm(pages - 1, dtype=torch.int32)[:3] + 1 for _ in range(tokens)]).to(DEVICE)
    q = torch.randn(tokens + padded, heads, 128, device=DEVICE).to(torch.float8_e4m3fn)
    weights = torch.randn(tokens + padded, heads, 1, device=DEVICE)
    built = metadata.PagedIndexerMetadata(
        page_size=256,
        compressed_page_size=64,
        page_table=table,
        compressed_seq_lens=lens,
        use_topk_v2=not ON_GPU and topk.SGL_KERNEL.should_use_topk_v2(),  # another such kernel
    )
    slots = torch.full((tokens + padded, chosen), -1, dtype=torch.int32, device=DEVICE)
    core = types.SimpleNamespace(
        positions=torch.zeros(tokens + padded, dtype=torch.int64, device=DEVICE),
        c4_sparse_page_indices=slots,
        c4_sparse_raw_indices=None,
    )
    this: Any = object.__new__(type("Backend", (indexer.C4IndexerBackendMixin,), {}))
    this.token_to_kv_pool = types.SimpleNamespace(get_index_k_with_scale_buffer=lambda layer_id: cache.flatten(1))
    this.forward_metadata = types.SimpleNamespace(indexer_metadata=built, core_metadata=core)
    this.debug_use_external_c4_sparse_indices = False
    this.hisparse_coordinator = None
    this.dsa_topk_backend = topk.TORCH
    this._forward_prepare_normal = lambda **arguments: (q, weights)
    mode = types.SimpleNamespace(is_idle=lambda: False, is_decode=lambda: True)
    layer = types.SimpleNamespace(use_fp4_indexer=False, layer_id=0)
    hidden = torch.zeros(tokens + padded, 8, device=DEVICE)
    before = (calls("fp8_paged_mqa_logits"), calls("get_paged_mqa_logits_metadata"))
    this.forward_c4_indexer(hidden, hidden, layer, types.SimpleNamespace(forward_mode=mode))
    o: dict[str, Any] = {"q": q[:tokens].unsqueeze(1), "k_cache": cache, "weights": weights[:tokens, :, 0]}
    o |= {"context_lens": lens.unsqueeze(1), "block_table": table, "max_context_len": 192}
    (logits,) = oracle.expected("paged_mqa_logits", o)
    for row in range(tokens):
        count = min(chosen, int(lens[row]))
        got = slots[row][slots[row] >= 0]
        assert len(got) == len(got.unique()) == count
        back = {int(table[row, i // 64]) * 64 + i % 64: i for i in range(int(lens[row]))}
        scores = logits[row].cpu()[[back[int(slot)] for slot in got]]
        best = logits[row, : lens[row]].cpu().sort(descending=True).values[:count]
        torch.testing.assert_close(scores.sort(descending=True).values, best, atol=1e-3, rtol=1e-3)
    assert (slots[tokens:, 0] == 0).all()  # the only slot that a padded row has
    assert (slots[tokens:, 1:] == -1).all()
    assert calls("fp8_paged_mqa_logits") == before[0] + 1
    if BELOW_9:  # with the row before, no kernel of SGLang's own makes a schedule
        assert calls("get_paged_mqa_logits_metadata") > 0


def test_hyper_connections_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's own step before a layer, whose product of 1024 tokens and more is ours."""
    tokens, hc, hidden = 1024, 4, 64
    torch.manual_seed(0)
    x = torch.randn(tokens, hc, hidden, device=DEVICE).bfloat16()
    fn = torch.randn(24, hc * hidden, device=DEVICE) * 0.05
    scale, base = torch.rand(3, device=DEVICE), torch.randn(24, device=DEVICE)
    seen = []

    def split(mixes: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:  # TileLang's kernel
        seen.append(mixes)
        rows = mixes.shape[0]
        return mixes.new_ones(rows, 1, hc), mixes.new_ones(rows, 1, hc), mixes.new_ones(rows, 1, hc, hc)

    monkeypatch.setattr(model, "get_mhc_ops", lambda: types.SimpleNamespace(hc_split_sinkhorn=split))
    monkeypatch.setattr(mhc, "mhc_combine", lambda x, pre, hc, dtype: x.unflatten(1, (hc, -1)).float().sum(1).to(dtype))
    monkeypatch.setattr(model, "use_symmetric_memory", lambda *args, **kwargs: warnings.catch_warnings())
    monkeypatch.setattr(model, "is_allocation_symmetric", lambda: False)
    monkeypatch.setattr(model, "get_parallel", lambda: types.SimpleNamespace(tp_group=None))
    monkeypatch.setenv("SGLANG_OPT_USE_TILELANG_MHC_PRE", "0")
    layer = types.SimpleNamespace(rms_norm_eps=1e-6, hc_mult=hc, hc_sinkhorn_iters=20, hc_eps=1e-6)
    before = calls("tf32_hc_prenorm_gemm", wrapper.__name__)
    model.DeepseekV4DecoderLayerBase.hc_pre(layer, x, fn, scale, base)
    assert calls("tf32_hc_prenorm_gemm", wrapper.__name__) == before + 1
    flat = x.flatten(1).double()
    want = (flat @ fn.double().T) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(seen[0].squeeze(1).double(), want, atol=2e-3, rtol=2e-3)


def test_no_tokens() -> None:
    """An idle rank's call of SGLang's wrapper writes nothing."""
    wrapper.tf32_hc_prenorm_gemm(
        torch.empty(0, 64, device=DEVICE).bfloat16(),
        torch.ones(24, 64, device=DEVICE),
        torch.empty(0, 24, device=DEVICE),
        torch.empty(0, device=DEVICE),
        num_splits=None,
    )


# ------------------------------------------------------------------------------------------- gates and defaults


@pytest.mark.skipif(not BELOW_9, reason="SGLang's own gate is open from 9.0 on")
def test_marlins_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """On 8.x the experts' weights reach Marlin; without the hook SGLang refuses them."""
    reached: list[Any] = []
    monkeypatch.setattr(marlin_utils, "check_moe_marlin_supports_layer", lambda *args, **kwargs: True)
    monkeypatch.setattr(marlin_fp4, "prepare_moe_mxfp4_layer_for_marlin", reached.append)
    method: Any = object.__new__(marlin.Mxfp4MarlinMoEMethod)
    method._fp8 = types.SimpleNamespace(process_weights_after_loading=lambda layer: None)
    method.runner = types.SimpleNamespace(config=types.SimpleNamespace(gemm1_alpha=None))
    method.prefix = ""
    layer = types.SimpleNamespace()
    monkeypatch.setattr(marlin, "log_info_on_rank0", lambda *args: None)
    method.process_weights_after_loading(layer)
    assert reached == [layer]
    assert layer._dsv4_mxfp4_backend == "marlin"
    assert not marlin.get_platform().is_sm90  # the weights keep the padding of 12.x
    assert not importlib.import_module("sglang.srt.runtime_context").get_platform().is_sm120  # nowhere else
    engine.undo()
    with pytest.raises(RuntimeError, match="MXFP4 Marlin requires SM90 or SM120"):
        method.process_weights_after_loading(types.SimpleNamespace())


def test_settings_that_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [
        row.target.attribute.removeprefix("Envs.")
        for row in engine.plan().rows
        if row.target.module.endswith("environ") and row.state == patching.REPLACED
    ]
    assert ON_GPU or names == [*engine.targets.OFF, "SGLANG_ENABLE_JIT_DEEPGEMM"]
    for name in names:
        assert getattr(envs, name).get() is False
        assert not getattr(envs, name).is_set()
        monkeypatch.setenv(name, "1")
        assert getattr(envs, name).get() is True
        monkeypatch.setenv(name, "maybe")  # SGLang warns, and takes the default
        with pytest.warns(UserWarning, match=f"Invalid value for {name}"):
            assert getattr(envs, name).get() is False
        monkeypatch.delenv(name)
    assert ON_GPU or not topk.SGL_KERNEL.should_use_topk_v2()
    available = "deep_gemm" in LIBRARIES and not BELOW_9
    assert available == configurer.ENABLE_JIT_DEEPGEMM
    engine.undo()
    for name in names:
        assert getattr(envs, name).get() is True
    assert vars(type(envs))["SGLANG_OPT_USE_TOPK_V2"] is TOPK_V2


@pytest.mark.skipif(ON_GPU, reason="DeepGEMM's own answer counts there")
def test_whether_the_product_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mhc._use_deep_gemm_hc_prenorm() is True
    monkeypatch.setenv("SGLANG_OPT_DEEPGEMM_HC_PRENORM", "0")
    assert mhc._use_deep_gemm_hc_prenorm() is False


# ------------------------------------------------------------------------------------------------ the way back


def test_undo_and_again(caplog: pytest.LogCaptureFixture) -> None:
    front = sys.modules["deep_gemm"]
    assert engine.undo() == []
    for (module, attribute), original in ORIGINALS.items():
        if not compat.LIBRARIES.count(module.__name__):
            assert patching.standing(module, attribute) is original, attribute
    assert dequant.dequantize_k_cache_paged_dsv4 is backend.dequantize_k_cache_paged_dsv4
    if "deep_gemm" not in LIBRARIES:
        assert "deep_gemm" not in sys.modules
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("deep_gemm")
        assert not hasattr(front, "fp8_einsum")  # whoever keeps it gets nothing of ours
    engine.apply()  # at once, as every module has been imported
    assert sys.modules["deep_gemm"] is front
    x, fn = torch.ones(2, 64, device=DEVICE).bfloat16(), torch.ones(24, 64, device=DEVICE)
    out, squares = torch.empty(1, 2, 24, device=DEVICE), torch.empty(1, 2, device=DEVICE)
    with caplog.at_level(logging.WARNING, "dsv4_backends"):
        for _ in range(2):
            wrapper.tf32_hc_prenorm_gemm(x, fn, out, squares, 1)
    assert torch.all(out == 64)
    (line,) = (record.message for record in caplog.records)
    assert line.startswith("sglang 0.5.23 runs on dsv4_backends: sparse_mla_prefill ")
    assert "hc_prenorm_gemm" in line


def test_undo_leaves_what_is_not_ours() -> None:
    somebody = lambda *_: None  # noqa: E731
    ours = interface.flash_mla_sparse_fwd
    interface.flash_mla_sparse_fwd = somebody
    assert engine.undo() == [f"{interface.__name__}:flash_mla_sparse_fwd"]
    assert interface.flash_mla_sparse_fwd is somebody
    interface.flash_mla_sparse_fwd = ORIGINALS[interface, "flash_mla_sparse_fwd"]
    engine.apply()
    assert interface.flash_mla_sparse_fwd is not ours


def test_an_error_puts_everything_back(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """It stays out of SGLang, is logged, and the plan of this process has it."""
    engine.undo()
    with monkeypatch.context() as patch:
        seen: list[str] = []

        def fail(name: str, callback: Any) -> None:
            if seen:
                raise RuntimeError("a fault of the hook's own")
            seen.append(name)
            real(name, callback)

        real = hook.when_imported
        patch.setattr(hook, "when_imported", fail)
        engine.register()
    assert "a fault of the hook's own" in caplog.text
    rows = engine.plan().rows
    assert {row.state for row in rows} <= {patching.FAILED, patching.NOT_NEEDED}
    assert any("a fault of the hook's own" in str(reason) for row in rows for reason in row.reasons)
    assert not compat.installed("deep_gemm")
    assert interface.flash_mla_sparse_fwd is ORIGINALS[interface, "flash_mla_sparse_fwd"]
    assert hook.waiting() == ()
    engine.undo()
    engine.apply()
    assert engine.plan().ok


# --------------------------------------------------------------------------------------------------- who served


def test_who_served(record_property: Callable[[str, object], None]) -> None:
    """Every op behind a target has been called, by the pinned provider where there is one."""
    served = SERVED
    record_property("served", json.dumps(served))
    for op in {target.op for target in engine.TARGETS if target.op}:
        if ON_GPU and op == "gather_dequant_kv" and not WISHES:
            continue
        assert sum(served[op].values()) > 0, op
        pinned = bind.resolution(op, DEVICE).pinned
        assert not pinned or served[op].get(pinned), op
