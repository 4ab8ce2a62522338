"""Everything this package raises on purpose."""

from __future__ import annotations

from typing import Any


class DSV4Error(Exception):
    """Base of every error below."""


class ContractError(DSV4Error, ValueError):
    """An argument breaks an op's contract; the message names op, argument, what was expected and what came."""


class UnsupportedError(ContractError):
    """A call of a native library's function that no op covers; names the function and the argument."""


class PolicyError(DSV4Error, ValueError):
    """The user's settings cannot be understood: an unknown variable, provider, op or device."""


class PluginError(DSV4Error, RuntimeError):
    """A plugin is broken and ``DSV4_BACKENDS_STRICT=1`` makes that an error; or the ``warmup`` or ``workspace`` of a
    provider did not return a number."""


class CacheError(DSV4Error, RuntimeError):
    """A compiler that runs in this process cannot use its cache on disk; names the directory and the variable."""


class NoProviderError(DSV4Error, RuntimeError):
    """No provider can serve the op here. ``resolution`` (a ``Resolution``) has every candidate with its reasons."""

    def __init__(self, message: str, resolution: Any = None) -> None:
        super().__init__(message)
        self.resolution = resolution
