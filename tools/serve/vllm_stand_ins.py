"""A vLLM general plugin for tools/serve_on_gpu.sh, for a bundle without TileLang, the CuTe DSL and a checkpoint.

- With our hook off: without TileLang, vLLM's hyper-connections run in plain PyTorch (slow); without the CuTe DSL, its
  head-512 compressor is vLLM's own Triton kernel. Our hook replaces both by itself.
- Dummy weights get the variance of trained ones: the standard +-0.001 makes attention and logits flat.
- TileLang's kernels are compiled in as many processes as there are cores, unless its cache has them; vLLM compiles one
  after another.
- SERVE_CAPABILITY=8.0 makes vLLM see that compute capability.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.util
import math
import os
import pickle
import subprocess
import sys
import types
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LOGITS_STD = 4.0
"""Of the random model's logits: flat ones would hide errors."""

# ----------------------------------------------------------------------------------------------- random weights


@torch.no_grad()
def fill(param: Tensor, name: str) -> None:
    """Random values such that every matrix keeps the variance of its input."""
    if param.device.type == "meta":
        return
    generator = torch.Generator(param.device).manual_seed(zlib.crc32(name.encode()))
    scale_like = "scale" in name and param.dim() >= 2
    if param.dtype is torch.float8_e8m0fnu or (param.dtype is torch.uint8 and scale_like):
        # fp4 codes have an rms of 2.93 and a scale for 32; e4m3 of +-1 has 0.577 and a scale for 128.
        width, rms = (param.shape[-1] * 32, 2.93) if param.dtype is torch.uint8 else (param.shape[-1] * 128, 0.577)
        param.view(torch.uint8).fill_(127 + round(math.log2(1 / (rms * math.sqrt(width)))))
    elif param.dtype in (torch.uint8, torch.int8):
        param.view(torch.uint8).random_(0, 256, generator=generator)
    elif not param.is_floating_point():
        if "tid2eid" in name:
            param.random_(0, EXPERTS, generator=generator)
        else:
            param.zero_()
    elif param.dtype is torch.float32 and scale_like and param.dim() <= 3:
        param.fill_(2.0 ** round(math.log2(1 / (0.577 * math.sqrt(param.shape[-1] * 128)))))
    elif param.element_size() == 1:
        for part in param.view(-1).split(1 << 26):
            part.copy_(torch.empty(part.shape, device=part.device).uniform_(-1, 1, generator=generator))
    elif param.dim() == 1:
        if "norm" in name:
            param.fill_(1)
        else:
            param.uniform_(-0.5, 0.5, generator=generator)
    else:
        std = (LOGITS_STD if "lm_head" in name else 1.0) / math.sqrt(param.shape[-1])
        if "embed" in name:
            std = 1.0
        param.normal_(0, std, generator=generator)


def load_weights(self: Any, model: Any, model_config: Any) -> None:
    """In place of ``DummyModelLoader.load_weights``, which does not pass the modules' names."""
    from vllm.model_executor.model_loader.reload.utils import get_layer_tensors

    for prefix, layer in model.named_modules():
        for name, tensor in get_layer_tensors(layer).items():
            if name not in layer._non_persistent_buffers_set:
                fill(tensor, f"{prefix}.{name}")


EXPERTS = int(os.environ.get("SERVE_EXPERTS", "256"))

# ---------------------------------------------------------------------------- hyper-connections without TileLang


def vllms_gemm(x: Tensor, fn: Tensor) -> tuple[Tensor, Tensor]:
    """``ops.hc_prenorm_gemm`` by what vLLM calls for it; DeepGEMM's takes multiples of 8 rows."""
    from vllm.utils.deep_gemm import tf32_hc_prenorm_gemm

    if fn.shape[0] % 8:
        wide = x.float()
        return wide @ fn.T, wide.square().sum(-1)
    product = torch.empty(1, x.shape[0], fn.shape[0], dtype=torch.float32, device=x.device)
    squares = torch.empty(1, x.shape[0], dtype=torch.float32, device=x.device)
    tf32_hc_prenorm_gemm(x, fn, product, squares, 1)
    return product[0], squares[0]


def hyper_connections() -> dict[str, Any]:
    """Those of our hook, by vLLM's names and over vLLM's GEMM."""
    from dsv4_backends.engines.vllm import hyper_connections as ours

    ours.ops = types.SimpleNamespace(hc_prenorm_gemm=vllms_gemm)  # type: ignore[assignment]
    return {
        "mhc_pre_tilelang": ours.pre,
        "mhc_pre_broadcast_tilelang": ours.pre_broadcast,
        "mhc_post_tilelang": ours.post,
        "mhc_fused_post_pre_tilelang": ours.fused_post_pre,
        "hc_head_fused_kernel_tilelang": ours.head,
    }


# --------------------------------------------------------------------------------------- TileLang's warm-up

FEW_KEYS = 3
"""A process takes as long to start as one or two keys to compile."""
COMPILE = "import pickle, sys; [kind().compile(key) for kind, key in pickle.load(sys.stdin.buffer)]"


def compile_side_by_side() -> None:
    """Before vLLM compiles a kernel's keys, other processes do, into TileLang's cache on disk."""
    from vllm.model_executor.warmup.jit_warmup_tilelang_helper import VllmTileLangJitKernel

    def compile_many(self: Any, keys: Iterable[Any]) -> None:
        keys = list(keys)
        cache = Path(os.environ.get("TILELANG_CACHE_DIR", Path.home() / ".tilelang" / "cache"))
        cold = sum(1 for _ in cache.rglob("executable.so")) < len(keys)
        processes = min(len(keys) // FEW_KEYS, os.cpu_count() or 1) if cold else 0
        shares = [pickle.dumps([(type(self), key) for key in keys[i::processes]]) for i in range(processes)]
        command = [sys.executable, "-c", COMPILE]
        started = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in shares]
        for process, share in zip(started, shares, strict=True):
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin:  # its exit code says that it ended early
                process.stdin.write(share)
        failed = [code for process in started if (code := process.wait())]
        if failed:
            print(f"{type(self).__name__}: {len(failed)} of {processes} processes failed", flush=True)
        super(VllmTileLangJitKernel, self).compile_many(keys)

    VllmTileLangJitKernel.compile_many = compile_many


# -------------------------------------------------------------------------------- compressor without the CuTe DSL


class _NoWarmup:
    def register_warmup(self, *args: Any, **kwargs: Any) -> None: ...


def compressor(*, store_full_kv=False, store_full_fp8=False, fp8_scale=None, **call):
    from vllm.models.deepseek_v4.common.ops import fused_compress_quant_cache as kernels

    if call["num_actual"]:
        kernels.compress_norm_rope_store_triton(**call)


def _compressor_module() -> types.ModuleType:
    module = types.ModuleType("vllm.models.deepseek_v4.nvidia.ops.sparse_attn_compress_cutedsl")
    names = ["_SPARSE_ATTN_COMPRESS_C128_BLOCK8_KERNEL"]
    names += [f"_SPARSE_ATTN_COMPRESS_NORM_ROPE_STORE_{n}_KERNEL" for n in ("C4", "FULL_C4")]
    names += [f"_SPARSE_ATTN_NORM_ROPE_{n}_KERNEL" for n in ("STORE", "STORE_FULL")]
    for name in names:
        setattr(module, name, _NoWarmup())
    module._SPARSE_ATTN_COMPRESSOR_CUTEDSL_KERNEL = compressor  # type: ignore[attr-defined]
    return module


class _Finder(importlib.abc.MetaPathFinder):
    """Puts the hyper-connections into vLLM's model when it is imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in ("vllm.models.deepseek_v4.nvidia.model", "vllm.models.deepseek_v4.nvidia.mtp"):
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            execute(module)
            for function, stand_in in hyper_connections().items():
                if hasattr(module, function):
                    setattr(module, function, stand_in)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _report(capability: str) -> None:
    import vllm.platforms.cuda as platforms
    from vllm.platforms.interface import DeviceCapability

    reported = DeviceCapability(*map(int, capability.split(".")))

    def at_least(cls: Any, wanted: Any, device_id: int = 0) -> bool:
        pair = divmod(wanted, 10) if isinstance(wanted, int) else tuple(wanted)
        return (reported.major, reported.minor) >= pair

    for platform in (platforms.NvmlCudaPlatform, platforms.NonNvmlCudaPlatform):
        platform.get_device_capability = classmethod(lambda cls, device_id=0: reported)
        platform.has_device_capability = classmethod(at_least)
    # What modules have kept of the real one: whether CUTLASS's FP8 GEMMs run.
    from vllm.model_executor.layers.quantization.utils import w8a8_utils

    for module in list(sys.modules.values()):
        for kept in ("CUTLASS_FP8_SUPPORTED", "CUTLASS_BLOCK_FP8_SUPPORTED"):
            if kept in vars(module):
                setattr(module, kept, getattr(w8a8_utils, kept.lower())())


_registered = False


def register() -> None:
    """The entry point; vLLM calls it in every process, perhaps twice."""
    global _registered
    if _registered:
        return
    _registered = True
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    DummyModelLoader.load_weights = load_weights
    if importlib.util.find_spec("tilelang") is not None:
        compile_side_by_side()
    if capability := os.environ.get("SERVE_CAPABILITY"):
        _report(capability)
    if os.environ.get("DSV4_BACKENDS_ENGINE"):
        return
    if importlib.util.find_spec("cutlass") is None:
        module = _compressor_module()
        sys.modules.setdefault(module.__name__, module)
    if importlib.util.find_spec("tilelang") is None:
        sys.meta_path.insert(0, _Finder())
