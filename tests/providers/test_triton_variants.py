"""Gluon is experimental: a Triton that lacks a name costs the kernels that use it, and nothing else.

Which names those are is read from the sources. Each in turn is taken from Triton, in a process that was forked after
Triton's import, and every op is then asked what it would launch on every architecture.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from dsv4_backend_triton.variants import OPS as KERNELS
from paths import ROOT

from dsv4_backends import OPS

PACKAGE = ROOT / "backends" / "dsv4_backend_triton"
GLUON = "triton.experimental.gluon"
GONE = {
    "sparse_mla.prefill.wgmma": {"_prefill_wgmma_kernel"},
    "sparse_mla.prefill.mma_sync": {"_prefill_mma_sync_kernel"},
    "sparse_mla.decode.wgmma": {"_decode_wgmma_kernel"},
    "sparse_mla.decode.mma_sync": {"_decode_mma_sync_kernel"},
    "indexer.mqa_logits.wgmma": {"_mqa_logits_wgmma_kernel"},
    "indexer.mqa_logits.mma_sync": {"_mqa_logits_mma_sync_kernel"},
    "projection.fp8_einsum.wgmma": {"_einsum_wgmma_kernel"},
    "projection.fp8_einsum.wgmma_few": {"_einsum_wgmma_few_kernel"},
    "projection.fp8_einsum.mma_sync": {"_einsum_mma_sync_kernel"},
    "hyper_connection.hc_prenorm_gemm.wgmma": {"_hc_wgmma_kernel"},
    "hyper_connection.hc_prenorm_gemm.mma_sync": {"_hc_mma_sync_kernel"},
}
"""By the file of a variant in Gluon, its kernels."""
CAPABILITIES = ("8.0", "9.0", "10.0", "12.0")
SELECTION = {"_maxima_kernel", "_candidates_kernel", "_select_kernel"}
PLAIN = {
    "sparse_mla_prefill": {"_prefill_kernel"},
    # Staged, it attends as prefill does.
    "sparse_mla_decode": {
        "_decode_kernel",
        "_combine_kernel",
        "_stage_kernel",
        "_prefill_kernel",
        "_prefill_mma_sync_kernel",
        "_prefill_wgmma_kernel",
    },
    "gather_dequant_kv": {"_gather_kernel"},
    "indexer_q_rope_quant": {"_indexer_q_kernel"},
    "compress_norm_rope_insert": {"_compress_kernel"},
    "indexer_compress_insert": {"_compress_kernel"},
    "inverse_rope_quant": {"_inverse_rope_quant_kernel"},
    "inverse_rope": {"_inverse_rope_kernel"},
    "mqa_logits": {"_mqa_logits_kernel"},
    "paged_mqa_logits": {"_paged_mqa_logits_kernel"},
    "indexer_topk": {"_mqa_logits_kernel", "_mqa_logits_wgmma_kernel", "_mqa_logits_mma_sync_kernel", *SELECTION},
    "paged_indexer_topk": {"_paged_mqa_logits_kernel", *SELECTION},
    "fp8_einsum": {"_einsum_kernel"},
    "hc_prenorm_gemm": {"_hc_kernel", "_hc_reduce_kernel"},
}


def _sources() -> Iterator[ast.Module]:
    for path in sorted(PACKAGE.rglob("*.py")):
        if GLUON in path.read_text():
            yield ast.parse(path.read_text())


def names() -> list[tuple[str, str]]:
    """Every (owner, attribute) of Gluon that the sources use: imported, through a module, or of shared memory."""
    found: set[tuple[str, str]] = set()
    methods: set[str] = set()
    for tree in _sources():
        roots: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(GLUON):
                for alias in node.names:
                    found.add((str(node.module), alias.name))
                    roots[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                owner = ast.unparse(node.value)
                root, _, rest = owner.partition(".")
                if root in roots:
                    found.add((f"{roots[root]}.{rest}".rstrip("."), node.attr))
                else:
                    methods.add(node.attr)
    shared = _owner(f"{GLUON}.language.shared_memory_descriptor")
    tensor = _owner("triton.language.tensor")
    of_shared = {m for m in methods if callable(getattr(shared, m, None)) and not hasattr(tensor, m)}
    found |= {(f"{GLUON}.language.shared_memory_descriptor", m) for m in of_shared}
    return sorted((o, a) for o, a in found if _owner(o) is not None and hasattr(_owner(o), a))


def _owner(path: str) -> Any:
    head, *rest = path.split(".")
    value: Any = importlib.import_module(head)
    for part in rest:
        try:
            value = getattr(value, part)
        except AttributeError:
            try:
                value = importlib.import_module(f"{value.__name__}.{part}")
            except (ImportError, AttributeError):
                return None
    return value


def _look() -> dict[str, Any]:
    """What every op would launch where, and what is said of it, in this process."""
    import logging

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dsv4_backends").addHandler(handler)
    import traffic as serving
    from dsv4_backend_triton import ahead
    from dsv4_backend_triton.arch import arch_from_capability
    from packaging.version import Version

    from dsv4_backends.contract.models import FLASH

    rank = FLASH.rank(1)
    narrow = serving.Limits(max_tokens=8, max_requests=2, max_context=2000)
    calls = {op: list(serving.calls(op, rank, narrow))[:4] for op in OPS}
    calls["sparse_mla_prefill"] += [serving.prefill(heads, 512, 4096, 640) for heads in (16, 64)]
    calls["sparse_mla_decode"] += [serving.decode(64, b, 1, 128, (512, 64)) for b in (1, 8, 128)]
    calls["mqa_logits"] = list(serving.calls("mqa_logits", rank, serving.Limits(max_tokens=64, max_context=2000)))[-4:]
    calls["fp8_einsum"] += [serving.einsum(rank, tokens) for tokens in (16, 32, 200, 4000)]
    calls["hc_prenorm_gemm"] += [serving.prenorm(m, 4096, 24) for m in (8, 200, 8192)]
    launched = {}
    for op in OPS:
        for capability in CAPABILITIES:
            recorded = ahead.record(op, calls[op], arch_from_capability(Version(capability)))
            kernels = {one.kernel.__name__ for one in recorded}
            launched[f"{op} {capability}"] = sorted(kernels)
    notices = {op: [str(r) for r in ahead.notices(op) if r.code == "slower-kernels"] for op in OPS}
    from dsv4_backend_triton import variants

    missing = {f"{variants.OPS[op].folder}.{v.name}": variants.missing(op, v) for op in OPS for v in gluon(op)}
    return {"launched": launched, "said": said, "notices": notices, "missing": missing}


def gluon(op: str) -> list[Any]:
    return [variant for variant in KERNELS[op].variants if variant.gluon]


def _child(owner: str, attribute: str) -> dict[str, Any]:
    """What ``_look`` finds in a fork of this process from which a name was taken."""
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            if owner:
                gone = getattr(_owner(owner), attribute)
                delattr(_owner(owner), attribute)
                if isinstance(gone, ModuleType):
                    sys.modules[gone.__name__] = None  # type: ignore[assignment]
            answer = _look()
        except BaseException as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = json.load(pipe)
    os.waitpid(pid, 0)
    return dict(answer)


NAMES = names()


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """By name: what a process without it would launch and say; "" is the process that lacks nothing."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout))


def test_this_triton_has_all_of_them(found: dict[str, Any]) -> None:
    whole = found[""]
    assert whole["said"] == []
    assert set(whole["missing"].values()) == {""}
    launched = {kernel for kernels in whole["launched"].values() for kernel in kernels}
    assert set(whole["missing"]) == set(GONE)
    assert set().union(*GONE.values()) <= launched


@pytest.mark.parametrize("name", [f"{owner}:{attribute}" for owner, attribute in NAMES])
def test_a_missing_name_costs_what_uses_it(name: str, found: dict[str, Any]) -> None:
    whole, without = found[""], found[name]
    assert "error" not in without, without
    lost = {module for module, why in without["missing"].items() if why}
    assert lost or name in SPARE, "no kernel of Gluon is given up"
    # One line for each variant that is asked for, and no line twice; explain names every one that the op has.
    assert len(set(without["said"])) == len(without["said"]) <= 1
    assert bool(without["said"]) == bool(lost)
    for op in OPS:
        own = {f"{KERNELS[op].folder}.{variant.name}" for variant in gluon(op)} & lost
        assert len(without["notices"][op]) == len(own)
        # Staged decode attends as prefill does, and a selection has the kernels of its logits.
        touched = bool(own) or (op == "sparse_mla_decode" and any("prefill" in file for file in lost))
        touched |= op == "indexer_topk" and any("indexer.mqa_logits" in file for file in lost)
        for capability in CAPABILITIES:
            before, after = (set(f["launched"][f"{op} {capability}"]) for f in (whole, without))
            if not touched:
                assert after == before
            else:
                assert after <= before | PLAIN[op]
                assert after
            assert not after & set().union(*(GONE[file] for file in lost))


SPARE: set[str] = {f"{GLUON}.language.shared_memory_descriptor:_reinterpret"}
"""What a kernel can do without: it has another form for Tritons that lack it."""


if __name__ == "__main__":
    import torch  # noqa: F401
    import traffic as traffic_first  # noqa: F401
    import triton  # noqa: F401

    for module in [m for m in sys.modules if m.startswith("dsv4_backend_triton")]:
        del sys.modules[module]
    every = [("", ""), *NAMES]
    print(json.dumps({f"{o}:{a}" if o else "": _child(o, a) for o, a in every}))
