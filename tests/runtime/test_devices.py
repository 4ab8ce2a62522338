"""Tensors on a GPU that is not the current one, without GPUs: what is current while something is launched.

On two GPUs: tests/gpu/test_two_gpus.py.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from dsv4_backend_triton import launch as triton_launch
from native import PLAIN, ops_of, subject
from native import use as use  # a fixture
from paths import ROOT

from dsv4_backends import NoProviderError
from dsv4_backends.contract import CONTRACTS, Case
from dsv4_backends.engines.transformers import kernels as transformers_kernels
from dsv4_backends.runtime import launching


class On1(torch.Tensor):
    """A CPU tensor that says it is on cuda:1."""

    def get_device(self) -> int:
        return 1


class Gpus:
    """The current one of two, and which it was whenever something was launched."""

    def __init__(self) -> None:
        self.current = 0
        self.launched: list[int] = []
        self.switched = 0

    def exchange(self, device: int) -> int:
        before, self.current = self.current, device
        self.switched += 1
        return before


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    made = Gpus()
    monkeypatch.setattr(launching, "_current_device", lambda: lambda: made.current)
    monkeypatch.setattr(torch.cuda, "_exchange_device", made.exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", made.exchange)
    return made


def there() -> torch.Tensor:
    return torch.zeros(4).as_subclass(On1)


class Kernel:
    """A kernel that notes where it was launched, and may fail."""

    def __init__(self, gpus: Gpus, error: Exception | None = None) -> None:
        self.gpus, self.error = gpus, error

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            self.gpus.launched.append(self.gpus.current)
            if self.error is not None:
                raise self.error

        return run


def by_triton(kernel: Any, where: Any) -> None:
    triton_launch.launch_kernel(kernel, (1,), where, 7)


def by_triton_through_a_tensor_map(kernel: Any, where: Any) -> None:
    triton_launch.launch_kernel(kernel, (1,), SimpleNamespace(base=where), 7)


def by_transformers(kernel: Any, where: Any) -> None:
    transformers_kernels._launch(kernel, (1,), where, where, 7)


LAUNCHERS = [by_triton, by_triton_through_a_tensor_map, by_transformers]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_kernels_go_to_the_device_of_their_tensors(launcher: Callable[..., None], gpus: Gpus) -> None:
    launcher(Kernel(gpus), there())
    assert (gpus.launched, gpus.current) == ([1], 0)
    with pytest.raises(ValueError, match="no such kernel"):
        launcher(Kernel(gpus, ValueError("no such kernel")), there())
    assert (gpus.launched, gpus.current) == ([1, 1], 0)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_nothing_is_switched_where_the_device_is_current(launcher: Callable[..., None], gpus: Gpus) -> None:
    gpus.current = 1
    launcher(Kernel(gpus), there())
    launcher(Kernel(gpus), torch.zeros(4))  # on the CPU, as in the interpreter
    assert (gpus.launched, gpus.switched) == ([1, 1], 0)


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize(
    ("library", "op"), [(library, op) for library in ("deep_gemm", "flash_mla") for op in ops_of(library)]
)
def test_libraries_are_called_on_the_device_of_the_tensors(
    use: Callable[..., None], gpus: Gpus, library: str, op: str, raises: bool
) -> None:
    """Their own launches, and what is launched before and after them."""
    use(library, "source" if library == "flash_mla" else "tokenspeed")
    module: ModuleType = sys.modules[library]
    for name, function in list(vars(module).items()):
        if callable(function) and not name.startswith("_") and not isinstance(function, type):

            @functools.wraps(function)
            def noted(*args: Any, _own: Any = function, _name: str = name, **kwargs: Any) -> Any:
                gpus.launched.append(gpus.current)
                if raises and _name == PLAIN[op][0]:
                    raise RuntimeError("the library fails")
                return _own(*args, **kwargs)

            setattr(module, name, noted)
    target = subject(library, op)
    made = target.contract.inputs(Case("here", "smoke", PLAIN[op][1]), torch.device("cpu"))
    first = next(iter(CONTRACTS[op].args))
    made[first] = made[first].as_subclass(On1)
    if raises:
        with pytest.raises(RuntimeError, match="the library fails"):
            target.run(made)
    else:
        target.run(made)
    assert set(gpus.launched) == {1}
    assert gpus.current == 0
    gpus.switched = 0
    gpus.current = 1
    if not raises:
        target.run(made)
        assert gpus.switched == 0


def test_only_these_functions_launch() -> None:
    """``kernel[grid](...)`` and launches of compiled kernels: only in functions that make the right device current."""
    found = set()
    for folder in ("backends", "dsv4_backends"):
        for path in sorted((ROOT / folder).glob("**/*.py")):
            for function in ast.walk(ast.parse(path.read_text())):
                if isinstance(function, ast.FunctionDef):
                    for node in ast.walk(function):
                        subscripted = isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
                        if subscripted and "grid" in ast.unparse(node.func.slice):  # type: ignore[attr-defined]
                            found.add((path.name, function.name))
    # Those of launching.py are called through launch_kernel and by the ops of the adapters, which make it current.
    assert found == {("kernels.py", "_launch"), ("launching.py", "_triton"), ("launching.py", "_runner")}


class OnGpu:
    """As much of a tensor as is asked for its device."""

    def __init__(self, index: int) -> None:
        self.index = index

    def get_device(self) -> int:
        return self.index


def test_deep_gemm_serves_the_gpu_of_its_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsv4_backend_deep_gemm import _device

    library = object()
    monkeypatch.setattr(_device, "deep_gemm", lambda: library)
    monkeypatch.setattr(_device, "_served", None)
    assert _device.refuses_device(OnGpu(1)) is None
    assert _device.library_for(OnGpu(1)) is library
    assert _device.library_for(OnGpu(1)) is library
    assert _device.library_for(OnGpu(-1)) is library  # the CPU of the tests
    reason = _device.refuses_device(OnGpu(0))
    assert reason is not None
    assert "here cuda:1; this call is on cuda:0" in str(reason)
    with pytest.raises(NoProviderError, match="one GPU in a process"):
        _device.library_for(OnGpu(0))
