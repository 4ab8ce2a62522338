"""The only place that compiles and launches kernels, so that launches can also be recorded.

Warm-up and the compile matrix record: the op's own function runs on tensors of the meta device, and what it would
launch is recorded instead. So they compile exactly what a call launches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dsv4_backends.provider import cache_error, elsewhere, launch_by_arguments, on_its_device

from .arch import Arch, simulated


@dataclass(frozen=True)
class Launch:
    """One recorded launch.

    Attributes:
        kernel: The ``triton.jit`` or ``gluon.jit`` function.
        arguments: By name, constants included.
        options: ``num_warps`` and the other options of the launch.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    def compile(self) -> Any:
        """Compile for Triton's active driver, unless that has been done."""
        try:
            return self.kernel.warmup(grid=self.grid, **self.arguments, **self.options)
        except Exception as error:
            if (named := cache_error(error)) is not None:
                raise named from error
            raise

    @property
    def constants(self) -> dict[str, Any]:
        """The compile-time constants, in the kernel's order."""
        return {p.name: self.arguments[p.name] for p in self.kernel.params if p.is_constexpr}


_recorder: ContextVar[Callable[[Launch], None] | None] = ContextVar("dsv4_backend_triton_recorder", default=None)


def launch_kernel(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
    """``kernel[grid](*args, **kwargs)`` on the device of the first argument, or a record of it.

    Args:
        kernel: Its first argument is a tensor, or a tensor map over one.

    Raises:
        CacheError: Triton has to compile the kernel, and cannot use its cache on disk.
    """
    kwargs["enable_fp_fusion"] = True  # Triton 3.9 warns without it, and 3.10 multiplies and adds separately without it
    record = _recorder.get()
    if record is None:
        where = args[0] if isinstance(args[0], Tensor) else args[0].base
        if elsewhere(where):
            with on_its_device(where):
                launch_by_arguments(kernel, where.get_device(), grid, args, kwargs)
        else:
            launch_by_arguments(kernel, where.get_device(), grid, args, kwargs)
        return
    names = kernel.arg_names
    arguments = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    record(Launch(kernel, grid, arguments, {k: v for k, v in kwargs.items() if k not in names}))


def entry(jit: Callable[..., Any], first: str, *, any_alignment: Sequence[str] = ()) -> Callable[[Any], Any]:
    """``triton.jit`` or ``gluon.jit`` that specialises a kernel on no number, so that nothing compiles while serving.

    Args:
        first: The first parameter that is a number. All after it are numbers or constants.
        any_alignment: Tensors on whose alignment the kernel is not specialised either.
    """

    def made(kernel: Any) -> Any:
        parameters = inspect.signature(kernel).parameters.values()
        names = [p.name for p in parameters if "constexpr" not in str(p.annotation)]
        numbers = names[names.index(first) :]
        return jit(kernel, do_not_specialize=numbers, do_not_specialize_on_alignment=list(any_alignment))

    return made


@contextmanager
def recording(record: Callable[[Launch], None], arch: Arch) -> Iterator[None]:
    """Within the block nothing is launched: ``record`` gets every launch, as for ``arch``."""
    recorder, machine = _recorder.set(record), simulated.set(arch)
    try:
        yield
    finally:
        simulated.reset(machine)
        _recorder.reset(recorder)
