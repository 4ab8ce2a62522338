"""Which FlashMLA is installed, its architectures, and whether it loads. The import is the last step."""

from __future__ import annotations

import functools
import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4_backends.provider import Build, Library, Reason, accepts, find_library, native, words

DISTRIBUTIONS = {"flash-mla": ">=1.0", "tokenspeed-flashmla": ">=1.0", "sgl-flash-mla": ">=1.0"}
VENDORED = {"vllm": "vllm.third_party.flashmla"}
_INTERFACE = {"vllm.third_party.flashmla": "vllm.third_party.flashmla.flash_mla_interface"}
HINT = "pip install tokenspeed-flashmla or sgl-flash-mla"
KNOWN = ("==9.0", "==10.0")
"""The architectures of today's builds."""

_PREFILL = ("q", "kv", "indices", "sm_scale", "d_v", "attn_sink", "topk_length")
_DECODE = (
    "q",
    "k_cache",
    "block_table",
    "cache_seqlens",
    "head_dim_v",
    "tile_scheduler_metadata",
    "num_splits",
    "softmax_scale",
    "causal",
    "is_fp8_kvcache",
    "indices",
    "attn_sink",
    "extra_k_cache",
    "extra_indices_in_kvcache",
    "topk_length",
    "extra_topk_length",
)
FUNCTIONS: Mapping[str, Mapping[str, tuple[tuple[str, ...], ...]]] = {
    "sparse_mla_prefill": {"flash_mla_sparse_fwd": (_PREFILL,)},
    "sparse_mla_decode": {"flash_mla_with_kvcache": (_DECODE,), "get_mla_metadata": ((), ("args", "kwargs"))},
}
"""By op: the functions that its adapter calls, with their leading parameters."""

# The error text in the compiled code for another architecture: of releases that have Hopper kernels and the 584-byte
# cache, and of releases since 2026.09.30, which have neither.
_BUILT_FOR = re.compile(rb"Sparse Attention Forward Kernel is only supported on ([\w ,]+?) architectures")
_WITHOUT = re.compile(rb"\(sparse_(?:decode|prefill)_fwd\) is only supported on")
_APPMANA = "flash_sparse_mla_decode"
"""A function of AppMana's wheel, which has FlashMLA's names, serves SM8x and SM12x, and takes other arguments."""


def find() -> Library:
    """The installed FlashMLA, by metadata and files."""
    return find_library("flash_mla", DISTRIBUTIONS, VENDORED, HINT)


def _compiled(library: Library) -> list[Path]:
    assert library.folder is not None
    if library.module in _INTERFACE:  # vLLM keeps its extensions in its own folder
        return sorted(library.folder.parents[1].glob("_flashmla_C*.so"))
    return sorted(library.folder.glob("*.so"))


def built_for(files: list[Path]) -> tuple[tuple[str, ...], str]:
    """The compute capabilities that compiled files name, or a reason if they name none."""
    said, without = set(), False
    for path in files:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for match in _BUILT_FOR.finditer(content):
                said |= set(re.findall(r"SM(\d+)(\d)[af]?", match[1].decode()))
            without |= _WITHOUT.search(content) is not None
    if said:
        return tuple(sorted((f"=={major}.{minor}" for major, minor in said), key=lambda s: float(s[2:]))), ""
    if without:
        return (), "has neither kernels for Hopper nor the 584-byte cache of DeepSeek V4 (releases since 2026.09.30)"
    return (), f"does not say in {', '.join(path.name for path in files) or 'any compiled file'} what it was built for"


def _another_library(library: Library) -> tuple[Reason, ...]:
    """The reason if the module is not FlashMLA; found in its source text, since the version numbers overlap."""
    if library.folder is None or any(reason.code == "library-owners" for reason in library.reasons):
        return ()
    files = (library.folder / "__init__.py", library.folder / "flash_mla_interface.py")
    text = "".join(path.read_text(encoding="utf-8", errors="replace") for path in files if path.is_file())
    if _APPMANA not in text or "flash_mla_sparse_fwd" in text:
        return ()
    message = (
        f"{library.build} is AppMana's library for SM8x and SM12x, which shares only the name with FlashMLA: "
        f"it has {_APPMANA} and no flash_mla_sparse_fwd, and this adapter does not know its arguments"
    )
    hint = "keep it for what uses it: any build of FlashMLA would overwrite its files"
    return (Reason("library-signature", message, hint),)


def probe(load: bool) -> Mapping[str, Build]:
    """See ``dsv4_backends.selection.builds``."""
    library = find()
    claim: tuple[str, ...] = KNOWN
    reasons = _another_library(library) or library.reasons
    if library.folder is not None and not reasons:
        claim, wrong = built_for(_compiled(library))
        if wrong:
            hint = "install a build that has them: tokenspeed-flashmla, or sgl-flash-mla with its legacy kernels"
            reasons = (Reason("library-kernels", f"{library.build} {wrong}", hint),)
    by_op = dict.fromkeys(FUNCTIONS, reasons)
    if load and not reasons:
        by_op = _loaded_reasons(library)
    return {
        op: Build(name=library.build, owners=library.owners, capability=claim or None, reasons=by_op[op])
        for op in FUNCTIONS
    }


def _loaded_reasons(library: Library) -> dict[str, tuple[Reason, ...]]:
    try:
        module = native(_INTERFACE.get(library.module, library.module))
    except (Exception, SystemExit) as error:
        message = f"{library.build} does not load: {words(error)}"
        reason = Reason("library-load", message, "install a build made for this torch, CUDA and Python")
        return dict.fromkeys(FUNCTIONS, (reason,))
    by_op = {}
    for op, functions in FUNCTIONS.items():
        found = []
        for name, forms in functions.items():
            function = getattr(module, name, None)
            if function is None:
                found.append(Reason("library-symbol", f"{library.build} has no {name}"))
            elif have := accepts(function, *forms):
                message = f"{library.build}: {name} has {have}, expected ({', '.join(forms[-1])}) first"
                found.append(Reason("library-signature", message, "this adapter may be too old for the build"))
        if (missing := _legacy_missing(module)) and not found:
            found.append(Reason("library-kernels", f"{library.build} {missing}", "install a wheel that has them"))
        by_op[op] = tuple(found)
    return by_op


def _legacy_missing(module: Any) -> str:
    # SGLang's wheel may have been built without the half that serves Hopper and the 584-byte cache.
    has_legacy = getattr(module, "has_legacy", None)
    return "" if has_legacy is None or has_legacy() else "was built without its legacy kernels, or they do not load"


@dataclass(frozen=True)
class FlashMLA:
    """The imported library's functions, and the arguments of this build that upstream does not have."""

    prefill: Any
    decode: Any
    metadata: Any
    prefill_options: Mapping[str, Any]
    decode_options: Mapping[str, Any]
    prefill_out: bool
    decode_out: bool


@functools.cache
def flash_mla() -> FlashMLA:
    """The installed FlashMLA, imported."""
    from dsv4_backends.provider import parameters

    library = find()
    module = native(_INTERFACE.get(library.module, library.module or "flash_mla"))
    functions = (module.flash_mla_sparse_fwd, module.flash_mla_with_kvcache)
    names = [{p.name for p in parameters(function) or ()} for function in functions]
    # SGLang's wheel keeps the Hopper kernels and the 584-byte cache under this switch.
    options = [{"use_legacy": True} if "use_legacy" in have else {} for have in names]
    return FlashMLA(
        prefill=functions[0],
        decode=functions[1],
        metadata=module.get_mla_metadata,
        prefill_options=options[0],
        decode_options=options[1],
        prefill_out="out" in names[0],
        decode_out="out" in names[1],
    )
