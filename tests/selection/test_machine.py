from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

from dsv4_backends import PolicyError
from dsv4_backends.selection import machine

# A driver library with two different GPUs, enough of it for the probe.
FAKE_CUDA = r"""
#include <string.h>
#include <stddef.h>
int cuInit(unsigned flags) { return FAIL; }
int cuGetErrorName(int error, const char **name) { *name = "CUDA_ERROR_FAKE"; return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int index) { *device = 40 + index; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, device == 40 ? "Big" : "Small", size); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) {
  *bytes = device == 40 ? 150000000000ull : 24000000000ull;
  return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? (device == 40 ? 9 : 8) : attribute == 76 ? (device == 40 ? 0 : 6) : 132;
  return 0;
}
"""


@pytest.fixture
def fake_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    assert shutil.which("cc"), "a C compiler builds the fake driver"

    def build(fail: int = 0) -> None:
        source = tmp_path / "cuda.c"
        source.write_text(FAKE_CUDA.replace("FAIL", str(fail)))
        library = tmp_path / "libcuda.so.1"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
        monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
        machine._probe.cache_clear()

    yield build
    machine._probe.cache_clear()


def test_probe_reads_every_gpu(fake_driver: object) -> None:
    assert callable(fake_driver)
    fake_driver()
    here = machine.probe()
    assert [(d.name, d.capability, d.index) for d in here.gpus] == [
        ("Big", Version("9.0"), 0),
        ("Small", Version("8.6"), 1),
    ]
    assert here.gpus[0].memory == 150_000_000_000
    assert here.gpus[0].multiprocessors == 132
    assert here.devices == here.gpus  # two kinds, so a choice for each


def test_probe_happens_in_another_process(fake_driver: object) -> None:
    assert callable(fake_driver)
    fake_driver()
    code = (
        "from dsv4_backends.selection import machine; assert len(machine.probe().gpus) == 2;"
        "assert 'libcuda' not in open('/proc/self/maps').read(); import sys; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_driver_that_fails_is_a_note(fake_driver: object) -> None:
    assert callable(fake_driver)
    fake_driver(fail=999)
    here = machine.probe()
    assert here.gpus == ()
    assert here.note == "cuInit failed: CUDA_ERROR_FAKE (999)"
    assert here.devices == (machine.CPU,)


def test_probe_survives_a_child_that_prints_nonsense(monkeypatch: pytest.MonkeyPatch) -> None:
    machine._probe.cache_clear()
    monkeypatch.setattr(machine, "_PROBE", "print('hello')")
    assert "the probe for GPUs failed" in machine.probe().note
    machine._probe.cache_clear()


def test_same_gpus_are_one_kind() -> None:
    twins = tuple(machine.Device("cuda", i, "Twin", Version("9.0")) for i in range(8))
    assert machine.Machine(twins).devices == twins[:1]


@pytest.mark.parametrize(
    ("text", "capability"),
    [("sm_86", "8.6"), ("8.6", "8.6"), ("SM_120", "12.0"), ("cpu", None), (" CPU ", None)],
)
def test_simulate(text: str, capability: str | None) -> None:
    simulated = machine.simulate(text)
    assert simulated.simulated
    (device,) = simulated.devices
    assert device.capability == (None if capability is None else Version(capability))


def test_simulate_refuses() -> None:
    with pytest.raises(PolicyError, match=r"device: expected cpu or a GPU such as sm_86 or 8\.6, got 'h100'"):
        machine.simulate("h100")
    with pytest.raises(
        PolicyError, match=r"device: .*, got 'sm_99': CUDA 12 and 13 have no compute capability 9\.9, only 9\.0"
    ):
        machine.simulate("sm_99")


def test_variable_simulates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV4_BACKENDS_DEVICE", "sm_120")
    assert machine.probe().devices[0].capability == Version("12.0")
    monkeypatch.setenv("DSV4_BACKENDS_DEVICE", "sm_99")
    with pytest.raises(PolicyError, match=r"DSV4_BACKENDS_DEVICE: expected cpu or a GPU .*, got 'sm_99'"):
        machine.probe()


def test_installed_looks_up_on_demand() -> None:
    installed = machine.Installed()
    assert installed.get("no-such-distribution") is None
    assert installed["torch"]
    assert "pluggy" in set(installed)


def test_probe_source_is_json_without_a_driver() -> None:
    out = subprocess.run(
        [sys.executable, "-I", "-S", "-c", machine._PROBE], capture_output=True, text=True, check=True
    ).stdout
    assert set(json.loads(out)) == {"devices", "note"}
    assert ctypes.sizeof(ctypes.c_size_t) == 8  # what cuDeviceTotalMem_v2 writes


# ------------------------------------------------------------------------------------------------------- ROCm


def test_rocm_is_read_without_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the ROCm builds of torch write it, and the CUDA and CPU builds."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    version = tmp_path / "torch" / "version.py"
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    for line, expected in (
        ("hip: Optional[str] = '6.4.43482-0f2d60242'", "6.4.43482-0f2d60242"),
        ("hip = '5.7.31921'", "5.7.31921"),
        ("hip: Optional[str] = None", ""),
        ("", ""),
    ):
        version.write_text(f"__version__ = '2.13.0'\ncuda: Optional[str] = None\n{line}\nxpu: Optional[str] = '1'\n")
        assert machine.rocm() == expected
    version.unlink()
    assert machine.rocm() == ""


class Properties:
    name, major, minor, multi_processor_count, total_memory = "AMD Instinct MI250X", 9, 0, 110, 2**36


def test_an_amd_gpu_is_not_a_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """ROCm's torch calls it cuda, and its capability 9.0."""
    import torch

    from dsv4_backends.runtime import bind

    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for setting in ("", "sm_90"):
        monkeypatch.setenv("DSV4_BACKENDS_DEVICE", setting)
        device = machine.device_of(torch.device("cuda", 0))
        assert (device.type, device.capability) == ("hip", None)
        resolution = bind.resolution("mqa_logits", torch.device("cuda", 0))
        assert resolution.selected is None
        text = resolution.explain()
        assert "runs on an NVIDIA GPU or the CPU, this is AMD Instinct MI250X under ROCm (HIP 6.4)" in text
        assert "install" not in text


def test_commands_report_rocm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from dsv4_backends.commands import cli

    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert machine.probe().devices == (machine.CPU,)
    told = "torch is built for ROCm (HIP 6.4), and no provider serves AMD GPUs; the CPU remains"
    assert cli.main(["list"]) == 0
    assert f"note: {told}" in capsys.readouterr().out
    assert cli.main(["doctor"]) == 1
    found = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if line.startswith("FINDING")]
    assert found == [["FINDING", "gpu"], ["FINDING", "torch-rocm"]]
