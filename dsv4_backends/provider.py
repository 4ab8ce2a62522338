"""Everything that the author of a provider may use, besides the contract."""

from __future__ import annotations

from .compat import native
from .errors import NoProviderError
from .runtime.launching import cache_error, cache_problem, elsewhere, launch, launch_by_arguments, on_its_device
from .runtime.steps import once_a_step
from .selection.capability import Support, support
from .selection.hookspecs import hookimpl
from .selection.libraries import Library, Parameter, accepts, find_library, parameters, words
from .selection.machine import device_of, simulate
from .selection.provider import API_VERSION, REASONS, Build, Implementation, ProviderSpec, Reason, Tier

__all__ = [
    "API_VERSION",
    "REASONS",
    "Build",
    "Implementation",
    "Library",
    "NoProviderError",
    "Parameter",
    "ProviderSpec",
    "Reason",
    "Support",
    "Tier",
    "accepts",
    "cache_error",
    "cache_problem",
    "device_of",
    "elsewhere",
    "find_library",
    "hookimpl",
    "launch",
    "launch_by_arguments",
    "native",
    "on_its_device",
    "once_a_step",
    "parameters",
    "simulate",
    "support",
    "words",
]
