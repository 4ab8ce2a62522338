"""How many bytes of our Triton kernels' results are those of vLLM's own kernels, on the rows of ``bench``.

Both are within the contract's tolerance of fp64. Where they differ, another order of fp32 additions, or another
logarithm, has rounded an e4m3 value or a power-of-two scale the other way.
Usage, on a GPU with vLLM and this folder installed: python tools/vllm_kernels/compare_bytes.py [--json FILE]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from dsv4_backends import CONTRACTS, records
from dsv4_backends.bench import inputs, shapes
from dsv4_backends.bench.provenance import provenance
from dsv4_backends.contract.models import MODELS
from dsv4_backends.testing import checks

sys.path.insert(0, str(Path(__file__).parents[1]))
import vllm_kernels
from kept import SameBytes, SameBytesRow


def run(subject: checks.Subject, arguments: dict[str, Any]) -> list[torch.Tensor]:
    """The results, in memory of their own."""
    buffers = {name: arguments[name].clone() for name in subject.contract.buffers}
    return [result.contiguous().view(torch.uint8) for result in subject.run(arguments | buffers)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    given = parser.parse_args(argv)
    device = torch.device("cuda", 0)
    sums: dict[tuple[str, str], tuple[int, int, int]] = {}
    for row in shapes.rows(tuple(MODELS), 1, [op for op in CONTRACTS if hasattr(vllm_kernels, op)]):
        arguments = inputs.draw(row, device)
        before = [arguments[name].view(torch.uint8) for name in CONTRACTS[row.op].buffers]
        ours, theirs = (run(checks.subject(name, row.op, device), arguments) for name in ("triton", "vllm_kernels"))
        for index, (name, a, b) in enumerate(zip(CONTRACTS[row.op].returns, ours, theirs, strict=True)):
            written = a != before[index] if before else torch.ones_like(a, dtype=torch.bool)
            count, differ = int(written.sum()), int((a != b).sum())
            so_far = sums.get((row.op, name), (0, 0, 0))
            sums[row.op, name] = (so_far[0] + 1, so_far[1] + count, so_far[2] + differ)
            print(f"{row.op:28} {row.name:30} {name:10} {count:12} bytes, {differ} differ", flush=True)
    if given.json:
        command = "python tools/vllm_kernels/compare_bytes.py"
        rows = tuple(SameBytesRow(op, name, *of) for (op, name), of in sums.items())
        records.write(SameBytes(**provenance(command), rows=rows), given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
