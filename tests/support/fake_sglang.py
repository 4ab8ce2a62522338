"""SGLang on CUDA without a GPU: torch reports the compute capability in ``FAKE_SM``, and compiled packages are empty.

SGLang asks torch which GPU it is on, and imports ``sgl_kernel`` and ``torchvision``, which need CUDA when they are
loaded. Its Python code, which is what the hook changes, runs as it is, on the CPU.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
import types
from typing import Any

COMPILED = ("sgl_kernel", "torchvision")


class _Anything(type):
    """A class whose every attribute is such a class."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _Empty(types.ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _Finder:
    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        if name.partition(".")[0] not in COMPILED:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


def install(*, gpu: bool) -> None:
    """Before SGLang is imported. transformers comes first: it asks whether torchvision is installed.

    Args:
        gpu: Whether a GPU is made up, and Triton's kernels are run in its interpreter.
    """
    import transformers  # noqa: F401

    sys.meta_path.append(_Finder())  # type: ignore[arg-type]
    if not gpu:
        return
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter
    import torch

    interpreter.remember()

    major, minor = map(int, os.environ["FAKE_SM"].split("."))
    made_up = types.SimpleNamespace(
        name=f"fake {major}.{minor}", major=major, minor=minor, multi_processor_count=108, total_memory=80 << 30
    )
    cuda: Any = torch.cuda
    torch.version.cuda = "13.0"
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.get_device_capability = lambda *_: (major, minor)
    cuda.get_device_properties = lambda *_: made_up
    cuda.get_device_name = lambda *_: made_up.name
    cuda.is_current_stream_capturing = lambda: False
