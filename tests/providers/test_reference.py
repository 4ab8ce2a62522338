"""What the reference promises beyond the conformance suite."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import attention_path
import compressing
import pytest
import torch
from dsv4_backend_torch.memory import CHUNK_BYTES, row_chunks
from extremes import check_extreme_scale_codes


def test_extreme_scale_codes() -> None:
    check_extreme_scale_codes("torch", torch.device("cpu"))


@pytest.mark.parametrize("check", compressing.CHECKS)
def test_compressors(check: Callable[[str, torch.device], None]) -> None:
    check("torch", torch.device("cpu"))


@pytest.mark.parametrize("check", attention_path.CHECKS)
def test_attention_path(check: Callable[[str, torch.device], None]) -> None:
    check("torch", torch.device("cpu"))


def test_reference_memory_is_bounded() -> None:
    """No more than 1 GiB beyond inputs and outputs, measured as the growth of the peak in a process of its own.

    A quarter of the largest real prefill (1024 of 4096 rows; topk 1152, 128 heads), whose chunks are as large as the
    whole one's: the working set does not depend on the number of rows.
    """
    code = """
import resource, torch
from dsv4_backends import ops
torch.set_num_threads(1)
q = torch.randn(1024, 128, 512).bfloat16(); kv = torch.randn(8192, 512).bfloat16()
indices = torch.randint(0, 8192, (1024, 1152), dtype=torch.int32); out = torch.empty_like(q)
out.zero_()
run = lambda rows: ops.sparse_mla_prefill(q[:rows], kv, indices[:rows], 512 ** -0.5, out=out[:rows])
run(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
before = peak(); run(96); print(peak() - before)
"""
    grown = float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert grown < 1.0, f"{grown:.2f} GiB"
    # The numbers that the bound rests on: 96 rows are several chunks of the real shape.
    assert len(list(row_chunks(96, 4 * 1152 * 512))) >= 2
    assert CHUNK_BYTES * 8 <= 2**30
    assert [s.stop - s.start for s in row_chunks(3, 2**40)] == [1, 1, 1]
