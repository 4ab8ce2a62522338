"""CUDA's shared libraries, empty: enough for vLLM's compiled libraries to load beside the CPU build of torch.

vLLM's libraries use torch's stable interface. What they need beyond the CPU build are functions of CUDA's runtime and
driver and a few of ``libtorch_cuda``; vLLM's Python looks up more of the runtime by name. Each gets a function that
answers "no device", or the address of a text. With them the libraries register every op with its real schema, and
nothing of them is called.
"""

from __future__ import annotations

import ctypes
import glob
import re
import subprocess
import tempfile
from pathlib import Path

_RUNTIME, _DRIVER, _TORCH = "libcudart.so.13", "libcuda.so.1", "libtorch_cuda.so"
_WITHOUT_FUNCTIONS = ("libc10_cuda.so", "libnvrtc.so.13")
_FOLDER = tempfile.TemporaryDirectory()
"""Kept while the process lives: vLLM opens the runtime again by its path."""
_OF_TORCH = ("cublas", "aoti_torch_get_current_cuda", "torch_get_current_cuda", "torch_c10_cuda")


def _needed(vllm: Path) -> dict[str, set[str]]:
    """The functions that vLLM's libraries and its wrapper of the runtime want from each of CUDA's."""
    wanted: dict[str, set[str]] = {name: set() for name in (_RUNTIME, _DRIVER, _TORCH, *_WITHOUT_FUNCTIONS)}
    for library in (*glob.glob(f"{vllm}/*.so"), *glob.glob(f"{vllm}/third_party/deep_gemm/*.so")):
        listed = subprocess.run(
            ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
        ).stdout
        for symbol in (line.split()[-1] for line in listed.splitlines()):
            name, _, version = symbol.partition("@")
            if version == _RUNTIME:
                wanted[_RUNTIME].add(name)
            elif name.startswith(_OF_TORCH):
                wanted[_TORCH].add(name)
            elif name.startswith("cu") and name[2:3].isupper():
                wanted[_DRIVER].add(name)
    by_name = (vllm / "distributed/device_communicators/cuda_wrapper.py").read_text()
    wanted[_RUNTIME] |= set(re.findall(r'"(cuda[A-Z]\w+)"', by_name))
    return wanted


def load(vllm: Path) -> None:
    """Build the libraries for an installed vLLM and load them; later loads find them by their names."""
    for library, functions in _needed(vllm).items():
        source, built, versions = (Path(_FOLDER.name, f"{library}{end}") for end in (".c", "", ".map"))
        lines = []
        for name in sorted(functions):
            text = name.startswith("__cuda") or name.endswith(("ErrorString", "ErrorName", "StatusString"))
            body = 'return "no device";' if text else "return (void *)100;"  # cudaErrorNoDevice
            lines.append(f"void *{name}(void) {{ {body} }}")
        source.write_text("\n".join(lines) + "\n")
        command = ["cc", "-shared", "-fPIC", "-w", "-o", str(built), str(source), f"-Wl,-soname,{library}"]
        if library == _RUNTIME:
            versions.write_text(f"{library} {{ global: *; }};\n")
            command.append(f"-Wl,--version-script={versions}")
        subprocess.run(command, check=True)
        ctypes.CDLL(str(built), mode=ctypes.RTLD_GLOBAL)
