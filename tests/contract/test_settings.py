"""PyTorch's settings change no numbers: runs settings_suite.py in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from paths import ROOT


def run(*more: str, **env: str) -> None:
    quiet = ["-W", "ignore:Conversion of an array", "-W", "ignore::RuntimeWarning"]
    options = ["-q", "-p", "no:cacheprovider", *quiet, *more, "tests/contract/settings_suite.py"]
    command = [sys.executable, "-m", "pytest", *options]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, check=False, timeout=1200
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_the_reference_on_the_cpu() -> None:
    run(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")


@pytest.mark.usefixtures("triton_interpreter")
def test_triton_in_the_interpreter() -> None:
    only = ("-k", "providers or buffers")
    run(*only, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", TRITON_INTERPRET="1", DSV4_BACKENDS_DEVICE="sm_80")
