"""vLLM's CUDA platform without a GPU: a platform plugin that reports the compute capability in ``FAKE_SM``.

vLLM's compiled modules need CUDA when they are loaded. Empty modules replace them, so that the Python code around them,
which is what the hook changes, runs unchanged.
"""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

from installed import distribution

COMPILED = (
    "vllm._C_stable_libtorch",
    "vllm._moe_C_stable_libtorch",
    "vllm._flashmla_C",
    "vllm._flashmla_extension_C",
    "vllm.vllm_flash_attn",
    "vllm.vllm_flash_attn.flash_attn_interface",
)
QUESTIONS = ("cutlass_scaled_mm_supports_block_fp8", "cutlass_scaled_mm_supports_fp8", "cutlass_group_gemm_supported")


def install(folder: Path) -> None:
    """Make this file a distribution in ``folder`` with vLLM's entry point, and put that first on the path."""
    distribution(folder, "fake-cuda", points={"vllm.platform_plugins": {"fake_cuda": "fake_cuda:plugin"}})
    sys.path[:0] = [str(folder), str(Path(__file__).parent)]
    for name in COMPILED:
        module: Any = types.ModuleType(name)
        module.__path__ = []
        sys.modules[name] = module
    attention: Any = sys.modules["vllm.vllm_flash_attn"]
    interface: Any = sys.modules["vllm.vllm_flash_attn.flash_attn_interface"]
    for module in (attention, interface):
        module.__getattr__ = lambda name: None
    import torch

    library = torch.library.Library("_C", "FRAGMENT")
    kept.append(library)
    for name in QUESTIONS:
        library.define(f"{name}(int capability) -> bool")
        library.impl(name, lambda capability: False, "CompositeExplicitAutograd")


kept: list[Any] = []
"""A library is loaded as long as its object exists."""


def plugin() -> str:
    """vLLM's entry point: the platform's class."""
    return "fake_cuda.FakeCudaPlatform"


def __getattr__(name: str) -> Any:
    # Made when vLLM asks: importing it needs vLLM.
    if name != "FakeCudaPlatform":
        raise AttributeError(name)
    from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum

    class FakeCudaPlatform(Platform):
        _enum = PlatformEnum.CUDA
        device_name = "cuda"
        device_type = "cpu"
        dispatch_key = "CPU"

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return DeviceCapability(*map(int, os.environ["FAKE_SM"].split(".")))

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return f"fake {os.environ['FAKE_SM']}"

        @classmethod
        def is_arch_support_pdl(cls) -> bool:
            return False

        @classmethod
        def support_deep_gemm(cls) -> bool:
            return cls.get_device_capability().major in (9, 10, 12)

        @classmethod
        def fp8_dtype(cls) -> Any:
            import torch

            return torch.float8_e4m3fn

    globals()["FakeCudaPlatform"] = FakeCudaPlatform
    return FakeCudaPlatform
