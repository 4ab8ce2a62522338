"""What this machine is: its devices and its installed distributions; probed, or simulated.

The probe runs in a child process, so that the calling process gets no CUDA context and can fork later. It uses
``libcuda`` rather than ``nvidia-smi``, so that ``CUDA_VISIBLE_DEVICES`` and the order of the devices are as in PyTorch.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.version import Version

from ..errors import PolicyError
from . import capability as cc
from .foreign import identity
from .requirements import version_of

_PROBE = """
import ctypes, json
def ask():
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return {"devices": [], "note": f"no NVIDIA driver library: {error}"}
    if status := cuda.cuInit(0):
        name = ctypes.c_char_p()
        cuda.cuGetErrorName(status, ctypes.byref(name))
        return {"devices": [], "note": f"cuInit failed: {(name.value or b'?').decode()} ({status})"}
    count, devices = ctypes.c_int(), []
    cuda.cuDeviceGetCount(ctypes.byref(count))
    for index in range(count.value):
        handle, value, text, size = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
        cuda.cuDeviceGet(ctypes.byref(handle), index)
        cuda.cuDeviceGetName(text, 256, handle)
        cuda.cuDeviceTotalMem_v2(ctypes.byref(size), handle)
        attributes = []
        for attribute in (75, 76, 16):  # major, minor, multiprocessor count
            cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle)
            attributes.append(value.value)
        devices.append([text.value.decode(), *attributes, size.value])
    return {"devices": devices, "note": ""}
print(json.dumps(ask()))
"""


@dataclass(frozen=True)
class Device:
    """A device that tensors are on.

    Attributes:
        type: ``"cuda"`` or ``"cpu"``; another one, such as ``"hip"``, is served by no provider.
        index: CUDA index, None for the CPU and for a simulated GPU.
        name: For people.
        capability: Compute capability, None for the CPU.
        multiprocessors: Streaming multiprocessors, 0 where unknown.
        memory: Bytes, 0 where unknown.
    """

    type: str
    index: int | None
    name: str
    capability: Version | None = None
    multiprocessors: int = 0
    memory: int = 0

    @property
    def label(self) -> str:
        if self.capability is None:
            return self.name
        return f"{self.name} (compute capability {self.capability}, {cc.sm(self.capability)})"

    def json(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "index": self.index,
            "name": self.name,
            "capability": None if self.capability is None else str(self.capability),
            "multiprocessors": self.multiprocessors,
            "memory": self.memory,
        }


CPU = Device("cpu", None, "CPU")


class Installed(Mapping[str, str]):
    """Installed distributions by name, looked up when asked: reading all their metadata takes a second."""

    def __getitem__(self, name: str) -> str:
        if (version := version_of(name)) is None:
            raise KeyError(name)
        return version

    def __iter__(self) -> Iterator[str]:
        return iter({identity(distribution)[0] for distribution in metadata.distributions()})

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(frozen=True)
class Machine:
    """The devices and the distributions that a choice depends on.

    Attributes:
        gpus: CUDA devices in PyTorch's order.
        installed: Distribution name to version.
        note: A problem of the probe, e.g. the driver's message; empty if there was none.
        simulated: Whether the user named the devices.
    """

    gpus: tuple[Device, ...] = ()
    installed: Mapping[str, str] = field(default_factory=Installed, compare=False)
    note: str = ""
    simulated: bool = False

    @property
    def devices(self) -> tuple[Device, ...]:
        """The devices to make a choice for: one per kind of GPU, or the CPU when there is none."""
        kinds: dict[tuple[str, Version | None], Device] = {}
        for device in self.gpus:
            kinds.setdefault((device.name, device.capability), device)
        return tuple(kinds.values()) or (CPU,)

    @property
    def fault(self) -> bool:
        """Whether the note is about GPUs that are not used: the driver refuses, the probe failed, torch is for AMD."""
        return any(word in self.note for word in ("cuInit", "probe", "ROCm"))


def simulate(text: str, name: str = "device") -> Machine:
    """A machine with this machine's packages and one device: ``cpu``, or a GPU such as ``sm_86``.

    Args:
        text: The device.
        name: What an error calls it.

    Raises:
        PolicyError: the text is neither, or no GPU has that compute capability.
    """
    if text.strip().lower() == "cpu":
        return Machine(note="simulated: cpu", simulated=True)
    capability = cc.parse_capability(text, name, "cpu or a GPU such as sm_86 or 8.6")
    device = Device("cuda", None, f"simulated {cc.sm(capability)} GPU", capability)
    return Machine((device,), note=f"simulated: {cc.sm(capability)}", simulated=True)


def probe() -> Machine:
    """This machine, or the one that ``DSV4_BACKENDS_DEVICE`` names. No CUDA context is created in this process."""
    if text := os.environ.get("DSV4_BACKENDS_DEVICE", "").strip():
        return simulate(text, "DSV4_BACKENDS_DEVICE")
    if hip := rocm():
        return Machine(note=f"torch is built for ROCm (HIP {hip}), and no provider serves AMD GPUs; the CPU remains")
    return _probe(os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("CUDA_DEVICE_ORDER"))


def rocm() -> str:
    """The version of HIP that the installed torch is built for; empty for CUDA and CPU builds. Imports nothing."""
    if (torch := sys.modules.get("torch")) is not None:
        return getattr(getattr(torch, "version", None), "hip", None) or ""
    try:
        spec = importlib.util.find_spec("torch")
        path = Path(spec.origin).with_name("version.py") if spec is not None and spec.origin else None
        text = path.read_text(encoding="utf-8", errors="replace") if path is not None else ""
    except (ImportError, ValueError, OSError):
        return ""
    match = re.search(r"^hip\b[^=\n]*= *['\"]([^'\"]+)", text, re.MULTILINE)
    return match[1] if match else ""


@lru_cache(maxsize=4)
def _probe(*_environment: str | None) -> Machine:
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PROBE], capture_output=True, text=True, timeout=60, check=True
        )
        answer: dict[str, Any] = json.loads(child.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return Machine(note=f"the probe for GPUs failed: {error}")
    gpus = tuple(
        Device("cuda", index, name, Version(f"{major}.{minor}"), multiprocessors, memory)
        for index, (name, major, minor, multiprocessors, memory) in enumerate(answer["devices"])
    )
    return Machine(gpus, note=answer["note"])


def device_of(torch_device: Any) -> Device:
    """The ``Device`` behind the ``torch.device`` of an existing tensor.

    A CUDA tensor means that its context exists, so PyTorch may be asked directly. ``DSV4_BACKENDS_DEVICE=sm_XX``
    replaces the capability of every GPU (to run another architecture's code path here); it does not move tensors.
    """
    if torch_device.type != "cuda":
        return CPU if torch_device.type == "cpu" else Device(torch_device.type, None, str(torch_device))
    import torch

    properties = torch.cuda.get_device_properties(torch_device)
    if torch.version.hip:  # its capabilities are of another kind: an MI250X says 9.0, and is no Hopper
        return Device("hip", torch_device.index, f"{properties.name} under ROCm (HIP {torch.version.hip})")
    capability = Version(f"{properties.major}.{properties.minor}")
    name = properties.name
    if text := os.environ.get("DSV4_BACKENDS_DEVICE", "").strip():
        simulated = simulate(text, "DSV4_BACKENDS_DEVICE")
        if simulated.gpus:
            capability = simulated.gpus[0].capability or capability
            name = f"{name} as {cc.sm(capability)}"
    index = torch.cuda.current_device() if torch_device.index is None else torch_device.index
    return Device("cuda", index, name, capability, properties.multi_processor_count, properties.total_memory)


def torch_device(wanted: Any = None, name: str = "device") -> Any:
    """The ``torch.device``, with its index, that a caller names by anything that PyTorch takes.

    Args:
        wanted: None: the current GPU, else the CPU.
        name: What an error calls it.

    Raises:
        PolicyError: there is no such device here, or no op runs on it.
    """
    import torch

    if wanted is None:
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except (RuntimeError, TypeError, ValueError):
        raise PolicyError(f"{name}: expected a torch device such as cuda, cuda:1 or cpu, got {wanted!r}") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise PolicyError(f"{name}: the ops run on cuda and on cpu, got {str(device)!r}")
    if not torch.cuda.is_available():
        raise PolicyError(f"{name}: got {str(device)!r}, but PyTorch {torch.__version__} finds no GPU here")
    count = torch.cuda.device_count()
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= count:
        raise PolicyError(f"{name}: expected an index below {count}, the number of GPUs here, got {str(device)!r}")
    return torch.device("cuda", index)
