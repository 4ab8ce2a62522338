"""A kernel for another architecture is one new file and one line: shown with a copy of the provider that has one.

``docs/architecture.md``, "How to add a variant", describes what is done here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import Any

import pytest
from paths import ROOT

FILE = '''
"""hc_prenorm_gemm on SM100: the portable kernel under another name."""

import triton

from . import portable
from .reduce import launch_splits

_toy_tcgen05_kernel = triton.jit(portable._hc_kernel.fn, do_not_specialize=portable._SIZES)
_toy_tcgen05_kernel.__name__ = "_toy_tcgen05_kernel"


def plan(shape):
    return portable.plan(shape)._replace(tma=False) if shape.m > 64 else None


def launch(call, config):
    _, m, n, k, aligned, _ = call.shape
    constants = dict(BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, SWAP=config.swap)
    constants |= dict(MODE=config.mode, EVEN=k % config.block_k == 0, ALIGNED=aligned, TMA=False, STAGES=config.stages)
    strides = (call.x.stride(0), call.fn.stride(0))
    launch_splits(
        _toy_tcgen05_kernel, call, config, (call.x, call.fn), strides, 1, **constants, num_warps=config.warps
    )
'''
LINE = 'Variant("tcgen05", ("==10.*",), gluon=False), '
HERE = 'Op("hyper_connection.hc_prenorm_gemm", ('
LOOK = """
import json, sys
sys.path[:0] = ["tools", "tests/support"]
import compile_matrix
import traffic
import torch
from dsv4_backend_triton import ahead
from dsv4_backend_triton.arch import arch_from_capability
from dsv4_backends.commands import cli
from packaging.version import Version

found = {}
for capability in ("9.0", "10.0", "10.3", "12.0"):
    arch = arch_from_capability(Version(capability))
    for m in (8, 200):
        recorded = ahead.record("hc_prenorm_gemm", [traffic.prenorm(m, 4096, 24)], arch)
        found[f"{capability} {m}"] = next(iter(recorded)).kernel.__name__
compile_matrix.RANKS = compile_matrix.RANKS[:1]
compile_matrix.OPS = ["hc_prenorm_gemm"]
asked = [one for one in compile_matrix.launches("10.0") if "toy_tcgen05" in one.label]
compile_matrix.launches = lambda capability: tuple(asked[:1])
name, _, cell = compile_matrix.compile_one("10.0", 0)
print(json.dumps({"launched": found, "matrix": name, "error": cell.error, "registers": cell.registers}))
cli.main(["explain", "hc_prenorm_gemm", "--device", "sm_100"])
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    copy = tmp_path_factory.mktemp("copy")
    package = copy / "dsv4_backend_triton"
    shutil.copytree(ROOT / "backends" / "dsv4_backend_triton", package)
    (package / "hyper_connection" / "hc_prenorm_gemm" / "tcgen05.py").write_text(FILE)
    variants = package / "variants.py"
    text = variants.read_text()
    assert text.count(HERE) == 1
    variants.write_text(text.replace(HERE, HERE + LINE))
    env = {**os.environ, "PYTHONPATH": str(copy), "TRITON_CACHE_DIR": str(copy / "cache")}
    done = subprocess.run([sys.executable, "-c", LOOK], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, _, rest = done.stdout.partition("\n")
    return json.loads(first), rest


def test_it_serves_where_it_is_for(seen: tuple[dict[str, Any], str]) -> None:
    """And nowhere else, nor the calls that its plan leaves to others: as warm-up and the compile matrix record it."""
    launched = seen[0]["launched"]
    assert [where for where, kernel in launched.items() if "toy" in kernel] == ["10.0 200", "10.3 200"]
    assert launched["9.0 200"] == "_hc_wgmma_kernel"
    assert launched["10.0 8"] == launched["12.0 200"] == "_hc_kernel"


def test_the_compile_matrix_has_it(seen: tuple[dict[str, Any], str]) -> None:
    assert seen[0]["matrix"].startswith("toy_tcgen05 ")
    assert seen[0]["error"] == ""
    assert seen[0]["registers"] > 0


def test_explain_names_it(seen: tuple[dict[str, Any], str]) -> None:
    assert "kernels: tcgen05 (==10.*), wgmma (==9.0), portable (>=8.0)" in seen[1]
