"""Changes the defaults of SGLang's settings. A value in the environment still takes precedence."""

from __future__ import annotations

import copy
import functools
from types import ModuleType

from ..base import HookedEngine
from ..patching import REPLACED, Row, standing


def arm(engine: HookedEngine, module: ModuleType) -> None:
    """Make off the default of the planned settings."""
    engine.attempt(module, functools.partial(_turn_off, engine))


def _turn_off(engine: HookedEngine, row: Row, module: ModuleType) -> None:
    field = copy.copy(standing(module, row.target.attribute))
    field.default = False
    engine.patches.replace(module, row.target.attribute, field)
    row.state = REPLACED
