"""SGLang, through the entry point ``sglang.srt.plugins``, which SGLang calls in the processes that it starts.

``register()`` is what SGLang calls; it does nothing unless ``DSV4_BACKENDS_ENGINE`` asks. SGLang's own registry of
hooks is not used: it imports the module of every hook at once, in processes that only start others. Its modules are
changed when SGLang itself has imported them.
"""

from __future__ import annotations

from packaging.specifiers import SpecifierSet

from ..base import HookedEngine, Plan
from . import defaults, interface, rules
from .targets import ENVIRON, INTERFACE, TARGETS

SUPPORTED = SpecifierSet("==0.5.23")
"""The release that this was tested with. SGLang's patch releases change its V4 code."""

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
