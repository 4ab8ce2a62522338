"""Suites that elsewhere run in Triton's interpreter or on the CPU, each in a process of its own."""

from __future__ import annotations

from gpus import needs

needs()

import subprocess
import sys

import pytest
from paths import ROOT


@pytest.mark.parametrize(
    "suite", ["providers/triton_suite.py", "contract/settings_suite.py", "engines/transformers_kernels_suite.py"]
)
def test_on_the_gpu(suite: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", f"tests/{suite}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
