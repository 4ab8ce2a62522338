"""DeepSeek V4's hot ops on every GPU: one contract per op, and a choice of provider that explains itself.

Importing this package imports neither torch nor a provider: names load when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "CONTRACTS": "contract",
    "OPS": "contract",
    "Build": "selection.provider",
    "ContractError": "errors",
    "DSV4Error": "errors",
    "Implementation": "selection.provider",
    "NoProviderError": "errors",
    "PluginError": "errors",
    "PolicyError": "errors",
    "ProviderSpec": "selection.provider",
    "Reason": "selection.provider",
    "Tier": "selection.provider",
    "Limits": "contract.traffic",
    "UnsupportedError": "errors",
    "check": "runtime.check",
    "hookimpl": "selection.hookspecs",
    "reset": "runtime.bind",
    "resolution": "runtime.bind",
    "stats": "runtime.bind",
    "step": "runtime.steps",
    "use_providers": "selection.policy",
    "verify": "testing.verify",
    "warmup": "runtime.ahead",
    "workspace_bytes": "runtime.ahead",
}

if TYPE_CHECKING:
    from . import ops
    from .contract import CONTRACTS, OPS
    from .contract.traffic import Limits
    from .errors import ContractError, DSV4Error, NoProviderError, PluginError, PolicyError, UnsupportedError
    from .runtime.ahead import warmup, workspace_bytes
    from .runtime.bind import reset, resolution, stats
    from .runtime.check import check
    from .runtime.steps import step
    from .selection.hookspecs import hookimpl
    from .selection.policy import use_providers
    from .selection.provider import Build, Implementation, ProviderSpec, Reason, Tier
    from .testing.verify import verify

__all__ = [
    "CONTRACTS",
    "OPS",
    "Build",
    "ContractError",
    "DSV4Error",
    "Implementation",
    "Limits",
    "NoProviderError",
    "PluginError",
    "PolicyError",
    "ProviderSpec",
    "Reason",
    "Tier",
    "UnsupportedError",
    "check",
    "hookimpl",
    "ops",
    "reset",
    "resolution",
    "stats",
    "step",
    "use_providers",
    "verify",
    "warmup",
    "workspace_bytes",
]


def __getattr__(name: str) -> Any:
    import importlib

    if name == "ops":
        return importlib.import_module(f"{__name__}.ops")
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
