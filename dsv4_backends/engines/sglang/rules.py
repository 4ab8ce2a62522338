"""What SGLang itself serves: its rules for targets, and its list of plugins."""

from __future__ import annotations

import os
from collections.abc import Sequence

from packaging.version import Version

from ...selection.machine import Device
from ...selection.provider import Reason
from ...selection.resolve import Served
from ..base import Verdict, keeps_library, unlisted
from ..patching import NOT_NEEDED, Target

_BOOLEANS = ("true", "1", "yes", "y", "false", "0", "no", "n")
"""The values that SGLang accepts for a setting. For any other it warns and takes the default."""


def judge(target: Target, where: Device, served: Served | None) -> Verdict | None:
    """Keep what SGLang does not call on this kind of GPU, and what the user has set."""
    if where.capability is not None and where.capability.major == 12:
        message = "on compute capability 12.x SGLang calls kernels of its own instead"
        return Verdict(NOT_NEEDED, Reason("engine-served", message))
    _, _, setting = target.attribute.partition("Envs.")
    if os.environ.get(setting, "").lower() in _BOOLEANS:
        message = f"{setting}={os.environ[setting]} is set in the environment, and takes precedence over a default"
        return Verdict(NOT_NEEDED, Reason("engine-served", message))
    return keeps_library("SGLang", target, where, served)


def notes(devices: Sequence[Device]) -> Sequence[str]:
    """What the user has to add to the command."""
    if any(where.capability is not None and where.capability < Version("9.0") for where in devices):
        return ["below compute capability 9.0 add --moe-runner-backend marlin for experts in MXFP4"]
    return []


def left_out() -> str:
    """Why SGLang does not load this plugin: ``SGLANG_PLUGINS`` lists other ones. An empty list allows all."""
    return unlisted(
        "SGLang", "SGLANG_PLUGINS", lambda text: [name.strip() for name in text.split(",")] if text else None
    )
