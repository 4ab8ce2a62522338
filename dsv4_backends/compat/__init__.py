"""The native libraries' own names and signatures, over the ops.

``compat.deep_gemm`` and ``compat.flash_mla`` have the functions that engines call for DeepSeek V4, with the arguments
of every release line and the results that the callers of that line expect. ``install()`` puts them behind ``import
deep_gemm`` and ``import flash_mla``. Importing this package imports neither torch nor a library.

Engines import other names too. A name that an engine imports without a test exists (``IMPORTED``); calling it raises
``UnsupportedError`` if no library has it. A name that engines look for with ``hasattr`` does not exist without a
library, so that they use their own functions.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import logging
import sys
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any, cast

from .. import __version__ as _version
from ..errors import UnsupportedError
from ..locks import natives as _lock

LIBRARIES = ("deep_gemm", "flash_mla")

_log = logging.getLogger("dsv4_backends")
_FRONTS = {
    "deep_gemm": "deep_gemm",
    "flash_mla": "flash_mla",
    # Some callers go past the package to the module that defines the functions.
    "flash_mla.flash_mla_interface": "flash_mla",
}
"""Module name to the module of this package that replaces it."""
_LAYOUT = ("get_mn_major_tma_aligned_packed_ue8m0_tensor", "get_mn_major_tma_aligned_tensor", "get_tma_aligned_size")
_MATH = ("align", "pack_ue8m0_to_int", "per_block_cast_to_fp8", "transform_ue4m3_sf_into_required_layout")
IMPORTED: dict[str, tuple[str, ...]] = {
    "deep_gemm": ("per_block_cast_to_fp8", "transform_sf_into_required_layout", "transform_weights_for_mega_moe"),
    "deep_gemm.utils": (*_LAYOUT, *_MATH),
    "deep_gemm.utils.layout": _LAYOUT,
    "deep_gemm.utils.math": _MATH,
    "flash_mla": ("fused_norm_rope_attn_rope_cast", "get_mla_decoding_metadata"),
    "flash_mla.flash_mla_interface": ("fused_norm_rope_attn_rope_cast", "get_mla_decoding_metadata"),
}
"""By module: what engines import and no op covers (SGLang 0.5.23; vLLM 0.33 tests before it imports). A module that
is not in ``_FRONTS`` is put there only where no library has it."""
_before: dict[str, ModuleType | None] = {}
"""What ``sys.modules`` held for the names that are installed."""
_native: dict[str, ModuleType] = {}
"""The libraries that were imported past an installed front."""
_fronts: dict[str, _Front] = {}
"""Every front that has been made. A name gets the same one again: modules that imported it keep it."""
_logged: set[tuple[str, str]] = set()


def __getattr__(name: str) -> Any:
    if name in LIBRARIES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def native(name: str) -> ModuleType:
    """The installed library behind a name, past what ``install()`` put in front of it.

    A provider that serves an op with a native library imports it through this function: ``import deep_gemm`` would
    give it the front, whose functions call the provider.

    Args:
        name: ``"deep_gemm"``, ``"flash_mla"``, or a module inside one of them.

    Raises:
        ImportError: no such library is installed, or its import failed.
    """
    with _lock:
        if name not in _before:
            return importlib.import_module(name)
        if (library := _native.get(name)) is None:
            package = name.partition(".")[0]
            hidden = {front: sys.modules.pop(front) for front in list(_before) if front.partition(".")[0] == package}
            try:
                for front in hidden:  # as they were, so that nothing is imported twice
                    if (module := _before[front]) is not None:
                        sys.modules[front] = module
                library = _native[name] = importlib.import_module(name)
            finally:
                for front, module in hidden.items():
                    _before[front] = sys.modules.get(front)
                    sys.modules[front] = module
        return library


def loaded(name: str) -> ModuleType | None:
    """The library behind a name if it has been imported already."""
    module = _native.get(name) or sys.modules.get(name)
    return None if isinstance(module, _Front) else module


def or_native(
    function: Callable[..., Any], find: Callable[[], Callable[..., Any] | None], library: str
) -> Callable[..., Any]:
    """``function``; if it raises ``UnsupportedError``, the library's own function.

    Args:
        function: One of ours. It raises ``UnsupportedError`` before it has done anything.
        find: Gives the library's function, or None where there is none.
        library: Its name, for the log: each thing that is passed on is logged once.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except UnsupportedError as error:
            if (own := find()) is None:
                raise
            if (library, str(error)) not in _logged:
                _logged.add((library, str(error)))
                _log.warning("%s; passed on to %s itself", error, library)
        return own(*args, **kwargs)

    return call


def _search_locations(name: str) -> list[str]:
    """Where the installed package has its modules; they are importable even where its ``__init__`` fails."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return []
    return list(spec.submodule_search_locations or ()) if spec is not None else []


class _Front(ModuleType):
    """A module with our functions, if any, that has every other attribute of the library behind it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)

    def fill(self, locations: list[str]) -> None:
        """Put our functions here, and say where the library has its modules."""
        name = self.__name__
        ours = importlib.import_module(f"{__name__}.{_FRONTS[name]}") if name in _FRONTS else None
        self.__doc__ = ours.__doc__ if ours else None
        is_package = any(other.startswith(f"{name}.") for other in (*_FRONTS, *IMPORTED)) or "." not in name
        spec = importlib.machinery.ModuleSpec(name, None, origin=__name__, is_package=is_package)
        if is_package:
            spec.submodule_search_locations = self.__path__ = locations
            self.__package__ = name
        else:
            self.__package__ = name.rpartition(".")[0]
        self.__spec__ = spec
        for public in ours.__all__ if ours else ():
            value = getattr(ours, public)
            if ours and not isinstance(value, type):
                value = or_native(value, functools.partial(own, name, public), name)
            setattr(self, public, value)

    def empty(self) -> None:
        """Take our functions away: to whoever keeps this module it is the library."""
        for public in [public for public in vars(self) if not public.startswith("__")]:
            delattr(self, public)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__version__":
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        try:
            library = native(self.__name__)
            if hasattr(library, name):
                return getattr(library, name)
            why = "the library behind it has none either"
        except Exception as error:  # a library that does not load says so in many ways
            why = f"the import of the library behind it raised {error!r}"
            if isinstance(error, ModuleNotFoundError) and f"{self.__name__}.".startswith(f"{error.name}."):
                why = f"no {error.name} is installed behind it"
        if name == "__version__":
            return f"{_version}+dsv4.backends"
        if name in IMPORTED.get(self.__name__, ()):
            return _unserved(f"{self.__name__}.{name}", why)
        raise AttributeError(
            f"module {self.__name__!r}, put there by dsv4_backends.compat, has no attribute {name!r}, and {why}"
        )

    def __dir__(self) -> list[str]:
        library = _native.get(self.__name__)
        beside = IMPORTED.get(self.__name__, ())
        return sorted({*super().__dir__(), *beside, *(dir(library) if library is not None else ())})


def _unserved(name: str, why: str) -> Callable[..., Any]:
    """The function that an engine gets if it imports a name that no op covers and no library has."""

    def call(*args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError(f"{name}: no op of dsv4_backends covers it, and {why}")

    call.__name__ = call.__qualname__ = name.rpartition(".")[2]
    call.__doc__ = f"Raises UnsupportedError: {why}."
    return call


def own(name: str, public: str) -> Callable[..., Any] | None:
    """The library's function for what ours cannot serve, prepared for metadata of ours; None without a library.

    Args:
        name: ``"deep_gemm"`` or ``"flash_mla"``.
        public: The function's name.
    """
    ours = importlib.import_module(f"{__name__}.{_FRONTS[name]}")
    try:
        library = native(name)
    except Exception as error:
        if not isinstance(error, ModuleNotFoundError):
            _log.warning("%s is installed but its import raised %r", name, error)
        return None
    if not hasattr(library, public):
        return None
    return cast("Callable[..., Any] | None", ours.own(library, public))


class Installed:
    """What ``install()`` did. As a context manager it takes that back at the end of the block."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def __enter__(self) -> Installed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        uninstall(*self.names)


def installed(name: str) -> bool:
    """Whether ``install()`` has put our functions behind ``import`` of this name."""
    return isinstance(sys.modules.get(name), _Front)


def install(*names: str) -> Installed:
    """Put our functions behind ``import deep_gemm`` and ``import flash_mla``.

    Every other attribute, and every submodule, is still that of the library, where one is installed. A call that no
    op covers (``UnsupportedError``) goes to the library too, and the log says so once. Code that has imported the
    library before keeps it.

    Args:
        names: ``"deep_gemm"``, ``"flash_mla"``, or both; default: both.

    Returns:
        A context manager that undoes what this call did: ``with compat.install(): ...``. Without ``with`` it stays.

    Raises:
        ValueError: another name.
    """
    for name in names:
        if name not in LIBRARIES:
            raise ValueError(f"compat.install: expected {' or '.join(LIBRARIES)}, got {name!r}")
    done = []
    with _lock:
        for package in names or LIBRARIES:
            if installed(package):
                continue
            locations = _search_locations(package)
            # A package that is installed brings its own modules; the import system finds them by the locations.
            fronts = _FRONTS if locations else dict.fromkeys((*_FRONTS, *IMPORTED))
            for front in (name for name in fronts if name.partition(".")[0] == package):
                _before[front] = sys.modules.get(front)
                if (module := _before[front]) is not None:
                    _native[front] = module
                made = sys.modules[front] = _fronts.setdefault(front, _Front(front))
                made.fill(locations)
                if "." in front:
                    parent, _, last = front.rpartition(".")
                    setattr(sys.modules[parent], last, made)
            done.append(package)
    return Installed(tuple(done))


def uninstall(*names: str) -> None:
    """Take back ``install()``: the names mean again what they meant before, unless other code has replaced them.

    To code that has imported one of our modules meanwhile, that module is the library from now on.

    Args:
        names: As for ``install``; default: both.
    """
    with _lock:
        for package in names or LIBRARIES:
            for front in [name for name in _before if name.partition(".")[0] == package]:
                module = _before.pop(front)
                library = _native.pop(front, None) or module
                _fronts[front].empty()
                if not isinstance(sys.modules.get(front), _Front):
                    continue
                del sys.modules[front]
                if library is not None:
                    sys.modules[front] = library
