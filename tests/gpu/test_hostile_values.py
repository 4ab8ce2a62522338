"""On a GPU no value faults either, with any provider: compiled Triton and Gluon kernels, and native libraries."""

from __future__ import annotations

from gpus import needs, provided

needs()

import os
import subprocess
import sys

import pytest
import torch
from paths import ROOT

from dsv4_backends import CONTRACTS

HOSTILE = """
import sys
import torch
from dsv4_backends.testing import checks
provider, op, level = sys.argv[1:]
target = checks.subject(provider, op, torch.device("cuda", 0))
ran = 0
for case in target.contract.at_level(level):
    if "hostile" not in case.name and case.name != "any index":
        continue
    drawn = checks.drawn(op, case.name, target.device, 0)
    if target.refusal(drawn) is None:
        for check in ("inputs", "written", "fresh", "graph"):
            checks.CHECKS[check](target, case)
        torch.cuda.synchronize()
        ran += 1
print("ran", ran)
"""


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: after an illegal access no call to the GPU succeeds."""
    full = {**os.environ, **env}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=full, capture_output=True, text=True)


every_provider = pytest.mark.parametrize("provider", ["torch", "triton", "deep_gemm", "flash_mla"])
every_op = pytest.mark.parametrize("op", [name for name, contract in CONTRACTS.items() if contract.values])


@every_provider
@every_op
def test_hostile_cases(provider: str, op: str) -> None:
    provided(provider, op, torch.device("cuda", 0))
    done = run("-W", "ignore", "-c", HOSTILE, provider, op, "full")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert int(done.stdout.split()[-1]) > 0


@every_provider
@every_op
def test_fuzz(provider: str, op: str) -> None:
    provided(provider, op, torch.device("cuda", 0))
    command = ("-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-W", "ignore")
    exactly = f"test_{op} or test_any_values[{op}]"
    environment = {"FUZZED_PROVIDER": provider, "FUZZED_EXAMPLES": "100"}
    done = run(*command, "tests/contract/fuzz_values.py", "-k", exactly, **environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "1 passed" in done.stdout
