"""For authors of providers: launches on the device of the tensors, short launches of Triton kernels, and errors
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
from operator import itemgetter, or_
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


# --------------------------------------------------------------------------------------------------- short launches
#
# ``kernel[grid](...)`` takes tens of microseconds of Python: Triton looks at each argument for what it compiled, and
# prepares what hooks might ask for. What it compiled is kept here, and launched when the next call would find it again.


@functools.cache
def _parts() -> tuple[Any, ...]:
    """Triton's settings, and PyTorch's functions for the current stream and for a tensor's address and dtype."""
    import torch
    from triton import knobs

    stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return knobs.runtime, knobs.compilation, stream, torch.Tensor.data_ptr, torch.Tensor.dtype.__get__  # type: ignore[attr-defined]


def _observed(kernel: Any) -> bool:
    """Whether Triton has more to do at a launch now: to call hooks, or to compile for a setting that it reads anew."""
    now, compilation, *_ = _parts()
    enter, leave = now.launch_enter_hook, now.launch_exit_hook  # chains of hooks, empty at first
    return bool(
        getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
        or now.debug
        or now.add_stages_inspection_hook
        or compilation.instrumentation_mode
        or getattr(kernel, "pre_run_hooks", True)  # what has none is no kernel that Triton compiles
    )


def _runner(compiled: Any) -> Callable[[tuple[int, ...], int, tuple[Any, ...]], None] | None:
    """What runs a compiled kernel on the current device: ``run(grid, device, arguments)``, with addresses for tensors,
    about which the launcher would ask the driver. None if nothing was compiled, or not for CUDA."""
    import triton

    launcher: Any = getattr(compiled, "run", None)  # Triton's interpreter compiles nothing
    if type(launcher).__name__ != "CudaLauncher":
        return None
    release = triton.__version__.rpartition(".")[0]
    if launcher.global_scratch_size or launcher.profile_scratch_size or release not in _KNOWN:
        return lambda grid, device, arguments: compiled[(*grid, 1, 1)[:3]](*arguments)  # slower, and in every release
    launch, stream, flat = launcher.launch, _parts()[2], release == "3.6"
    how = (compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl)
    # Neither scratch memory nor hooks and their metadata, whose preparation takes longer than the launch.
    scratch, nobody = (None, None), (None, None, None)
    how += (*scratch, compiled.packed_metadata, *nobody) if flat else (compiled.packed_metadata, *nobody, *scratch)
    how += () if flat else (launcher.arg_annotations, launcher.kernel_signature)

    def run(grid: tuple[int, ...], device: int, arguments: tuple[Any, ...], held: Any = compiled) -> None:
        # ``held``: Triton unloads a compiled kernel that nobody has.
        launch(*(*grid, 1, 1)[:3], stream(device), *how, *(arguments if flat else (arguments,)))

    return run


def _triton(kernel: Any, grid: tuple[int, ...], args: Sequence[Any], options: dict[str, Any]) -> Any:
    """Triton's own launch, which compiles the kernel if it has to."""
    try:
        return kernel[grid](*args, **options)
    except Exception as error:
        if (named := cache_error(error)) is not None:
            raise named from error
        raise


_KNOWN = ("3.6", "3.8", "3.9")
"""Releases of Triton whose launcher is called directly."""

_compiled: dict[Hashable, Callable[..., None]] = {}


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
    """Launch a Triton kernel that is compiled alike for all arguments, without any look at them.

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
    observed = _observed(kernel)
    if found is not None and not observed:
        found(grid, device, (*map(_parts()[3], tensors), *numbers, *flags))
        return
    options = {"enable_fp_fusion": True, **({"launch_pdl": True} if early else {})}
    run = _runner(_triton(kernel, grid, (*tensors, *numbers, *flags), options))
    if run is not None and not observed:
        _compiled[key] = run


class _Form:
    """The calls of a kernel with arguments of the same types and options of the same names.

    Attributes:
        kernel: Held, since its ``id`` is what finds this.
        direct: Whether the rest is known, so that a compiled kernel can be found as Triton finds it.
        tensors: Takes the tensors from the arguments.
        aligned: Takes from the tensors' addresses those whose alignment the kernel is compiled for.
        numbers: Takes the integers from the arguments that are as wide as their value.
        maps: Where tensor descriptors are.
        constants: Takes from the arguments the values of ``constexpr`` parameters.
        whole: Takes what the launcher gets, by the kernel's parameters, from arguments, addresses and None.
        compiled: What runs the kernel, by device and by what Triton compiles for.
    """

    def __init__(self, kernel: Any, types: tuple[type, ...], names: tuple[str, ...]) -> None:
        from torch import Tensor

        self.kernel, self.direct = kernel, False
        self.compiled: dict[Hashable, Callable[..., None]] = {}
        given, rest = kernel.params[: len(types)], kernel.params[len(types) :]
        if any(p.kind is p.VAR_POSITIONAL for p in kernel.signature.parameters.values()):
            return
        if len(given) < len(types) or not all(p.is_constexpr for p in rest) or {p.name for p in given} & {*names}:
            return
        tensors: list[int] = []
        aligned: list[int] = []
        numbers: list[int] = []
        constants: list[int] = []
        self.maps: list[int] = []
        for i, (p, kind) in enumerate(zip(given, types, strict=True)):
            if p.is_constexpr:
                constants.append(i)
            elif issubclass(kind, Tensor):
                if not (p.do_not_specialize or p.do_not_specialize_on_alignment):
                    aligned.append(len(tensors))
                tensors.append(i)
            elif kind.__name__ == "TensorDescriptor" and kind.__module__.startswith("triton."):
                self.maps.append(i)
            elif kind is int and p.do_not_specialize:
                if not p.annotation_type:
                    numbers.append(i)
            elif kind not in (float, bool, type(None)):
                return
        self.direct = True
        self.tensors, self.aligned = _taking(tensors), _taking(aligned)
        self.numbers, self.constants = _taking(numbers), _taking(constants)
        count, none = len(types), len(types) + len(tensors)
        places = [count + tensors.index(i) if i in tensors else i for i in range(count)]
        self.whole = _taking(places + [none] * len(rest))


def _taking(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """What takes the elements at these places from a sequence."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda values: tuple(values[i] for i in places)


_WIDE = 1 << 31
_forms: dict[tuple[int, tuple[type, ...], tuple[str, ...]], _Form] = {}


def launch_by_arguments(
    kernel: Any, device: int, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """``kernel[grid](*args, **options)``, in fewer microseconds from the second call on.

    Every call looks at what Triton compiles for: the types of arguments, dtypes and alignment of tensors, constants and
    options. Triton's own launch serves while there are hooks, for a number of 64 bits whose parameter declares no type,
    for an option that is a dictionary, and for a kernel that is specialised on numbers. Values that a kernel reads from
    its module must stay as they are. A tensor that the GPU cannot read is not refused, as Triton would.

    Args:
        kernel: Made by ``triton.jit`` or ``gluon.jit``.
        device: The GPU of the tensors, which must be current: see ``elsewhere`` and ``on_its_device``. Or -1.
        options: ``constexpr`` parameters, ``num_warps`` and so on.

    Raises:
        CacheError: Triton has to compile the kernel and cannot keep it.
    """
    if device < 0 or _observed(kernel):
        _triton(kernel, grid, args, options)
        return
    _, _, _, address, dtype = _parts()
    kind = (id(kernel), tuple(map(type, args)), tuple(options))
    form = _forms.get(kind)
    if form is None:
        form = _forms[kind] = _Form(kernel, *kind[1:])
    numbers = form.numbers(args) if form.direct else (_WIDE,)
    if numbers and (max(numbers) >= _WIDE or min(numbers) < -_WIDE):
        _triton(kernel, grid, args, options)
        return
    tensors = form.tensors(args)
    addresses = tuple(map(address, tensors))
    aligned = form.aligned(addresses)
    multiples = () if not functools.reduce(or_, aligned, 0) & 15 else tuple(a & 15 == 0 for a in aligned)
    maps = [(args[i].base.dtype, getattr(args[i], "layout", None), *args[i].block_shape) for i in form.maps]
    key = (device, *map(dtype, tensors), *multiples, *maps, *form.constants(args), *options.values())
    try:
        run = form.compiled.get(key)
    except TypeError:  # an option that is a dictionary
        _triton(kernel, grid, args, options)
        return
    if run is not None:
        run(grid, device, form.whole((*args, *addresses, None)))
    elif (made := _runner(_triton(kernel, grid, args, options))) is not None:
        form.compiled[key] = made


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
