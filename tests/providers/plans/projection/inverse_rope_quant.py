"""``inverse_rope_quant``: as ``inverse_rope``."""

from __future__ import annotations

from plans.projection.inverse_rope import covered

__all__ = ["covered"]
