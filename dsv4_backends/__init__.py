"""DeepSeek V4's hot ops on every GPU: one contract per op, and a choice of provider that explains itself.

Importing this package imports neither torch nor a provider: names load when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "CONTRACTS": "contract",
    "OPS": "contract.names",
    "Build": "provider",
    "ContractError": "errors",
    "DSV4Error": "errors",
    "Implementation": "provider",
    "NoProviderError": "errors",
    "PluginError": "errors",
    "PolicyError": "errors",
    "ProviderSpec": "provider",
    "Reason": "provider",
    "Tier": "provider",
    "Limits": "serving",
    "UnsupportedError": "errors",
    "hookimpl": "hookspecs",
    "reset": "ops",
    "resolution": "ops",
    "stats": "ops",
    "step": "steps",
    "use_providers": "policy",
    "warmup": "ops",
    "workspace_bytes": "ops",
}

if TYPE_CHECKING:
    from . import ops
    from .contract import CONTRACTS, OPS
    from .errors import ContractError, DSV4Error, NoProviderError, PluginError, PolicyError, UnsupportedError
    from .hookspecs import hookimpl
    from .ops import reset, resolution, stats, warmup, workspace_bytes
    from .policy import use_providers
    from .provider import Build, Implementation, ProviderSpec, Reason, Tier
    from .serving import Limits
    from .steps import step

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
    "hookimpl",
    "ops",
    "reset",
    "resolution",
    "stats",
    "step",
    "use_providers",
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
