"""A GPU that is not there: torch, NVML and Triton answer for one of the compute capability ``FAKE_SM``.

Tensors that are made on ``cuda`` are made on the CPU, and zeroed. Every Triton kernel is compiled for the capability,
down to a cubin, and not launched. What does not compile, or needs more shared memory than the GPU has, is recorded.
"""

from __future__ import annotations

import collections
import contextlib
import os
import types
from collections.abc import Callable
from typing import Any

import torch
import triton.runtime.driver
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

MAJOR, MINOR = (int(part) for part in os.environ["FAKE_SM"].split("."))
GIB = 1 << 30
_SMS, _SHARED_KIB = {
    (8, 0): (108, 163),
    (8, 6): (84, 99),
    (8, 9): (128, 99),
    (9, 0): (132, 227),
    (10, 0): (148, 227),
    (12, 0): (170, 99),
}[MAJOR, MINOR]
NAME = f"no GPU, as {MAJOR}.{MINOR}"
UUID = "GPU-00000000-0000-0000-0000-000000000000"

PROPERTIES = types.SimpleNamespace(
    name=NAME,
    major=MAJOR,
    minor=MINOR,
    multi_processor_count=_SMS,
    total_memory=80 * GIB,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=_SHARED_KIB << 10,
    shared_memory_per_multiprocessor=(_SHARED_KIB + 1) << 10,
    L2_cache_size=50 << 20,
    gcnArchName="",
    uuid=UUID,
    is_integrated=False,
    is_multi_gpu_board=False,
)

compiled: collections.Counter[str] = collections.Counter()
"""Launches of each Triton kernel, by module and name."""
failed: dict[str, str] = {}
"""What is wrong with a kernel, by its name."""
late: collections.Counter[str] = collections.Counter()
"""Kernels that were first compiled while serving."""
serving = False
"""Whether the engine has started."""


class _Stream:
    """A stream or an event on which everything has happened."""

    device = torch.device("cpu")
    cuda_stream = stream_id = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 1.0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: Any) -> None: ...


def _always(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _pretend_torch() -> None:
    answers: dict[str, Any] = {
        "_lazy_init": None,
        "init": None,
        "is_initialized": False,
        "is_available": True,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "current_device": 0,
        "device_count": 1,
        "get_device_capability": (MAJOR, MINOR),
        "get_device_properties": PROPERTIES,
        "get_device_name": NAME,
        "graph_pool_handle": (0, 0),
    }
    nothing = ("set_stream", "set_device", "synchronize")
    memory: dict[str, Any] = {
        "memory_reserved": 0,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "max_memory_reserved": 0,
        "memory_stats": collections.defaultdict(int),
        "reset_peak_memory_stats": None,
        "empty_cache": None,
        "empty_host_cache": None,
    }
    cuda, accelerator = torch.cuda, torch.accelerator
    for name, value in (answers | dict.fromkeys(nothing)).items():
        setattr(cuda, name, _always(value))
    for name, value in memory.items():
        for module in (cuda, accelerator):
            setattr(module, name, _always(value))
    streams = {"Stream": _Stream, "Event": _Stream, "stream": lambda stream: _Stream()}
    streams |= {"current_stream": _Stream, "default_stream": _Stream}
    for name, value in streams.items():
        setattr(cuda, name, value)
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.mem_get_info = accelerator.get_memory_info = _always((20 * GIB, 20 * GIB))
    cuda.memory.get_allocator_backend = _always("none")
    cuda.device = lambda device: contextlib.nullcontext()
    torch.Event = torch.Stream = _Stream  # type: ignore[misc,assignment]
    accelerator.current_stream = _Stream  # type: ignore[assignment]
    accelerator.current_accelerator = _always(torch.device("cuda"))
    for name, value in (("device_count", 1), ("is_available", True), ("current_device_index", 0)):
        setattr(accelerator, name, _always(value))
    for name in ("synchronize", "set_device_index"):
        setattr(accelerator, name, _always(None))
    torch.Tensor.record_stream = lambda *args: None  # type: ignore[method-assign,assignment]


def _on_cpu(device: Any) -> Any:
    named = isinstance(device, str) and device.startswith("cuda")
    is_gpu = named or (isinstance(device, torch.device) and device.type == "cuda")
    return torch.device("cpu") if is_gpu else device


class OnCpu(TorchFunctionMode):
    """Within it, ``cuda`` means the CPU, and memory that nobody writes to is 0."""

    MADE = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu") if isinstance(kwargs["device"], int) else _on_cpu(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if name in ("to", "type_as"):
            args = tuple(_on_cpu(a) for a in args)
        if name in ("cuda", "pin_memory"):
            return args[0]
        if name in ("is_pinned", "record_stream"):
            return name == "is_pinned" or None
        if name in ("mm", "bmm", "addmm") and (dtype := kwargs.pop("out_dtype", None)) is not None:
            return func(*(a.float() if isinstance(a, torch.Tensor) else a for a in args), **kwargs).to(dtype)
        result = func(*args, **kwargs)
        if name in self.MADE and isinstance(result, torch.Tensor) and result.device.type == "cpu":
            with torch._C.DisableTorchFunction():
                result.zero_()
        return result


class _Driver:
    """As much of Triton's driver as compiling asks for."""

    class utils:  # noqa: N801
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            fixed = {"warpSize": 32, "max_num_regs": 65536, "sm_clock_rate": 1, "mem_clock_rate": 1, "mem_bus_width": 1}
            return {"max_shared_mem": _SHARED_KIB << 10, "multiprocessor_count": _SMS, **fixed}

        @staticmethod
        def load_binary(*args: Any) -> tuple[int, ...]:
            return 1, 1, 32, 0, 1024  # module, function, registers, spilled, threads

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", MAJOR * 10 + MINOR, 32)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None: ...
    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda

    def map_python_to_cpp_type(self, kind: str) -> str:
        return "void*"

    def launcher_cls(self, *args: Any, **kwargs: Any) -> Callable[..., None]:
        return _always(None)


def _compile_only() -> None:
    triton.runtime.driver.set_active(_Driver())
    own = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        name = f"{self.__module__}.{self.fn.__qualname__}"
        made = _record(name, lambda: own(self, *args, grid=grid, warmup=True, **kwargs))
        if made is not None and made.metadata.shared > _SHARED_KIB << 10:
            failed.setdefault(name, f"{made.metadata.shared} bytes of shared memory, of {_SHARED_KIB << 10}")
        return made

    JITFunction.run = run
    compile_one = JITFunction._do_compile

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if serving:
            late[f"{self.__module__}.{self.fn.__qualname__}"] += 1
        return compile_one(self, *args, **kwargs)

    JITFunction._do_compile = noted


def _record(name: str, compile_it: Callable[[], Any]) -> Any:
    """Compile a kernel for this GPU; what goes wrong is kept, and None returned."""
    compiled[name] += 1
    try:
        return compile_it()
    except Exception as error:
        failed.setdefault(name, f"{type(error).__name__}: {' '.join(str(error).split())[-400:]}")
        return None


def _other_compilers() -> None:
    """vLLM's kernels in the CuTe DSL are compiled too, where it is installed. TileLang's want nvcc and are counted."""
    from vllm.model_executor.warmup import jit_warmup_cutedsl_helper as cutedsl
    from vllm.model_executor.warmup import jit_warmup_tilelang_helper as tilelang

    def launch(self: Any, launch_spec: Any, inputs: Any) -> Any:
        _record(f"cutedsl:{type(self).__name__}", lambda: self.compile(launch_spec[0]))
        return launch_spec[2] if len(launch_spec) > 2 else None

    own = cutedsl.VllmCuTeDSLJitKernel.compile

    def compile_one(self: Any, key: Any) -> None:
        _record(f"cutedsl:{type(self).__name__}", lambda: own(self, key))

    cutedsl.VllmCuTeDSLJitKernel.launch = launch
    cutedsl.VllmCuTeDSLJitKernel.compile = compile_one

    def count(self: Any, *args: Any, **kwargs: Any) -> None:
        compiled[f"tilelang:{type(self).__name__}"] += 1

    tilelang.VllmTileLangJitKernel.launch = count
    tilelang.VllmTileLangJitKernel.compile = count


def _pretend_nvml() -> None:
    from vllm.third_party import pynvml

    answers: dict[str, Any] = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetHandleByIndex": 0,
        "nvmlDeviceGetHandleByUUID": 0,
        "nvmlDeviceGetCudaComputeCapability": (MAJOR, MINOR),
        "nvmlDeviceGetName": NAME,
        "nvmlDeviceGetUUID": UUID,
        "nvmlDeviceGetMemoryInfo": types.SimpleNamespace(total=80 * GIB, free=80 * GIB, used=0),
        "nvmlSystemGetDriverVersion": "580.0",
        "nvmlDeviceGetP2PStatus": 0,
    }
    for name, value in answers.items():
        setattr(pynvml, name, _always(value))


def _ours_too() -> None:
    """The layer takes the CPU's tensors for the GPU's, as they stand for them."""
    from packaging.version import Version

    from dsv4_backends.selection import machine

    gpu = machine.Device("cuda", 0, NAME, Version(os.environ["FAKE_SM"]), _SMS, 80 * GIB)
    machine.device_of = _always(gpu)


def router_in_cute_dsl() -> None:
    """The experts' router on 9.0 and 10.x, which wants tensors on a GPU and launches for itself."""
    from vllm.model_executor.kernels.linear.cute_dsl.ll_bf16 import LLBf16Gemm

    def gemm(self: Any, x: torch.Tensor, weight: torch.Tensor, output_dtype: torch.dtype = torch.float32) -> Any:
        sizes = {"M": x.shape[0], "K": x.shape[1], "N": weight.shape[0]}
        key = self.dispatch(**sizes, output_dtype=output_dtype)
        _record(f"cutedsl:{type(self).__name__}", lambda: self.compile(key))
        return torch.zeros(sizes["M"], sizes["N"], dtype=output_dtype)

    LLBf16Gemm.__call__ = gemm


def pretend() -> None:
    """All of it, for this process."""
    _pretend_torch()
    _compile_only()
    _pretend_nvml()
    _other_compilers()
    _ours_too()
