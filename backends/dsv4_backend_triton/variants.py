"""The kernels of every op as data, and why one of them cannot serve.

A kernel is a variant of its op: a file in the op's folder, named after the instruction that it multiplies with. It has

* ``plan(shape)``: its launch configuration for calls of a shape, or None if another kernel is better or must serve;
* ``takes(call)``, if strides or addresses can rule it out: whether it can serve the call;
* ``launch(call, config)``.

Gluon is experimental: its names change between versions of Triton. If a name is missing, the variants that use it are
left out and the next ones in the list serve. A log line and ``explain`` report it.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from dsv4_backends.provider import Support, support

from .lib.names import called, unresolved


@dataclass(frozen=True)
class Variant:
    """One kernel of an op.

    Attributes:
        name: The name of its file in the op's folder.
        needs: Compute capabilities, as in ``Implementation``.
        gluon: Whether it is in Gluon: not for Triton's interpreter, and only if this Triton has the names that it uses.
    """

    name: str
    needs: tuple[str, ...] = (">=8.0",)
    gluon: bool = True


@dataclass(frozen=True)
class Op:
    """An op's folder, and its kernels, best first. The last is plain Triton and takes every call.

    Attributes:
        folder: With dots, in this package. Its ``op.py`` has the provider's function.
        batch_invariant: Whether kernel, tile and splits never depend on the batch. If they do, the op has a second
            function: see ``batch_invariant.py``.
    """

    folder: str
    variants: tuple[Variant, ...]
    batch_invariant: bool = False


_SM_90 = ("==9.0",)
_PORTABLE = Variant("portable", gluon=False)

OPS = {
    "sparse_mla_prefill": Op(
        "sparse_mla.prefill",
        (Variant("wgmma", _SM_90), Variant("mma_sync", ("==8.*", "==12.*")), _PORTABLE),
        batch_invariant=True,
    ),
    "sparse_mla_decode": Op(
        "sparse_mla.decode",
        (
            Variant("mma_sync", ("==8.*", "==9.0", "==12.*")),
            Variant("wgmma_long", _SM_90),
            Variant("wgmma", _SM_90),
            Variant("staged", gluon=False),
            _PORTABLE,
        ),
    ),
    "gather_dequant_kv": Op("sparse_mla.gather", (_PORTABLE,), batch_invariant=True),
    "mqa_logits": Op(
        "indexer.mqa_logits",
        (Variant("wgmma", _SM_90), Variant("mma_sync", (">=8.0,<8.9",)), _PORTABLE),
    ),
    "paged_mqa_logits": Op("indexer.paged_mqa_logits", (Variant("wgmma", _SM_90), _PORTABLE), batch_invariant=True),
    "indexer_topk": Op("indexer.topk", (_PORTABLE,)),
    "paged_indexer_topk": Op("indexer.topk", (_PORTABLE,)),
    "indexer_q_rope_quant": Op("indexer.indexer_q_rope_quant", (_PORTABLE,), batch_invariant=True),
    "compress_norm_rope_insert": Op("compressor", (_PORTABLE,), batch_invariant=True),
    "indexer_compress_insert": Op("compressor", (_PORTABLE,), batch_invariant=True),
    "fp8_einsum": Op(
        "projection.fp8_einsum",
        (Variant("wgmma_few", _SM_90), Variant("wgmma", _SM_90), Variant("mma_sync", (">=8.0,<8.9",)), _PORTABLE),
    ),
    "inverse_rope_quant": Op("projection.inverse_rope_quant", (_PORTABLE,), batch_invariant=True),
    "inverse_rope": Op("projection.inverse_rope", (_PORTABLE,), batch_invariant=True),
    "hc_prenorm_gemm": Op(
        "hyper_connection.hc_prenorm_gemm",
        (Variant("wgmma_tf32", _SM_90), Variant("wgmma", _SM_90), Variant("mma_sync", ("==8.*", "==12.*")), _PORTABLE),
    ),
}

_log = logging.getLogger("dsv4_backends")
_logged: set[str] = set()


def run(op: str, call: Any) -> None:
    """Launch the first kernel of an op that takes a call. Plans depend on ``call.shape`` only, which is hashable."""
    for takes, launch, config in _choices(op, call.shape):
        if takes is None or takes(call):
            launch(call, config)
            return


def choices(op: str, shape: Any) -> Iterator[tuple[str, Any]]:
    """The variants for calls of a shape, best first, each with its configuration."""
    for variant in OPS[op].variants:
        if (module := usable(op, variant, shape.arch)) and (config := module.plan(shape)) is not None:
            yield variant.name, config


@lru_cache(maxsize=4096)
def _choices(op: str, shape: Any) -> tuple[tuple[Any, Any, Any], ...]:
    made = [(load(op, name), config) for name, config in choices(op, shape)]
    return tuple((getattr(module, "takes", None), module.launch, config) for module, config in made)


def kernels(op: str) -> str:
    """The variants of an op as text, best first."""
    return ", ".join(f"{v.name} ({' or '.join(v.needs)})" for v in OPS[op].variants)


def load(op: str, name: str) -> Any:
    """The module of a variant."""
    return importlib.import_module(f"{__package__}.{OPS[op].folder}.{name}")


@cache
def usable(op: str, variant: Variant, arch: Any) -> Any:
    """The module of a variant, or None if the machine or this Triton rules it out."""
    if support(variant.needs, arch.capability) is not Support.SUPPORTED or (variant.gluon and arch.interpret):
        return None
    if why := missing(op, variant):
        if why not in _logged:
            _logged.add(why)
            _log.warning(slower(op, variant))
        return None
    return load(op, variant.name)


def slower(op: str, variant: Variant) -> str:
    """What follows if this Triton rules out a variant, as text; empty if it does not."""
    import triton

    why = missing(op, variant)
    file = f"{OPS[op].folder}.{variant.name}"
    return why and f"triton {triton.__version__}: {why}; slower plain kernels serve in place of {file}"


@cache
def missing(op: str, variant: Variant) -> str:
    """What this Triton lacks that a variant needs, as text; empty if nothing."""
    if not variant.gluon:
        return ""
    try:
        module = load(op, variant.name)
        return next(unresolved(module), "")
    except Exception as error:  # a changed experimental interface may raise anything
        said = " ".join(str(error).split())
        if found := re.match(r"cannot import name '(\w+)' from '([\w.]+)'", said):
            return f"{found[2]} has no {found[1]}"
        if isinstance(error, ModuleNotFoundError) and error.name:
            return "{} has no {}".format(*error.name.rpartition(".")[::2])
        if isinstance(error, AttributeError) and error.obj is not None:
            return f"{called(error.obj)} has no {error.name}"
        return f"{type(error).__name__}: {said}"
