"""The real vLLM engine with the plugin, without a GPU: ``pytest tests/engines/vllm_dry_suite.py``.

Not part of the usual suite: it needs vLLM, the CPU build of torch, Triton and a C compiler, in an environment of its
own. Each run is a process (``dry/run.py``) in which the engine starts, with every Triton kernel compiled for one
compute capability, and generates. Where TileLang and the CuTe DSL are installed, as users have them, the runs are
those with them; where they are not, those without.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsv4_backends.engines.vllm import TARGETS

pytestmark = pytest.mark.filterwarnings("default")

RUN = Path(__file__).resolve().parent / "dry" / "run.py"
CUTE_DSL = importlib.util.find_spec("cutlass") is not None
IN_BF16 = {"inverse_rope_quant", "fp8_einsum"}
"""The ops of a projection in FP8: one in bf16 does without."""
OF_VLLM_ON_9 = {target.op for target in TARGETS if target.lacking and (CUTE_DSL or not target.without)} - {""}
"""The ops that vLLM has itself from 9.0 on; without the CuTe DSL it lacks one compressor there."""
REPLACED = {kernel for target in TARGETS for kernel in target.kernels}
PROMPTS = 3
ON_12 = {"DSV4_BACKENDS_ENGINE_OPTIONS": "flashmla_sm120"}
"""Attention by our ops where vLLM would take FlashInfer."""


def run(tmp_path: Path, sm: str, experts: str, *words: str, **environment: str) -> dict[str, Any]:
    """What one run of the engine records."""
    out = tmp_path / "record.json"
    command = [sys.executable, str(RUN), experts, str(out), *words]
    done = subprocess.run(command, env={**os.environ, "FAKE_SM": sm, **environment}, capture_output=True, text=True)
    assert out.exists(), f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    record: dict[str, Any] = json.loads(out.read_text())
    record["log"] = f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return record


def serves(record: dict[str, Any]) -> None:
    """The engine has started and generated, and every kernel compiles."""
    assert not record["stopped"], f"{record['stopped']}\n{record['log']}"
    assert record["generated"] == [4] * PROMPTS
    assert record["failed"] == {}
    assert len(record["kernels"]) > 30
    assert {row["state"] for row in record["rows"]} <= {"replaced", "not needed", "planned"}, record["rows"]


def by_ours(record: dict[str, Any], without: set[str], replaced: set[str] = REPLACED) -> None:
    """Every op of the hook but these was called and served by Triton; no kernel that is replaced was compiled."""
    ops = {target.op for target in TARGETS if target.op} - without
    calls = ((op, provider) for op, by in record["served"].items() for provider, n in by.items() if n)
    assert set(calls) == {(op, "triton") for op in ops}
    assert {row["op"] for row in record["rows"] if row["calls"] > row["passed_on"]} - {""} == ops
    names = [name.rpartition(":")[2].split(".") for name in record["kernels"]]
    assert not replaced & {part for parts in names for part in parts}


@pytest.mark.parametrize(
    ("sm", "experts", "bf16"),
    [
        ("8.0", "fp4", False),
        ("8.6", "fp8", False),
        ("8.6", "fp4", True),
        ("8.9", "fp8", True),
        ("8.9", "fp4", False),
    ],
)
def test_capability_8(tmp_path: Path, sm: str, experts: str, bf16: bool) -> None:
    options = {"DSV4_BACKENDS_ENGINE_OPTIONS": "wo_a_bf16"} if bf16 else {}
    record = run(tmp_path, sm, experts, **options)
    serves(record)
    by_ours(record, IN_BF16 if bf16 else {"inverse_rope"})


def test_nothing_compiles_while_serving(tmp_path: Path) -> None:
    """With the warm-up that an engine does: vLLM's own without what is replaced, and ours."""
    record = run(tmp_path, "8.0", "fp8", "--warm-up")
    serves(record)
    by_ours(record, {"inverse_rope"})
    assert record["late"] == {}
    (row,) = (row for row in record["rows"] if row["attribute"] == "kernel_warmup")
    assert row["calls"] == 1


def test_capability_9(tmp_path: Path) -> None:
    """With the warm-up, after which no kernel of ours compiles."""
    record = run(tmp_path, "9.0", "fp8", "--warm-up")
    serves(record)
    by_ours(record, OF_VLLM_ON_9, replaced=set())
    assert not [name for name in record["late"] if name.startswith("dsv4_backend")]


@pytest.mark.parametrize(
    ("attribute", "broken"),
    [
        ("fused_indexer_q_rope_quant", "FusedIndexerQRopeQuantTritonKernel"),
        ("MarlinFP8ScaledMMLinearKernel.process_weights_after_loading", ""),
    ],
)
def test_a_replacement_that_is_taken_out_is_missed(tmp_path: Path, attribute: str, broken: str) -> None:
    """These runs can fail: without one target the engine stops, or a kernel of vLLM's does not compile."""
    record = run(tmp_path, "8.0", "fp8", "--without", attribute)
    with pytest.raises(AssertionError):
        serves(record)
    if not CUTE_DSL or not broken:
        assert record["stopped"] if not broken else any(broken in name for name in record["failed"])


@pytest.mark.skipif(not CUTE_DSL, reason="vLLM's own kernels for 12.0 are in the CuTe DSL, which is not installed")
def test_capability_12_without_flashinfer(tmp_path: Path) -> None:
    record = run(tmp_path, "12.0", "fp8", "--backend", "FLASHMLA_SPARSE_DSV4", **ON_12)
    serves(record)
    assert record["served"]["sparse_mla_decode"]["triton"] > 0
    assert record["served"]["sparse_mla_prefill"]["triton"] > 0
