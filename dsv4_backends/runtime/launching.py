"""For authors of providers: kernels go to the device of their tensors, and a compiler's cache that fails is named.

A launch, of a kernel or inside a library, goes to the current device and to its current stream. The tensors of a call
may be on another one: engines and ``device_map`` keep several GPUs in one process.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from ..errors import CacheError
from ..selection.provider import Reason

if TYPE_CHECKING:
    from torch import Tensor


@functools.cache
def _current_device() -> Callable[[], int]:
    """What tells the current device: torch.cuda.current_device calls it, and takes five times as long."""
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


# ------------------------------------------------------------------------------------------- Triton's cache on disk


def _cache_folder() -> str:
    from triton import knobs

    return str(knobs.cache.dir)


def _unusable(folder: str, cause: object) -> str:
    return (
        f"Triton keeps the kernels that it compiles in {folder or 'no directory'}, which failed: {cause}. "
        "Set TRITON_CACHE_DIR (or TRITON_HOME, where .triton/cache is made) to a directory that can be written"
    )


def _is_about(path: object, folder: str) -> bool:
    """Whether a path is in the folder, or one that the folder is in."""
    if not isinstance(path, str) or not os.path.isabs(path):
        return False
    path, folder = os.path.abspath(path), os.path.abspath(folder)
    return os.path.commonpath([path, folder]) in (path, folder)


def cache_error(error: BaseException) -> CacheError | None:
    """What to raise in place of ``error`` where a launch failed because Triton could not use its cache, else None."""
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
    folder = place = _cache_folder()
    try:
        if not folder:
            raise FileNotFoundError("TRITON_CACHE_DIR is empty")
        while not os.path.lexists(place) and os.path.dirname(place) != place:
            place = os.path.dirname(place)
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(1 << 20))
            file.flush()
    except OSError as error:
        return Reason("cache-unusable", _unusable(folder, f"{place}: {error.strerror or error}"))
    return None
