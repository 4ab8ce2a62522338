"""SGLang, through the entry point ``sglang.srt.plugins``, which SGLang calls in the processes that it starts.

SGLang calls ``register()``, which does nothing unless ``DSV4_BACKENDS_ENGINE`` turns the engine on. SGLang's modules
are changed after SGLang itself has imported them. SGLang's own registry of hooks is not used, since it imports the
modules of all hooks at once, even in processes that only start others.
"""

from __future__ import annotations

from packaging.specifiers import SpecifierSet

from ..base import HookedEngine, Plan
from . import defaults, interface, rules
from .targets import ENVIRON, INTERFACE, TARGETS

SUPPORTED = SpecifierSet("==0.5.23")
"""The release that this was tested with. SGLang's patch releases change its V4 code too."""

ENGINE = HookedEngine(
    name="sglang",
    targets=TARGETS,
    supported=SUPPORTED,
    capability=(">=8.0",),
    judge=rules.judge,
    left_out=rules.left_out,
    notes=rules.notes,
    replacers={ENVIRON: defaults.arm, INTERFACE: interface.arm},
)
version, plan, apply, undo, register = ENGINE.version, ENGINE.plan, ENGINE.apply, ENGINE.undo, ENGINE.register

__all__ = ["ENGINE", "SUPPORTED", "TARGETS", "Plan", "apply", "plan", "register", "undo", "version"]
