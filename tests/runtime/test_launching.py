"""The launcher of the adapters' small kernels, with a kernel and a C launcher that note how they are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dsv4_backends.runtime import launching


@pytest.mark.parametrize(("known", "scratch"), [(True, 0), (True, 8), (False, 0)])
@pytest.mark.parametrize("early", [False, True])
def test_a_kernel_is_looked_up_by_what_compiles_it(
    monkeypatch: pytest.MonkeyPatch, known: bool, scratch: int, early: bool
) -> None:
    """Triton's launcher runs once for each device, set of flags and alignment; the compiled kernel runs after that."""
    monkeypatch.setattr(launching, "_known_launcher", lambda: known)
    monkeypatch.setattr(launching, "_compiled", {})
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 70 + device, raising=False)
    calls: list[Any] = []

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name, self.fn = name, object()

        def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., Any]:
            def launch(*arguments: Any, **options: Any) -> Any:
                if self.name == "jit":
                    assert options == {"enable_fp_fusion": True, **({"launch_pdl": True} if early else {})}
                calls.append((self.name, grid, arguments))
                return Kernel("compiled")

            return launch

        function, packed_metadata = "function", "metadata"

        @property
        def run(self) -> Any:
            return Launcher

    class Launcher:
        """Of Triton 3.6: the C function behind it takes addresses for tensors."""

        global_scratch_size, profile_scratch_size = scratch, 0
        launch_cooperative_grid, launch_pdl = "cooperative", "pdl"

        @staticmethod
        def launch(x: int, y: int, z: int, stream: int, *arguments: Any) -> None:
            assert arguments[:9] == ("function", "cooperative", "pdl", None, None, "metadata", None, None, None)
            calls.append(("compiled", (x, y, z), (tensor, *arguments[10:])))
            assert arguments[9] == tensor.data_ptr()
            assert stream == 70 + device
            launched.append(device)

    tensor = torch.zeros(3)
    launched: list[int] = []
    kernel = Kernel("jit")
    for device, rows, flags, aligned, expected in (
        (0, 3, (True, 4), True, "jit"),
        (0, 5, (True, 4), True, "compiled"),
        (0, 5, (False, 4), True, "jit"),
        (0, 5, (True, 4), False, "jit"),
        (1, 5, (True, 4), True, "jit"),
        (1, 6, (True, 4), True, "compiled"),
    ):
        launching.launch(kernel, device, (rows, 1, 1), (tensor,), (rows,), flags, aligned, early)
        name, grid, (first, *rest) = calls.pop()
        assert (name, grid, rest) == (expected, (rows, 1, 1), [rows, *flags])
        assert first is tensor
    assert launched == ([0, 1] if known and not scratch else [])


def test_nothing_is_kept_of_an_interpreted_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[Any, Any] = {}
    monkeypatch.setattr(launching, "_compiled", kept)

    class Interpreted:
        fn = object()

        def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
            return lambda *arguments, **options: calls.append(arguments)

    calls: list[Any] = []
    for _ in range(2):
        launching.launch(Interpreted(), -1, (1, 1, 1), (torch.zeros(3),), (1, 2), (4,))
    assert (len(calls), kept) == (2, {})
