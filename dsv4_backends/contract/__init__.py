"""The meaning of each op. Providers depend on this package; it depends on no provider.

Each family of ops has a folder with ``meaning.py``, ``cases.py`` and ``traffic.py``. Every table over op names is
derived from this package.
"""

from __future__ import annotations

import copyreg
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

from .spec import LEVELS, Case, Cost, OpContract, Tolerance

FAMILIES = (
    "sparse_mla",
    "indexer",
    "compressor",
    "projection",
    "hyper_connection",
)
"""The folders, in the order in which ops are listed."""

CONTRACTS: Mapping[str, OpContract] = MappingProxyType(
    {contract.name: contract for family in FAMILIES for contract in import_module(f".{family}", __name__).CONTRACTS}
)
"""Every op by name, in the order of ``FAMILIES``."""

OPS = tuple(CONTRACTS)


def _by_name(name: str) -> OpContract:
    return CONTRACTS[name]


def _reduced(contract: OpContract) -> Any:
    """Pickle by name: every process has the same contracts."""
    if CONTRACTS.get(contract.name) is contract:
        return _by_name, (contract.name,)
    return contract.__reduce_ex__(2)


copyreg.pickle(OpContract, _reduced)

__all__ = ["CONTRACTS", "FAMILIES", "LEVELS", "OPS", "Case", "Cost", "OpContract", "Tolerance"]
