"""What vLLM itself serves, and what it lacks: its rules for targets, and its list of plugins."""

from __future__ import annotations

import functools
from typing import Any

from ...selection import policy
from ...selection.machine import Device
from ...selection.provider import Reason
from ...selection.resolve import Served
from .. import OPTIONS, patching
from ..base import Verdict, keeps_library, unlisted
from ..patching import NOT_NEEDED, REFUSED, Target
from .targets import DEEP_GEMM, FLASH_MLA, SM120


def judge(target: Target, where: Device, served: Served | None) -> Verdict | None:
    """Keep what vLLM does not call on this kind of GPU, and what it calls with operands that no op covers."""
    major = where.capability.major if where.capability is not None else 0
    if target.module == FLASH_MLA and major == 12 and SM120 not in policy.engine_options(OPTIONS):
        message = "on compute capability 12.x vLLM's attention layer calls FlashInfer instead"
        return Verdict(NOT_NEEDED, Reason("engine-served", message))
    if target.op in ("mqa_logits", "paged_mqa_logits") and major == 10 and mx_scaled():
        message = "on compute capability 10.x this vLLM scales the indexer's queries and keys in blocks (MXFP8)"
        return Verdict(REFUSED, Reason("engine-arch", message, "vLLM's own DeepGEMM stays in place there"))
    return keeps_library("vLLM", target, where, served)


@functools.lru_cache(maxsize=1)
def mx_scaled() -> bool:
    """Whether this vLLM can scale the indexer's operands in blocks."""
    path = patching.source_of(DEEP_GEMM)
    return path is not None and "mqa_logits_use_mx_scales" in patching.structure(path)


def left_out() -> str:
    """Why vLLM does not load this plugin: ``VLLM_PLUGINS`` lists other ones."""
    return unlisted("vLLM", "VLLM_PLUGINS", lambda text: text.split(","))


def look(target: Target, original: Any) -> Verdict | None:
    """Keep ``get_mla_metadata`` if vLLM was built with FlashMLA."""
    if target.attribute == "get_mla_metadata" and getattr(original, "__name__", "") != "_raise_flashmla_unavailable":
        return Verdict(NOT_NEEDED, Reason("engine-served", "vLLM has a FlashMLA of its own"))
    return None


def has_deep_gemm() -> bool:
    """Replaces vLLM's own, which would import the library to find out."""
    return True
