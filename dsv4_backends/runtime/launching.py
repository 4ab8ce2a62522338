"""For authors of providers: launches on the device of the tensors, short launches of small Triton kernels, and errors
of Triton's cache on disk.

A launch, of a kernel or inside a library, goes to the current device and to its current stream. The tensors of a call
may be on another one: engines and ``device_map`` keep several GPUs in one process.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from ..errors import CacheError
from ..selection.foreign import words
from ..selection.provider import Reason

if TYPE_CHECKING:
    from torch import Tensor


@functools.cache
def _current_device() -> Callable[[], int]:
    """The function for the current device: torch.cuda.current_device calls it, and takes five times as long."""
    import torch

    function: Callable[[], int] = torch._C._cuda_getDevice
    return function


def elsewhere(tensor: Tensor) -> bool:
    """Whether a tensor is on a GPU that is not the current one; takes 0.1 us."""
    index = tensor.get_device()
    return index >= 0 and index != _current_device()()


def on_its_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the device of a tensor current, and afterwards the one before it. Takes microseconds: ask first."""
    import torch

    return torch.cuda.device(tensor.get_device())


# ------------------------------------------------------------------------------------------ small kernels of adapters

_compiled: dict[Hashable, Callable[..., Any]] = {}


@functools.cache
def _known_launcher() -> bool:
    """Whether a compiled kernel's C launcher is the one that ``_runner`` calls, which Triton 3.6 has."""
    import triton

    return str(triton.__version__).startswith("3.6.")


def _runner(compiled: Any, device: int, flags: tuple[Any, ...]) -> Callable[..., Any]:
    """What runs a compiled kernel: ``run(grid, tensors, numbers)``."""
    if not _known_launcher() or compiled.run.global_scratch_size or compiled.run.profile_scratch_size:
        # Slower: the form of Triton's tutorials.
        return lambda grid, tensors, numbers: compiled[grid](*tensors, *numbers, *flags)
    import torch

    run, stream, address = compiled.run, torch._C._cuda_getCurrentRawStream, torch.Tensor.data_ptr
    c_launcher, function, metadata = run.launch, compiled.function, compiled.packed_metadata
    # No scratch memory, and no hooks and their metadata, whose preparation takes longer than the launch. Addresses
    # instead of tensors, about which the launcher would ask the driver.
    fixed = (function, run.launch_cooperative_grid, run.launch_pdl, None, None, metadata, None, None, None)
    return lambda grid, tensors, numbers: c_launcher(
        *grid, stream(device), *fixed, *map(address, tensors), *numbers, *flags
    )


def launch(
    kernel: Any,
    device: int,
    grid: tuple[int, int, int],
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    flags: tuple[Any, ...],
    aligned: bool = True,
    early: bool = False,
) -> None:
    """Launch a Triton kernel without Triton's inspection of every argument, which can take longer than the kernel.

    The compiled kernel is kept by ``kernel``, ``device``, ``flags`` and ``aligned`` alone. The kernel must therefore be
    compiled alike for all other arguments: with ``do_not_specialize`` and ``do_not_specialize_on_alignment``, and with
    ``tl.int64`` where a number may need it.

    Args:
        kernel: Takes the tensors, the numbers and the flags, in this order.
        device: The GPU of the tensors, which must be current: see ``elsewhere`` and ``on_its_device``.
        flags: The values of its ``constexpr`` parameters.
        aligned: Whether the pointers that it is specialised on are multiples of 16.
        early: Launched while the kernel before it still runs (programmatic dependent launch), for which it waits by
            itself.

    Raises:
        CacheError: Triton has to compile the kernel and cannot keep it.
    """
    key = (kernel.fn, device, flags, aligned)
    found = _compiled.get(key)
    if found is not None:
        found(grid, tensors, numbers)
        return
    options = {"launch_pdl": True} if early else {}
    try:
        compiled = kernel[grid](*tensors, *numbers, *flags, enable_fp_fusion=True, **options)
    except Exception as error:
        if (named := cache_error(error)) is not None:
            raise named from error
        raise
    if compiled is not None:  # Triton's interpreter compiles nothing
        _compiled[key] = _runner(compiled, device, flags)


# ------------------------------------------------------------------------------------------- Triton's cache on disk


def _cache_folder() -> str:
    from triton import knobs

    return str(knobs.cache.dir)


def _unusable(folder: str, cause: object) -> str:
    if not folder:
        return "TRITON_CACHE_DIR is empty; unset it or name a directory"
    if not any(map(os.environ.get, ("TRITON_CACHE_DIR", "TRITON_HOME"))):
        home = os.path.expanduser("~")
        if not os.path.isdir(home):
            kind = "is not a directory" if os.path.lexists(home) else "does not exist"
            return f"HOME is {home}, which {kind}, and Triton keeps the kernels that it compiles there; {_SET_HOME}"
    return (
        f"Triton keeps the kernels that it compiles in {folder}, which failed: {cause}. "
        "Set TRITON_CACHE_DIR (or TRITON_HOME, where .triton/cache is made) to a directory that can be written"
    )


_SET_HOME = "set HOME or TRITON_CACHE_DIR to a directory that can be written"


def _manager_problem() -> str:
    """What is wrong with the class that Triton is set to use for its cache; without anything, empty.

    Triton imports it where it first compiles, and says neither the variable nor its value.
    """
    from triton import knobs

    for variable, read in (
        ("TRITON_CACHE_MANAGER", "manager_class"),
        ("TRITON_REMOTE_CACHE_BACKEND", "remote_manager_class"),
    ):
        if variable not in os.environ:
            continue
        try:
            getattr(knobs.cache, read)
        except Exception as error:
            message = f"Triton cannot use {variable}={os.environ[variable]}: {words(error)}"
            return f"{message}; unset it or name MODULE:CLASS that can be imported"
    return ""


def _is_about(path: object, folder: str) -> bool:
    """Whether a path is in the folder, or one that the folder is in."""
    if not isinstance(path, str) or not os.path.isabs(path):
        return False
    path, folder = os.path.abspath(path), os.path.abspath(folder)
    return os.path.commonpath([path, folder]) in (path, folder)


def cache_error(error: BaseException) -> CacheError | None:
    """What to raise in place of ``error`` where a launch failed because Triton could not use its cache, else None."""
    if wrong := _manager_problem():
        return CacheError(wrong)
    folder = _cache_folder()
    if "No space left on device" in str(error):
        # A compiler's temporary files fail with the same words and no path.
        return CacheError(f"{_unusable(folder, error)}; or TMPDIR, now {tempfile.gettempdir()}, if that is full")
    paths = (getattr(error, "filename", None), getattr(error, "filename2", None))
    if any(_is_about(path, folder) for path in paths) or "cache dir" in str(error):
        return CacheError(_unusable(folder, error))
    return None


def cache_problem() -> Reason | None:
    """Why Triton could not keep kernels on this machine, found by writing a file where the cache is or would be."""
    if wrong := _manager_problem():
        return Reason("cache-unusable", wrong)
    folder = place = _cache_folder()
    if not folder:
        return Reason("cache-unusable", _unusable(folder, ""))
    try:
        while not os.path.lexists(place) and os.path.dirname(place) != place:
            place = os.path.dirname(place)
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(1 << 20))
            file.flush()
    except OSError as error:
        return Reason("cache-unusable", _unusable(folder, f"{place}: {error.strerror or error}"))
    return None
