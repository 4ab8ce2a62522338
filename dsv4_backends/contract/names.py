"""The ops, by name, in the order in which people see them."""

from __future__ import annotations

from . import OPS

__all__ = ["OPS"]
