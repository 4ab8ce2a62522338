"""Callbacks after the import of a module: one finder for all of them, removed when no callback waits.

An engine's modules are changed after the engine has imported them. Importing them earlier would initialise CUDA in
processes that fork. Nothing here can break an import: an error in a callback is logged, and a loader that cannot be
wrapped is left as it is.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import logging
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from ..locks import imports as _lock

Callback = Callable[[ModuleType], None]

_log = logging.getLogger("dsv4_backends")
_waiting: dict[str, list[Callback]] = {}


def when_imported(name: str, callback: Callback) -> None:
    """Call ``callback(module)`` after the import of ``name``, at once if it has been imported.

    Args:
        name: Full module name. It is not imported here, nor are its parents.
        callback: Gets the imported module. An error in it is logged.
    """
    with _lock:
        module = sys.modules.get(name)
        if module is None or getattr(getattr(module, "__spec__", None), "_initializing", False):
            _waiting.setdefault(name, []).append(callback)
            if _FINDER not in sys.meta_path:
                sys.meta_path.insert(0, _FINDER)
            return
    _call(callback, module)


def forget(callback: Callback) -> None:
    """Cancel every ``when_imported`` of a callback that has not been called."""
    with _lock:
        for name in list(_waiting):
            _waiting[name] = [waiting for waiting in _waiting[name] if waiting != callback]
            if not _waiting[name]:
                del _waiting[name]
        _leave()


def waiting() -> tuple[str, ...]:
    """The modules whose import callbacks wait for."""
    return tuple(_waiting)


def _leave() -> None:
    if not _waiting and _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)


def _call(callback: Callback, module: ModuleType) -> None:
    try:
        callback(module)
    except Exception:
        _log.exception("a hook on the import of %s failed; the module is as it was imported", module.__name__)


def _loaded(module: ModuleType) -> None:
    with _lock:
        callbacks = _waiting.pop(module.__name__, [])
        _leave()
    for callback in callbacks:
        _call(callback, module)


class _Finder(importlib.abc.MetaPathFinder):
    """Has the other finders find a module that a callback waits for, and wraps its loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _waiting:
            return None
        for finder in list(sys.meta_path):
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    _mark(spec.loader, fullname)
                return spec
        return None


_FINDER = _Finder()


def _mark(loader: importlib.abc.Loader, name: str) -> None:
    """Have the loader call ``_loaded`` after it has run the module. The loader stays the same object."""
    original = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        if module.__name__ != name:  # a loader that several modules share
            original(module)
            return
        loader.__dict__.pop("exec_module", None)
        original(module)
        _loaded(module)

    try:
        loader.__dict__["exec_module"] = exec_module
    except (AttributeError, TypeError) as error:
        _log.error("cannot follow the import of %s: its loader %r takes no attribute (%s)", name, loader, error)
