"""Which DeepGEMM is installed, its kernels and architectures, and whether it loads. The import is the last step."""

from __future__ import annotations

import functools
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4_backends.provider import Build, Library, Reason, accepts, find_library, native, words

DISTRIBUTIONS = {"deep-gemm": ">=2.5", "tokenspeed-deepgemm": ">=2.5", "sgl-deep-gemm": ">=0.1"}
VENDORED = {"vllm": "vllm.third_party.deep_gemm"}
HINT = "pip install tokenspeed-deepgemm or sgl-deep-gemm"

# DeepGEMM compiles at run time from the headers that it ships, so the headers show its architectures.
_HEADERS = {
    "mqa_logits": re.compile(r"sm(\d+)_(?:fp8_)?mqa_logits\.cuh"),
    # On SM100 one header has both forms in later releases.
    "paged_mqa_logits": re.compile(r"sm(\d+)_(?:fp8_paged_)?mqa_logits\.cuh"),
    "fp8_einsum": re.compile(r"sm(\d+)_(?:fp8_gemm_1d2d|fp8_fp4_gemm_1d1d)\.cuh"),
    "hc_prenorm_gemm": re.compile(r"sm(\d+)_tf32_hc_prenorm_gemm\.cuh"),
}
KNOWN = ("==9.0", "==10.0")
"""The architectures of today's builds, shown if no build is installed; 2.8 adds 12.0."""

_BOUNDS = (("cu_seq_len_k_start", "cu_seq_len_k_end"), ("ks", "ke"))
_PAGED = ("q", "kv_cache", "weights", "context_lens", "block_table", "schedule_meta", "max_context_len")
_SCHEDULE = {"get_paged_mqa_logits_metadata": (("context_lens", "block_kv", "num_sms"),)}

Functions = Mapping[str, tuple[tuple[str, ...], ...]]
# 2.5 and 2.6: the full form or the compressed one, with `clean_logits`.
_FULL: Mapping[str, Functions] = {
    "mqa_logits": {
        "fp8_mqa_logits": tuple(("q", "kv", "weights", *names, "clean_logits", "max_seqlen_k") for names in _BOUNDS)
    },
    "paged_mqa_logits": {"fp8_paged_mqa_logits": ((*_PAGED, "clean_logits"),), **_SCHEDULE},
}
# 2.8: the compressed form only.
_COMPRESSED: Mapping[str, Functions] = {
    "mqa_logits": {"fp8_fp4_mqa_logits": (("q", "kv", "weights", *_BOUNDS[0], "max_seqlen_k"),)},
    "paged_mqa_logits": {"fp8_fp4_paged_mqa_logits": (_PAGED,), **_SCHEDULE},
}
_BOTH: Mapping[str, Functions] = {
    "fp8_einsum": {"fp8_einsum": (("expr", "a", "b", "d", "c", "recipe"),)},
    "hc_prenorm_gemm": {"tf32_hc_prenorm_gemm": (("a", "b", "d", "sqr_sum", "num_splits"),)},
}
OPS = (*_FULL, *_BOTH)
_MX_ONLY = ("mqa_logits", "paged_mqa_logits")


def find() -> Library:
    """The installed DeepGEMM, by metadata and files."""
    return find_library("deep_gemm", DISTRIBUTIONS, VENDORED, HINT)


def _headers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("include/deep_gemm/impls/*.cuh"))


def built_for(op: str, headers: list[str]) -> tuple[str, ...]:
    """The compute capabilities with kernels for an op."""
    numbers = {int(match[1]) for name in headers if (match := _HEADERS[op].fullmatch(name))}
    # In releases without `clean_logits` the merged header of SM100 takes MX scales and returns bf16 logits.
    if op in _MX_ONLY and "smxx_clean_logits.cuh" not in headers:
        numbers.discard(100)
    return tuple(f"=={number // 10}.{number % 10}" for number in sorted(numbers))


def _compiler_missing() -> Reason | None:
    """The reason if there is no nvcc in the places where DeepGEMM looks for it, in its order."""
    if os.environ.get("DG_JIT_USE_NVRTC", "0") not in ("", "0"):
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [os.environ.get("DG_JIT_NVCC_COMPILER") or "", f"{home}/bin/nvcc" if home else ""]
    if not home:
        places += [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    if any(place and Path(place).is_file() for place in places):
        return None
    looked = (
        f"CUDA_HOME is {home}" if home else "CUDA_HOME is not set, and it is neither on PATH nor in /usr/local/cuda"
    )
    message = f"DeepGEMM compiles its kernels with nvcc when they are first used, and there is none: {looked}"
    return Reason("compiler-missing", message, "install the CUDA toolkit and set CUDA_HOME")


def probe(load: bool) -> Mapping[str, Build]:
    """See ``dsv4_backends.selection.builds``."""
    library = find()
    reasons = library.reasons
    if library.folder is None or reasons:
        return {op: Build(name=library.build, owners=library.owners, capability=KNOWN, reasons=reasons) for op in OPS}
    headers = _headers(library.folder)
    missing = _compiler_missing()
    found = {}
    for op in OPS:
        claim = built_for(op, headers)
        wrong = None if claim else _no_kernels(library, op, headers)
        against = tuple(reason for reason in (wrong, missing) if reason is not None)
        found[op] = Build(name=library.build, owners=library.owners, capability=claim or None, reasons=against)
    if not load or all(build.reasons for build in found.values()):
        return found
    loaded = _loaded_reasons(library)
    return {
        op: Build(
            name=build.name, owners=build.owners, capability=build.capability, reasons=build.reasons or loaded[op]
        )
        for op, build in found.items()
    }


def _no_kernels(library: Library, op: str, headers: list[str]) -> Reason:
    message = f"{library.build} has no kernel for {op} among its {len(headers)} headers"
    return Reason("library-kernels", message, "install DeepGEMM 2.5 or newer")


def _loaded_reasons(library: Library) -> dict[str, tuple[Reason, ...]]:
    try:
        module = native(library.module)
    # Loaders raise OSError; DeepGEMM asserts that it finds CUDA.
    except (Exception, SystemExit) as error:
        message = f"{library.build} does not load: {words(error)}"
        reason = Reason("library-load", message, "install a build made for this torch, CUDA and Python")
        return dict.fromkeys(OPS, (reason,))
    return {op: tuple(_objections(library, module, functions)) for op, functions in functions_of(module).items()}


def functions_of(module: Any) -> dict[str, Functions]:
    """By op: the functions that the adapters call in this release line, with their leading parameters."""
    logits = _FULL if hasattr(module, "fp8_mqa_logits") else _COMPRESSED
    return {**logits, **_BOTH}


def _objections(library: Library, module: Any, functions: Functions) -> list[Reason]:
    found = []
    for name, forms in functions.items():
        function = getattr(module, name, None)
        if function is None:
            found.append(Reason("library-symbol", f"{library.build} has no {name}"))
        elif have := accepts(function, *forms):
            message = f"{library.build}: {name} has {have}, expected ({', '.join(forms[0])}) first"
            found.append(Reason("library-signature", message, "this adapter may be too old for the build"))
    return found


@dataclass(frozen=True)
class DeepGEMM:
    """The imported library's functions.

    Attributes:
        cleans: Whether the library has the full form and sets its undefined logits to -inf (2.5, 2.6). Otherwise it has
            the compressed form only.
    """

    cleans: bool
    mqa_logits: Callable[..., Any]
    paged_mqa_logits: Callable[..., Any]
    schedule: Callable[..., Any]
    num_sms: Callable[[], int]
    einsum: Callable[..., Any]
    prenorm_gemm: Callable[..., Any]


@functools.cache
def deep_gemm() -> DeepGEMM:
    """The installed DeepGEMM, imported."""
    module = native(find().module or "deep_gemm")
    cleans = hasattr(module, "fp8_mqa_logits")

    def get(name: str) -> Any:
        return getattr(module, name, None)

    return DeepGEMM(
        cleans=cleans,
        mqa_logits=get("fp8_mqa_logits" if cleans else "fp8_fp4_mqa_logits"),
        paged_mqa_logits=get("fp8_paged_mqa_logits" if cleans else "fp8_fp4_paged_mqa_logits"),
        schedule=get("get_paged_mqa_logits_metadata"),
        num_sms=get("get_num_sms"),
        einsum=get("fp8_einsum"),
        prenorm_gemm=get("tf32_hc_prenorm_gemm"),
    )
