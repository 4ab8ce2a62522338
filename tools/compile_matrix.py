"""Cross-compile the Triton provider's kernels for every architecture, without a GPU.

Each variant that dispatch can ask for becomes a cubin; its shared memory must fit the architecture and its stack must
not exceed 32 bytes a thread. Usage: python tools/compile_matrix.py [--capability 8.0 ...] [--every N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
from dsv4_backend_triton import variants
from dsv4_backend_triton._arch import arch_from_capability
from packaging.version import Version
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dsv4_backends.capability import sm

CAPABILITIES = ("8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0", "12.1")
MOST_STACK = 32
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compile_one(capability: str, index: int) -> dict[str, Any]:
    """Compile the index-th variant for a capability; a row of the table."""
    arch = arch_from_capability(Version(capability))
    variant = variants.all_of(arch)[index]
    row: dict[str, Any] = {"capability": capability, "variant": variant.note, "warps": variant.num_warps}
    source: Any = ASTSource
    if variant.kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        source = GluonASTSource
    made = source(variant.kernel, variant.full_signature(), dict(variant.constants), dict(variant.attrs))
    options: dict[str, Any] = {
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "maxnreg": variant.maxnreg,
    }
    options |= variant.options
    try:
        compiled = triton.compile(made, target=GPUTarget("cuda", arch.cc, 32), options=options)
    except Exception as error:  # a row of the table, and a failure of the whole
        return row | {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = subprocess.run(
            [str(CUOBJDUMP), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", dump)
    assert usage is not None, dump
    shared = int(compiled.metadata.shared)
    registers, stack = int(usage[1]), int(usage[2])
    row |= {"registers": registers, "stack": stack, "shared": shared, "shared_limit": arch.smem, "error": ""}
    if shared > arch.smem:
        row["error"] = f"{shared} bytes of shared memory, {sm(Version(capability))} has {arch.smem}"
    elif stack > MOST_STACK:
        row["error"] = f"{stack} bytes of stack"
    return row


def tasks(capabilities: tuple[str, ...], every: int) -> Iterator[tuple[str, int]]:
    """Every variant, or each ``every``-th with a start that differs by architecture, so that all come up somewhere."""
    for place, capability in enumerate(capabilities):
        count = len(variants.all_of(arch_from_capability(Version(capability))))
        yield from ((capability, index) for index in range(place % every, count, every))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", nargs="+", default=CAPABILITIES)
    parser.add_argument("--every", type=int, default=1, help="compile each N-th variant only")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    start = time.perf_counter()
    with ProcessPoolExecutor(2) as pool:
        rows = list(pool.map(compile_one, *zip(*tasks(tuple(args.capability), args.every), strict=True)))
    bad = [row for row in rows if row["error"]]
    for row in bad:
        print(f"{sm(Version(row['capability']))} {row['variant']}: {row['error']}")
    print(f"Triton {triton.__version__}: {len(rows)} variants in {time.perf_counter() - start:.0f} s, {len(bad)} bad")
    if args.json:
        result = {"command": "python tools/compile_matrix.py", "triton": triton.__version__, "rows": rows}
        args.json.write_text(json.dumps(result, indent=0) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
