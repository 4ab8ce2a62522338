"""A vLLM general plugin for tools/serve_on_gpu.sh: what a bundle without TileLang and the CuTe DSL, and without a
checkpoint, needs.

- Where TileLang is missing, vLLM's hyper-connections run in plain PyTorch (slow); where the CuTe DSL is missing, its
  head-512 compressor is vLLM's own Triton kernels. Both are the baseline's: our hook replaces the compressor where it
  takes over, and the prenorm GEMM in either.
- Dummy weights get the variance of trained ones: the standard +-0.001 makes attention and logits flat.
- SERVE_CAPABILITY=8.0 makes vLLM see that compute capability.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import math
import os
import sys
import types
import zlib
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
    """In place of ``DummyModelLoader.load_weights``, which tells no module's name."""
    from vllm.model_executor.model_loader.reload.utils import get_layer_tensors

    for prefix, layer in model.named_modules():
        for name, tensor in get_layer_tensors(layer).items():
            if name not in layer._non_persistent_buffers_set:
                fill(tensor, f"{prefix}.{name}")


EXPERTS = int(os.environ.get("SERVE_EXPERTS", "256"))

# ---------------------------------------------------------------------------- hyper-connections without TileLang


def _mixes(x: Tensor, fn: Tensor, numel: int, hc: int, scale: Tensor, base: Tensor, rms_eps: float, pre_eps: float,
           sink_eps: float, post_mult: float, repeat: int) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from vllm.utils.deep_gemm import tf32_hc_prenorm_gemm  # ours where the hook is on

    product = torch.empty(1, x.shape[0], fn.shape[0], dtype=torch.float32, device=x.device)
    squares = torch.empty(1, x.shape[0], dtype=torch.float32, device=x.device)
    tf32_hc_prenorm_gemm(x, fn, product, squares, 1)
    mix = product[0] * torch.rsqrt(squares[0] / numel + rms_eps).unsqueeze(-1)
    pre = torch.sigmoid(mix[:, :hc] * scale[0] + base[:hc]) + pre_eps
    post = torch.sigmoid(mix[:, hc : 2 * hc] * scale[1] + base[hc : 2 * hc]) * post_mult
    comb = mix[:, 2 * hc :].view(-1, hc, hc) * scale[2] + base[2 * hc :].view(1, hc, hc)
    comb = torch.softmax(comb, -1) + sink_eps
    comb = comb / (comb.sum(-2, keepdim=True) + sink_eps)
    for _ in range(repeat - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + sink_eps)
        comb = comb / (comb.sum(-2, keepdim=True) + sink_eps)
    return pre, post, comb


def _norm(y: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return y.to(torch.bfloat16)
    rsqrt = torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y.to(torch.bfloat16).float() * rsqrt * weight.float()).to(torch.bfloat16)


def mhc_pre_tilelang(residual, fn, hc_scale, hc_base, rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value,
                     sinkhorn_repeat, n_splits=1, norm_weight=None, norm_eps=1e-6):  # fmt: skip
    *outer, hc, hidden = residual.shape
    flat = residual.view(-1, hc, hidden)
    eps = (rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat)
    pre, post, comb = _mixes(flat.view(-1, hc * hidden), fn, hc * hidden, hc, hc_scale, hc_base, *eps)
    y = (pre.unsqueeze(-1) * flat.float()).sum(1)
    return post.view(*outer, hc, 1), comb.view(*outer, hc, hc), _norm(y, norm_weight, norm_eps).view(*outer, hidden)


def mhc_pre_broadcast_tilelang(residual, fn, hc_scale, hc_base, rms_eps, hc_pre_eps, hc_sinkhorn_eps,
                               hc_post_mult_value, sinkhorn_repeat, n_splits=1, norm_weight=None, norm_eps=1e-6,
                               fn_broadcast=None):  # fmt: skip
    hidden = residual.shape[-1]
    hc = fn.shape[1] // hidden
    eps = (rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat)
    pre, post, comb = _mixes(residual, fn_broadcast, hidden, hc, hc_scale, hc_base, *eps)
    y = pre.sum(-1, keepdim=True) * residual.float()
    streams = residual.unsqueeze(1).expand(-1, hc, -1).contiguous()
    return streams, post.unsqueeze(-1), comb, _norm(y, norm_weight, norm_eps)


def mhc_post_tilelang(x, residual, post_layer_mix, comb_res_mix):
    post = post_layer_mix if post_layer_mix.dim() == residual.dim() else post_layer_mix.unsqueeze(-1)
    mixed = torch.einsum("...ij,...ih->...jh", comb_res_mix.float(), residual.float())
    return (mixed + post.float() * x.unsqueeze(-2).float()).to(residual.dtype)


def mhc_fused_post_pre_tilelang(x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, rms_eps, hc_pre_eps,
                                hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat, n_splits=1, tile_n=1,
                                norm_weight=None, norm_eps=1e-6):  # fmt: skip
    streams = mhc_post_tilelang(x, residual, post_layer_mix, comb_res_mix)
    eps = (rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat)
    norm = {"norm_weight": norm_weight, "norm_eps": norm_eps}
    return (streams, *mhc_pre_tilelang(streams, fn, hc_scale, hc_base, *eps, **norm))


def hc_head_fused_kernel_tilelang(hs_flat, fn, hc_scale, hc_base, rms_eps, hc_eps):
    n, hc, hidden = hs_flat.shape
    x = hs_flat.reshape(n, hc * hidden).float()
    mix = (x @ fn.T) * torch.rsqrt(x.square().mean(-1, keepdim=True) + rms_eps)
    pre = torch.sigmoid(mix * hc_scale[0] + hc_base) + hc_eps
    return (pre.unsqueeze(-1) * hs_flat.float()).sum(1).to(torch.bfloat16)


HYPER_CONNECTIONS = (
    mhc_pre_tilelang,
    mhc_pre_broadcast_tilelang,
    mhc_post_tilelang,
    mhc_fused_post_pre_tilelang,
    hc_head_fused_kernel_tilelang,
)

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
            for function in HYPER_CONNECTIONS:
                if hasattr(module, function.__name__):
                    setattr(module, function.__name__, function)

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


_registered = False


def register() -> None:
    """The entry point; vLLM calls it in every process, perhaps twice."""
    global _registered
    if _registered:
        return
    _registered = True
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    DummyModelLoader.load_weights = load_weights
    if capability := os.environ.get("SERVE_CAPABILITY"):
        _report(capability)
    if importlib.util.find_spec("cutlass") is None:
        module = _compressor_module()
        sys.modules.setdefault(module.__name__, module)
    if importlib.util.find_spec("tilelang") is None:
        sys.meta_path.insert(0, _Finder())
