"""The import hook, what it replaces, and the command, over a small engine with vLLM's names.

The real vLLM is in ``vllm_suite.py``.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from installed import distribution
from packaging.version import Version

from dsv4_backends import PolicyError, engines
from dsv4_backends.commands import cli
from dsv4_backends.engines import hook, patching
from dsv4_backends.engines import vllm as engine
from dsv4_backends.engines.vllm import rules
from dsv4_backends.selection import machine, policy, preferences

MODEL = """
    def mhc_pre_tilelang(): ...
    def mhc_pre_broadcast_tilelang(): ...
    def mhc_fused_post_pre_tilelang(): ...
    def mhc_post_tilelang(): ...
    def hc_head_fused_kernel_tilelang(): ...
    class DeepseekV4DecoderLayer:
        def __init__(self): ...
    class DeepseekV4Model:
        def __init__(self): ...
"""
FILES = {
    "vllm/__init__.py": "",
    "vllm/utils/__init__.py": "",
    "vllm/utils/deep_gemm.py": """
        initialised = 0
        _fp8_gemm_nt_impl = None
        _fp8_einsum_impl = None
        _fp8_fp4_mqa_logits_impl = None
        _fp8_fp4_paged_mqa_logits_impl = None
        _get_paged_mqa_logits_metadata_impl = None
        _tf32_hc_prenorm_gemm_impl = None

        def native(*args, **kwargs):
            return ("native", args, kwargs)

        def _lazy_init():
            global initialised, _fp8_gemm_nt_impl, _fp8_einsum_impl, _fp8_fp4_paged_mqa_logits_impl
            global _get_paged_mqa_logits_metadata_impl
            if _fp8_gemm_nt_impl is not None or _tf32_hc_prenorm_gemm_impl is not None:
                return
            initialised += 1
            _fp8_gemm_nt_impl = _fp8_einsum_impl = _fp8_fp4_paged_mqa_logits_impl = native
            _get_paged_mqa_logits_metadata_impl = native

        def get_num_sms(): return 3
        def fp8_gemm_nt(*args, **kwargs):
            _lazy_init()
            return _fp8_gemm_nt_impl(*args)
        def fp8_einsum(*args, **kwargs):
            _lazy_init()
            return _fp8_einsum_impl(*args, **kwargs)
        def fp8_fp4_mqa_logits(q, kv, weights, cu_seqlen_ks, cu_seqlen_ke, max_seqlen_k):
            _lazy_init()
            return _fp8_fp4_mqa_logits_impl(q, kv, weights, cu_seqlen_ks, cu_seqlen_ke, max_seqlen_k)
        def fp8_fp4_paged_mqa_logits(q, kv_cache, weights, context_lens, block_tables, schedule_metadata,
                                     max_model_len, indices=None):
            _lazy_init()
            return _fp8_fp4_paged_mqa_logits_impl(
                q, kv_cache, weights, context_lens, block_tables, schedule_metadata, max_model_len)
        def get_paged_mqa_logits_metadata(context_lens, block_size, num_sms, indices=None):
            _lazy_init()
            return _get_paged_mqa_logits_metadata_impl(context_lens, block_size, num_sms)
        def tf32_hc_prenorm_gemm(x, fn, out, sqrsum, num_split):
            _lazy_init()
            return _tf32_hc_prenorm_gemm_impl(x, fn, out, sqrsum, num_split)
    """,
    "vllm/models/__init__.py": "",
    "vllm/models/deepseek_v4/__init__.py": "",
    "vllm/models/deepseek_v4/nvidia/__init__.py": "",
    "vllm/models/deepseek_v4/nvidia/flashmla.py": """
        if True:
            def flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None, out=None): ...
        def flash_mla_with_kvcache(q, k_cache, *args, **kwargs): ...
        def dequantize_and_gather_k_cache(out, k_cache): ...
    """,
    "vllm/v1/__init__.py": "",
    "vllm/v1/attention/__init__.py": "",
    "vllm/v1/attention/backends/__init__.py": "",
    "vllm/v1/attention/backends/mla/__init__.py": "",
    "vllm/v1/attention/backends/mla/sparse_swa.py": """
        def _raise_flashmla_unavailable(*args, **kwargs): raise RuntimeError("not compiled")
        get_mla_metadata = _raise_flashmla_unavailable
        class DeepseekSparseSWAMetadataBuilder:
            def build_tile_scheduler(self, num_decode_tokens): ...
    """,
    "vllm/v1/attention/backends/mla/indexer.py": "def has_deep_gemm(): raise AssertionError('asked')\n",
    "vllm/model_executor/__init__.py": "",
    "vllm/model_executor/layers/__init__.py": "",
    "vllm/model_executor/layers/sparse_attn_indexer.py": """
        def has_deep_gemm(): return False
        def pack_seq_triton(x, lengths, pad_value=0.0, block_t=64, block_d=64): return (x.dtype, pad_value)
    """,
    "vllm/models/deepseek_v4/attention.py": "def fused_indexer_q_rope_quant(positions, index_q): ...\n",
    "vllm/models/deepseek_v4/compressor.py": """
        def compress_norm_rope_store_triton(state_cache): ...
        class DeepseekCompressor:
            def _compress_norm_rope_store(self, state_metadata): ...
    """,
    "vllm/models/deepseek_v4/nvidia/ops/__init__.py": "",
    "vllm/models/deepseek_v4/nvidia/ops/o_proj.py": "def fused_inv_rope_fp8_quant(o, positions): ...\n",
    **{f"vllm/models/deepseek_v4/nvidia/{name}.py": MODEL for name in ("model", "mtp", "dspark")},
    "vllm/model_executor/kernels/__init__.py": "",
    "vllm/model_executor/kernels/linear/__init__.py": "",
    "vllm/model_executor/kernels/linear/scaled_mm/__init__.py": "",
    "vllm/model_executor/kernels/linear/scaled_mm/marlin.py": """
        class MarlinFP8ScaledMMLinearKernel:
            def process_weights_after_loading(self, layer): layer.repacked = True
    """,
    "vllm/model_executor/warmup/__init__.py": "",
    "vllm/model_executor/warmup/jit_warmup.py": """
        class JitWarmupRegistry:
            def __init__(self): self.kernels = []
            def _add(self, kernel, args, kwargs): self.kernels.append((type(kernel).__name__, kwargs))
    """,
    "vllm/v1/worker/__init__.py": "",
    "vllm/v1/worker/gpu_worker.py": "def kernel_warmup(worker): return worker\n",
}
MODULES = len({target.module for target in engine.TARGETS})


@pytest.fixture
def fake_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Install an engine with vLLM's names: ``fake_vllm(version, **{path: text})``."""

    def install(version: str = "0.33.0", **changes: str) -> Path:
        distribution(tmp_path, "vllm", version, files=FILES | changes)
        monkeypatch.syspath_prepend(str(tmp_path))
        rules.mx_scaled.cache_clear()
        return tmp_path

    monkeypatch.setenv(f"{policy.PREFIX}DEVICE", "cpu")
    yield install
    engine.undo()
    rules.mx_scaled.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        del sys.modules[name]
    assert hook._FINDER not in sys.meta_path


def states(plan: engine.Plan) -> dict[str, str]:
    """By name, without what an option turns on."""
    return {row.target.attribute: row.state for row in plan.rows if not row.target.option}


def arguments() -> tuple[Any, ...]:
    import torch

    out, squares = torch.empty(1, 2, 24), torch.empty(1, 2)
    return torch.ones(2, 64).bfloat16(), torch.ones(24, 64), out, squares, 1


# ------------------------------------------------------------------------------------------------- the hook


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "hooked_package").mkdir()
    (tmp_path / "hooked_package" / "__init__.py").write_text("")
    (tmp_path / "hooked_package" / "inner.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "hooked_package.inner"
    for name in ("hooked_package", "hooked_package.inner"):
        sys.modules.pop(name, None)
    assert hook._FINDER not in sys.meta_path


def test_called_after_the_import(module: str) -> None:
    seen: list[int] = []
    hook.when_imported(module, lambda m: seen.append(m.value))
    assert sys.meta_path[0] is hook._FINDER
    assert "hooked_package" not in sys.modules
    loaded = importlib.import_module(module)
    assert seen == [1]
    assert hook._FINDER not in sys.meta_path
    # The loader is what it would have been.
    assert type(loaded.__spec__.loader).__name__ == "SourceFileLoader"  # type: ignore[union-attr]
    assert "exec_module" not in vars(loaded.__spec__.loader)  # type: ignore[union-attr]
    hook.when_imported(module, lambda m: seen.append(2))
    assert seen == [1, 2]


def test_an_error_in_a_callback_breaks_no_import(module: str, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []

    def bad(module: ModuleType) -> None:
        raise ValueError("bad hook")

    hook.when_imported(module, bad)
    hook.when_imported(module, lambda m: seen.append(m.__name__))
    assert importlib.import_module(module).value == 1
    assert seen == [module]
    assert "bad hook" in caplog.text


def test_an_import_that_fails_is_waited_for_again(module: str, tmp_path: Path) -> None:
    path = tmp_path / "hooked_package" / "inner.py"
    path.write_text("raise OSError('not yet')\n")
    seen: list[int] = []
    hook.when_imported(module, lambda m: seen.append(m.value))
    with pytest.raises(OSError, match="not yet"):
        importlib.import_module(module)
    assert (seen, hook.waiting()) == ([], (module,))
    path.write_text("value = 22\n")
    importlib.invalidate_caches()
    importlib.import_module(module)
    assert seen == [22]


def test_a_module_that_does_not_exist(module: str) -> None:
    callback = lambda m: None  # noqa: E731
    hook.when_imported("hooked_package.nothing", callback)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("hooked_package.nothing")
    hook.forget(callback)


def test_a_loader_that_serves_several_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One zipimporter loads the whole archive."""
    with zipfile.ZipFile(tmp_path / "modules.zip", "w") as archive:
        archive.writestr("zipped_one.py", "import zipped_two; value = 1\n")
        archive.writestr("zipped_two.py", "value = 2\n")
    monkeypatch.syspath_prepend(str(tmp_path / "modules.zip"))
    seen: list[str] = []
    hook.when_imported("zipped_two", lambda m: seen.append(m.__name__))
    hook.when_imported("zipped_one", lambda m: seen.append(m.__name__))
    importlib.import_module("zipped_one")
    assert sorted(seen) == ["zipped_one", "zipped_two"]
    assert hook.waiting() == ()
    for name in ("zipped_one", "zipped_two"):
        del sys.modules[name]


# ------------------------------------------------------------------------------------------------- the plan


def test_plan_imports_nothing(fake_vllm: Callable[..., Path]) -> None:
    fake_vllm()
    plan = engine.plan()
    assert plan.version == "0.33.0"
    assert plan.ok
    assert not plan.enabled
    assert set(states(plan).values()) == {patching.PLANNED}
    assert {row.provider for row in plan.rows if row.target.op} == {"torch"}
    assert "vllm" not in sys.modules


@pytest.mark.parametrize("version", ["0.31.0", "0.34.0", "1.0.0"])
def test_another_version_is_refused(
    fake_vllm: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    fake_vllm(version)
    plan = engine.plan()
    assert set(states(plan).values()) == {patching.REFUSED}
    (reason,) = plan.rows[0].reasons
    assert reason.code == "engine-version"
    assert version in reason.message
    assert "DSV4_BACKENDS_ENGINE=force" in reason.hint
    assert engine.plan(force=True).ok
    monkeypatch.setenv("DSV4_BACKENDS_ENGINE", "force")
    assert engine.plan().ok
    engine.register()
    assert set(states(engine.plan()).values()) == {patching.PLANNED}


@pytest.mark.parametrize("version", ["0.32.0", "0.33.0", "0.33.0+cu130", "0.33.1.dev3"])
def test_versions_that_were_tested(fake_vllm: Callable[..., Path], version: str) -> None:
    fake_vllm(version)
    assert engine.plan().ok


def test_below_8(fake_vllm: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM asks for bfloat16, which such a GPU lacks; the reference would serve, but nothing would call it."""
    fake_vllm()
    plan = engine.plan("sm_75")
    assert not plan.ok
    assert plan.refusal is not None
    assert str(plan.refusal).endswith("does not have on compute capability 7.5: expected 8.0 and newer")
    assert {(row.state, row.reasons) for row in plan.rows} == {(patching.REFUSED, (plan.refusal,))}


def test_an_old_gpu_beside_others(fake_vllm: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The card of a display does not keep the engine from the others."""
    fake_vllm()
    old, new = (
        machine.Device("cuda", i, name, Version(cc)) for i, (name, cc) in enumerate([("T4", "7.5"), ("A", "8.0")])
    )
    monkeypatch.setattr(machine, "probe", lambda: machine.Machine((old, new), simulated=True))
    plan = engine.plan()
    assert plan.ok
    assert plan.devices == (old, new)
    assert {row.provider for row in plan.rows if row.target.op} == {"triton"}
    assert any(note.startswith("T4 is left out: the ops take bfloat16") for note in plan.notes)


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{policy.PREFIX}DEVICE", "cpu")
    plan = engine.plan()
    assert plan.version is None
    assert {reason.code for row in plan.rows for reason in row.reasons} == {"engine-missing"}


@pytest.mark.parametrize("version", ["dev", "0.1.dev15830+g8d59", "0.28.1rc1.dev517+sm89", "0.34.0.dev3", ""])
def test_what_is_not_a_release_is_judged_by_its_code(
    fake_vllm: Callable[..., Path], version: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = "vllm/utils/deep_gemm.py"
    place = fake_vllm(version or "0.0", **{path: FILES[path].replace("_fp8_einsum_impl", "_other")})
    if not version:  # a source tree on the path
        shutil.rmtree(place / "vllm-0.0.dist-info")
    plan = engine.plan()
    assert plan.version == version
    assert states(plan)["_fp8_einsum_impl"] == patching.REFUSED
    assert [name for name, state in states(plan).items() if state != patching.PLANNED] == ["_fp8_einsum_impl"]
    named = f"vllm {version}" if version else "vllm without a version"
    assert plan.notes[0].startswith(f"{named} is not a release")
    assert cli.main(["engine", "vllm"]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"{named} on CPU")
    assert "Names and parameters are checked one by one" in " ".join(out.split())


def test_a_fork_under_another_name_has_its_version(fake_vllm: Callable[..., Path]) -> None:
    place = fake_vllm("0.0")
    shutil.rmtree(place / "vllm-0.0.dist-info")
    distribution(place, "somebodys-vllm", "0.31.0", metadata={"RECORD": "vllm/__init__.py,,\n"})
    assert engine.plan().version == "0.31.0"
    assert {r.code for row in engine.plan().rows for r in row.reasons} == {"engine-version"}


def test_vllms_own_list_of_plugins(
    fake_vllm: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It loads those that VLLM_PLUGINS names, and says nothing of the others."""
    fake_vllm()
    monkeypatch.setenv("VLLM_PLUGINS", "other,dsv4_backends")
    assert engine.plan().left_out == ""
    for names in ("other", "", "other, dsv4_backends"):  # vLLM does not strip them
        monkeypatch.setenv("VLLM_PLUGINS", names)
        monkeypatch.delenv("DSV4_BACKENDS_ENGINE", raising=False)
        assert engine.plan().ok
        monkeypatch.setenv("DSV4_BACKENDS_ENGINE", "1")
        assert not engine.plan().ok
        told = f"VLLM_PLUGINS={names} does not name dsv4_backends, so vLLM does not load it"
        assert cli.main(["engine", "vllm"]) == 1
        assert f"NOT LOADED: {told}" in capsys.readouterr().out
        assert cli.main(["doctor"]) == 1
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FINDING")]
        assert line.split()[1] == "engine"
        assert told in line
    monkeypatch.delenv("VLLM_PLUGINS")
    assert cli.main(["doctor"]) == 0
    assert (
        f"vllm 0.33.0: {len(engine.TARGETS) - 1} of {len(engine.TARGETS)} names are replaced" in capsys.readouterr().out
    )
    engine.apply()  # by hand: then it is loaded
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert engine.plan().ok


def test_several_kinds_of_gpu(fake_vllm: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """One process may run on any of them: what one kind needs is replaced, what one refuses is not."""
    path = "vllm/utils/deep_gemm.py"
    fake_vllm(**{path: FILES[path] + "\n        def mqa_logits_use_mx_scales(): ...\n"})

    def plan(*capabilities: str) -> dict[str, patching.Row]:
        gpus = tuple(
            machine.Device("cuda", index, f"GPU {capability}", Version(capability))
            for index, capability in enumerate(capabilities)
        )
        monkeypatch.setattr(machine, "probe", lambda: machine.Machine(gpus))
        return {row.target.attribute: row for row in engine.plan().rows}

    attention = "flash_mla_with_kvcache"
    assert plan("12.0")[attention].state == patching.NOT_NEEDED
    for pair in (("12.0", "8.6"), ("8.6", "12.0")):
        found = plan(*pair)
        assert (found[attention].state, found[attention].provider) == (patching.PLANNED, "triton")
        assert found["dequantize_and_gather_k_cache"].state == patching.PLANNED
    for pair in (("9.0", "10.0"), ("10.0", "9.0")):
        found = plan(*pair)
        (reason,) = found["_fp8_fp4_mqa_logits_impl"].reasons
        assert reason.code == "engine-arch"
        assert reason.message.startswith("GPU 10.0 (10.0): ")
        assert found[attention].state == patching.PLANNED
    monkeypatch.setenv("DSV4_BACKENDS_DENY", "triton")
    assert plan("8.6", "9.0")[attention].serves == "torch"


def test_rocm_is_refused(fake_vllm: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm()
    monkeypatch.delenv(f"{policy.PREFIX}DEVICE")
    monkeypatch.setattr(machine, "rocm", lambda: "6.4.43482")
    plan = engine.plan()
    assert not plan.ok
    assert {str(r) for row in plan.rows for r in row.reasons} == {
        "torch is built for ROCm (HIP 6.4.43482), and no provider serves AMD GPUs"
    }


def test_the_plan_has_the_measured_choice(fake_vllm: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake measurements put the reference before Triton, the rule of the reference's place aside (8.x)."""
    fake_vllm()
    rows = [("n=24 k=16384", None), ("n=24 k=28672", 64), ("n=24 k=4096", None)]
    known = tuple(
        preferences.Preference("hc_prenorm_gemm", shapes, 1, high, "torch", "triton", 1.1, "X") for shapes, high in rows
    )
    monkeypatch.setattr(preferences, "preferences", lambda device: known)
    (row,) = [row for row in engine.plan("sm_86").rows if row.target.attribute == "_tf32_hc_prenorm_gemm_impl"]
    assert (row.provider, row.serves) == ("torch", "torch (measured, else triton)")
    monkeypatch.setattr(preferences, "preferences", lambda device: known[1:2])
    (row,) = [row for row in engine.plan("sm_86").rows if row.target.attribute == "_tf32_hc_prenorm_gemm_impl"]
    assert (row.provider, row.serves) == ("triton", "triton (torch where measured)")


def test_a_target_that_looks_different(fake_vllm: Callable[..., Path]) -> None:
    """What is missing, or is called in another way, is refused by name, and what goes with it as well."""
    text = FILES["vllm/utils/deep_gemm.py"]
    text = text.replace("_fp8_einsum_impl", "_other").replace("max_model_len, indices", "max_model_len, depth, indices")
    fake_vllm(**{"vllm/utils/deep_gemm.py": text, "vllm/v1/attention/backends/mla/sparse_swa.py": ""})
    plan = engine.plan()
    found = {row.target.attribute: row for row in plan.rows}
    assert not plan.ok
    (missing,) = found["_fp8_einsum_impl"].reasons
    assert (missing.code, missing.message) == ("engine-target", "vllm.utils.deep_gemm has no _fp8_einsum_impl")
    (changed,) = found["_fp8_fp4_paged_mqa_logits_impl"].reasons
    assert "max_model_len, depth, indices)" in changed.message
    assert found["_get_paged_mqa_logits_metadata_impl"].state == patching.NOT_NEEDED
    assert found["has_deep_gemm"].state == patching.NOT_NEEDED
    assert found["get_mla_metadata"].state == patching.REFUSED
    assert found["_tf32_hc_prenorm_gemm_impl"].state == patching.PLANNED


def test_by_architecture(fake_vllm: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference does not take the place of a native library; MX scales and FlashInfer are vLLM's own affair."""
    path = "vllm/utils/deep_gemm.py"
    fake_vllm(**{path: FILES[path] + "\n        def mqa_logits_use_mx_scales(): ...\n"})
    for sm in ("sm_80", "sm_86", "sm_89"):
        plan = engine.plan(sm)
        assert plan.ok
        assert not plan.notes
        assert set(states(plan).values()) == {patching.PLANNED}
    monkeypatch.setenv("DSV4_BACKENDS_DENY", "triton")
    slow = {row.target.attribute: [r.code for r in row.reasons] for row in engine.plan("sm_90").rows}
    assert slow["_fp8_einsum_impl"] == ["engine-reference"]
    monkeypatch.setenv("DSV4_BACKENDS_DENY", "")
    for sm, logits, attention in (
        ("sm_90", patching.PLANNED, patching.PLANNED),
        ("sm_100", patching.REFUSED, patching.PLANNED),
        ("sm_120", patching.PLANNED, patching.NOT_NEEDED),
    ):
        found = states(engine.plan(sm))
        assert found["_fp8_einsum_impl"] == patching.PLANNED
        assert found["_fp8_fp4_mqa_logits_impl"] == found["_fp8_fp4_paged_mqa_logits_impl"] == logits
        assert found["flash_mla_with_kvcache"] == found["flash_mla_sparse_fwd"] == attention
    monkeypatch.setenv("DSV4_BACKENDS_PIN", "fp8_einsum=torch")
    assert states(engine.plan("sm_90"))["_fp8_einsum_impl"] == patching.PLANNED
    monkeypatch.setenv("DSV4_BACKENDS_PIN", "fp8_einsum=triton")
    (row,) = (row for row in engine.plan("cpu").rows if row.target.op == "fp8_einsum")
    assert [reason.code for reason in row.reasons] == ["no-provider"]


# ---------------------------------------------------------------------------------- apply, call, and undo


def test_nothing_without_the_variable(fake_vllm: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    fake_vllm()
    engine.register()
    assert hook.waiting() == ()
    assert caplog.text == ""


def test_from_register_to_undo(
    fake_vllm: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_vllm()
    monkeypatch.setenv("DSV4_BACKENDS_ENGINE", "1")
    engine.register()
    engine.register()
    assert len(hook.waiting()) == MODULES
    assert "vllm" not in sys.modules
    dg = importlib.import_module("vllm.utils.deep_gemm")
    own = dg._lazy_init.__wrapped__
    assert dg.initialised == 0
    x, fn, out, squares, splits = arguments()
    dg.tf32_hc_prenorm_gemm(x, fn, out, squares, splits)
    assert out.unique().tolist() == [64.0]
    # vLLM resolved its own names first, so that what is not ours is there.
    assert dg.initialised == 1
    assert dg.fp8_gemm_nt(5) == ("native", (5,), {})
    assert dg._lazy_init is own
    (line,) = (r.message for r in caplog.records if "runs on" in r.message)
    assert line.startswith("vllm 0.33.0 runs on dsv4_backends: sparse_mla_prefill torch, ")
    # A call that no op covers still reaches vLLM's own function.
    assert dg.fp8_einsum("bhd,hdr->bhr", 1, 2, 3) == ("native", ("bhd,hdr->bhr", 1, 2, 3), {})
    assert "passed on to vllm's _fp8_einsum_impl itself" in caplog.text
    lens, cache = SimpleNamespace(device="cpu"), SimpleNamespace(shape=(1, 64, 1, 68))
    query = (SimpleNamespace(dtype=None), "scales")
    kind, given, _ = dg.fp8_fp4_paged_mqa_logits(query, cache, 0, lens, 0, "ours", 9)
    assert (kind, given[5]) == ("native", ("native", (lens, 64, 3), {}))
    found = {row.target.attribute: row for row in engine.plan().rows}
    assert (found["_fp8_einsum_impl"].calls, found["_fp8_einsum_impl"].passed_on) == (1, 1)
    assert (found["_tf32_hc_prenorm_gemm_impl"].calls, found["_tf32_hc_prenorm_gemm_impl"].passed_on) == (1, 0)
    swa = importlib.import_module("vllm.v1.attention.backends.mla.sparse_swa")
    indexer = importlib.import_module("vllm.v1.attention.backends.mla.indexer")
    assert type(swa.get_mla_metadata(1, 2)[0]).__name__ == "FlashMLASchedMeta"
    assert indexer.has_deep_gemm() is True
    assert states(engine.plan())["flash_mla_sparse_fwd"] == patching.PLANNED
    somebody = object()
    indexer.has_deep_gemm = somebody
    assert engine.undo() == ["vllm.v1.attention.backends.mla.indexer:has_deep_gemm"]
    assert indexer.has_deep_gemm is somebody
    assert swa.get_mla_metadata is swa._raise_flashmla_unavailable
    assert dg._fp8_einsum_impl is dg.native
    assert dg._tf32_hc_prenorm_gemm_impl is None
    assert hook.waiting() == ()
    flashmla = importlib.import_module("vllm.models.deepseek_v4.nvidia.flashmla")
    assert flashmla.flash_mla_sparse_fwd.__module__ == flashmla.__name__


def test_undo_before_anything_was_called(fake_vllm: Callable[..., Path]) -> None:
    fake_vllm()
    engine.apply()
    dg = importlib.import_module("vllm.utils.deep_gemm")
    assert hasattr(dg._lazy_init, "__wrapped__")
    assert engine.undo() == []
    assert not hasattr(dg._lazy_init, "__wrapped__")
    engine.apply()
    dg._lazy_init()
    assert states(engine.plan())["_fp8_einsum_impl"] == patching.REPLACED


def test_a_function_with_unknown_parameters_is_left_alone(
    fake_vllm: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = "vllm/models/deepseek_v4/nvidia/flashmla.py"
    fake_vllm(**{path: FILES[path].replace("out=None", "out=None, window=7")})
    engine.apply()
    flashmla = importlib.import_module("vllm.models.deepseek_v4.nvidia.flashmla")
    assert flashmla.flash_mla_sparse_fwd.__module__ == flashmla.__name__
    found = {row.target.attribute: row for row in engine.plan().rows}
    assert found["flash_mla_sparse_fwd"].reasons[0].code == "engine-target"
    assert found["flash_mla_with_kvcache"].state == patching.REPLACED
    assert "parameters that we do not know: window" in caplog.text


def test_what_goes_wrong_stays_out_of_the_engine(
    fake_vllm: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A setting that cannot be understood, a bug of ours: one loud line, and vLLM goes on with its own."""
    fake_vllm()
    monkeypatch.setenv("DSV4_BACKENDS_ENGINE", "nonesuch")
    engine.register()
    assert "DSV4_BACKENDS_ENGINE: unknown engine 'nonesuch'. Known: 1, force, sglang, transformers, vllm" in caplog.text
    with pytest.raises(PolicyError):
        engine.plan()
    monkeypatch.setenv("DSV4_BACKENDS_ENGINE", "vllm")
    with monkeypatch.context() as patch:
        patch.setattr(engine.ENGINE, "judge", lambda *args: 1 / 0)
        engine.register()
    assert "please report it" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr(engine.ENGINE, "_counted", lambda *args: 1 / 0)
        engine.register()
        dg = importlib.import_module("vllm.utils.deep_gemm")
        indexer = importlib.import_module("vllm.v1.attention.backends.mla.indexer")
        dg._lazy_init()
    assert dg._fp8_einsum_impl is dg.native
    assert indexer.has_deep_gemm.__module__ == indexer.__name__
    found = {row.target.attribute: row for row in engine.plan().rows}
    assert found["_fp8_einsum_impl"].state == patching.FAILED
    assert found["_fp8_einsum_impl"].reasons[0].code == "engine-failed"
    # Our empty schedule must not reach vLLM's kernel, which is still there.
    assert found["_get_paged_mqa_logits_metadata_impl"].state == patching.NOT_NEEDED
    assert dg._get_paged_mqa_logits_metadata_impl is dg.native
    assert "vllm.utils.deep_gemm:_fp8_einsum_impl is not replaced: ZeroDivisionError" in caplog.text
    assert not engine.plan().ok


@pytest.mark.parametrize(
    ("value", "asked"),
    [("", ""), ("0", ""), (" 1 ", "1"), ("vllm", "vllm"), ("transformers, VLLM", "vllm"), ("force", "force")],
)
def test_the_variable(fake_vllm: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, value: str, asked: str) -> None:
    fake_vllm()
    monkeypatch.setenv("DSV4_BACKENDS_ENGINE", value)
    assert engine.plan().enabled is bool(asked)
    engine.register()
    assert len(hook.waiting()) == (MODULES if asked else 0)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("", "set DSV4_BACKENDS_ENGINE=1 in the engine's environment"),
        ("0", "set DSV4_BACKENDS_ENGINE=1 in the engine's environment"),
        ("sglang", "set DSV4_BACKENDS_ENGINE=sglang,vllm"),
    ],
)
def test_the_advice_keeps_what_is_on(
    fake_vllm: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    value: str,
    words: str,
) -> None:
    fake_vllm()
    monkeypatch.setenv("DSV4_BACKENDS_ENGINE", value)
    assert cli.main(["engine", "vllm", "--device", "sm_80"]) == 0
    assert f"not enabled: {words} REPLACED" in " ".join(capsys.readouterr().out.split())


def test_the_variable_names_another_engine(fake_vllm: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm()
    monkeypatch.setitem(engines.ENGINES, "other", "nowhere:ENGINE")
    monkeypatch.setenv("DSV4_BACKENDS_ENGINE", "other")
    assert not engine.plan().enabled
    engine.register()
    assert hook.waiting() == ()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("vllm,force", "expected 1, force or names of engines, got 'vllm,force'"),
        ("1,vllm", "expected 1, force or names of engines"),
        (",", "expected 1, force or names of engines, got ','"),
        ("2", "expected 1, force or names of engines, got '2'"),
        ("vlm", "unknown engine 'vlm', did you mean 'vllm'?"),
        ("vllm,sglan", "unknown engine 'sglan'"),
        ("transformers", "does not turn on transformers: call dsv4_backends.engines.transformers.enable(model)"),
    ],
)
def test_a_variable_that_turns_on_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str, words: str
) -> None:
    monkeypatch.setenv("DSV4_BACKENDS_ENGINE", value)
    with pytest.raises(PolicyError) as caught:
        engines.asked()
    assert words in str(caught.value)
    assert cli.main(["doctor", "--device", "cpu"]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FINDING")]
    assert "settings" in line
    assert words in line


def test_doctor_where_no_engine_is_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """1 leaves open which engine; a name does not."""
    told = {
        "1": "no engine that it turns on is installed: vllm",
        "vllm": "vllm is not installed (pip install 'vllm<0.34,>=0.32')",
        "sglang": "sglang is not installed (pip install 'sglang==0.5.23')",
    }
    for value, words in told.items():
        monkeypatch.setenv("DSV4_BACKENDS_ENGINE", value)
        assert cli.main(["doctor", "--device", "cpu"]) == 1
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FINDING")]
        assert words in line


def test_doctor_where_one_of_several_is_installed(
    fake_vllm: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One setting for both engines, which do not share an environment; and a name that is there twice."""
    fake_vllm()
    for value in ("vllm,sglang", "sglang,vllm,sglang,vllm"):
        monkeypatch.setenv("DSV4_BACKENDS_ENGINE", value)
        assert cli.main(["doctor", "--device", "sm_80"]) == 0
        lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines() if " engine " in line]
        assert lines == [
            ["ok", "engine", "sglang not installed"],
            [
                "ok",
                "engine",
                f"vllm 0.33.0: {len(engine.plan().rows) - 1} of {len(engine.plan().rows)} names are replaced",
            ],
        ]


def test_a_refusal_of_all_is_said_once(
    fake_vllm: Callable[..., Path], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_vllm("0.31.0")
    engine.apply()
    (record,) = caplog.records
    assert record.message.startswith("vllm: nothing is replaced: vllm 0.31.0 is installed, tested with")
    engine.undo()
    assert cli.main(["engine", "vllm", "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert {reason["code"] for target in data["targets"] for reason in target["reasons"]} == {"engine-version"}
    assert cli.main(["engine", "vllm"]) == 1
    assert capsys.readouterr().out.count("0.31.0 is installed") == 1


def test_a_module_that_cannot_be_prepared(fake_vllm: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    """DeepGEMM's names wait for a function that is not there: they have failed, and are not planned for ever."""
    path = "vllm/utils/deep_gemm.py"
    fake_vllm(**{path: FILES[path].replace("_lazy_init", "_other_init")})
    engine.apply()
    importlib.import_module("vllm.utils.deep_gemm")
    found = {row.target.attribute: row for row in engine.plan().rows}
    assert found["_fp8_einsum_impl"].state == patching.FAILED
    assert found["has_deep_gemm"].state in (patching.FAILED, patching.NOT_NEEDED)
    assert "_fp8_einsum_impl is not replaced: AttributeError" in caplog.text
    assert not engine.plan().ok


def test_importing_it_is_light(fake_vllm: Callable[..., Path]) -> None:
    """The entry point's module, and the entry point itself, neither start torch nor import the engine."""
    where = fake_vllm()
    code = (
        "import sys; from dsv4_backends.engines import vllm; vllm.register(); vllm.plan('sm_90')\n"
        "assert not {'torch', 'vllm', 'triton'} & set(sys.modules)\n"
        "assert vllm.version() == '0.33.0'"
    )
    environment = {**os.environ, "PYTHONPATH": str(where), "DSV4_BACKENDS_ENGINE": "1", "DSV4_BACKENDS_DEVICE": "sm_90"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_fp8_is_packed_as_bytes() -> None:
    """Triton has no e4m3 on 8.0 and 8.6; what is not FP8 is packed as vLLM does it."""
    import torch

    attention = importlib.import_module("dsv4_backends.engines.vllm.attention")
    got: list[tuple[Any, ...]] = []

    def own(x: Any, lengths: Any, *rest: Any) -> Any:
        got.append((x.dtype, *rest))
        return x

    x, lengths = torch.randn(5, 64, 128), torch.tensor([2, 3])
    query = x.to(torch.float8_e4m3fn)
    packed = attention.pack(own, query, lengths)
    assert packed.dtype is torch.float8_e4m3fn
    assert torch.equal(packed.view(torch.uint8), query.view(torch.uint8))
    attention.pack(own, x, lengths, -1.0, 32)
    assert got == [(torch.uint8, 0), (torch.float32, -1.0, 32)]


def test_the_entry_point_is_declared() -> None:
    from importlib import metadata

    (entry,) = metadata.distribution("dsv4-backends").entry_points.select(group="vllm.general_plugins")
    assert entry.load() is engine.register


# ---------------------------------------------------------------------------------------------- the command


def test_command(
    fake_vllm: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_vllm()
    monkeypatch.setenv("DSV4_BACKENDS_DENY", "triton")
    assert cli.main(["engine", "vllm"]) == 0
    out = capsys.readouterr().out
    assert "vllm 0.33.0 on CPU; not enabled: set DSV4_BACKENDS_ENGINE=1" in out
    lines = out.splitlines()
    assert lines[lines.index("vllm.utils.deep_gemm") + 1].split(maxsplit=2) == [
        "_fp8_einsum_impl",
        "planned",
        "output projection: torch",
    ]
    assert max(map(len, lines)) <= 100
    assert cli.main(["engine", "vllm", "--json", "--device", "sm_90"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["schema_version"] == 1
    assert data["devices"][0]["capability"] == "9.0"
    own = {target.attribute for target in engine.TARGETS if target.lacking and not target.without}
    ops = {t["attribute"]: t["reasons"][0]["code"] for t in data["targets"] if t["op"]}
    assert {code for name, code in ops.items() if name not in own} == {"engine-reference"}
    assert {code for name, code in ops.items() if name in own} == {"engine-served"}
    stand_ins = {"JitWarmupRegistry._add", "kernel_warmup"} | {t.attribute for t in engine.TARGETS if t.without}
    others = {t["state"] for t in data["targets"] if not t["op"] and t["attribute"] not in stand_ins}
    assert others == {"not needed"}
    assert len(data["targets"]) == len(engine.TARGETS)
    with pytest.raises(SystemExit):
        cli.main(["engine", "nonesuch"])


def test_command_for_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    """It has no hook: the command says what turns it on, and who would serve."""
    pytest.importorskip("transformers")
    assert cli.main(["engine", "transformers", "--device", "sm_86", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["engine"], data["enabled"]) == ("transformers", False)
    six = {"sparse_mla_prefill", "sparse_mla_decode", "mqa_logits", "paged_mqa_logits", "fp8_einsum", "hc_prenorm_gemm"}
    assert {target["op"] for target in data["targets"]} == six | {""}
    assert {target["provider"] for target in data["targets"] if target["op"]} == {"triton"}
    assert cli.main(["engine", "transformers", "--device", "cpu"]) == 0
    assert "not enabled: call dsv4_backends.engines.transformers.enable(model)" in capsys.readouterr().out


def test_a_changed_transformers_is_refused_by_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = importlib.import_module("dsv4_backends.engines.transformers.sources")
    monkeypatch.setitem(sources._SOURCES["cache_utils"], "DynamicSlidingWindowLayer", "0" * 16)
    sources.unknown.cache_clear()
    try:
        assert cli.main(["engine", "transformers", "--device", "cpu"]) == 1
        assert "its DynamicSlidingWindowLayer differ" in " ".join(capsys.readouterr().out.split())
    finally:
        sources.unknown.cache_clear()


def test_command_without_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["engine", "vllm", "--device", "cpu"]) == 1
    assert "vllm not installed" in capsys.readouterr().out


def test_logs_are_quiet_otherwise(fake_vllm: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    fake_vllm()
    with caplog.at_level(logging.DEBUG, "dsv4_backends"):
        engine.apply()
    assert caplog.text == ""
