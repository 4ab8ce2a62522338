"""Cross-compile the Triton provider's kernels for every architecture, without a GPU.

The launches are those of serving Flash and Pro on 1 to 8 ranks, recorded from the ops' own functions. Each becomes a
cubin. Its shared memory must fit the architecture and its stack must not exceed 32 bytes a thread.

Usage: python tools/compile_matrix.py [--capability 8.0 ...] [--op OP ...] [--every N [--start I]] [--print] [--kept]
                                      [--json FILE]
"""

from __future__ import annotations

import argparse
import collections
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import kept
import triton
from dsv4_backend_triton import BATCH_INVARIANT, ahead
from dsv4_backend_triton.arch import arch_from_capability
from dsv4_backend_triton.launch import Launch
from kept import Cell, Matrix, Total
from packaging.version import Version
from triton.backends.compiler import GPUTarget

from dsv4_backends import OPS, records
from dsv4_backends.bench.provenance import provenance
from dsv4_backends.contract.models import FLASH, PRO
from dsv4_backends.contract.traffic import packed_scales
from dsv4_backends.runtime.serving import Limits, calls
from dsv4_backends.selection.capability import sm

CAPABILITIES = ("8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0", "12.1")
RANKS = tuple(model.rank(tp) for model in (FLASH, PRO) for tp in (1, 2, 4, 8))
# Beyond these no new kernel appears on any rank: more requests and tokens only make the grids larger.
LIMITS = Limits(max_tokens=4224, max_requests=160, max_context=16384, next_n=4)
MORE = {"9.0": (Limits(64, 64, max_context=135168), Limits(8, 8, max_context=1048576))}
"""Where longer contexts have kernels of their own: with room for 1024 keys or more of a layer that compresses 128 to
one, decode on Hopper splits by the lengths."""
MOST_STACK = 32
"""A spill of 8 registers."""
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class NoGpu:
    """The part of a driver that compiling needs: the target, and a device index of its own for each target."""

    def __init__(self, cc: int) -> None:
        self.cc = cc

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.cc, 32)

    def get_current_device(self) -> int:
        return self.cc

    def get_current_stream(self, device: int) -> int:
        return 0


def _shown(value: Any) -> str:
    return getattr(value, "name", None) or str(value)


def label(launch: Launch) -> str:
    """A kernel and its constants, in words."""
    constants = " ".join(f"{name}={_shown(value)}" for name, value in launch.constants.items())
    return f"{launch.kernel.__name__.strip('_').removesuffix('_kernel')} {constants}".strip()


class Asked(NamedTuple):
    """A launch, and the op that asked for it first. ``types``: of its arguments, where nothing else differs."""

    op: str
    launch: Launch
    types: str = ""

    @property
    def label(self) -> str:
        options = self.launch.options
        registers = f" maxnreg={options['maxnreg']}" if "maxnreg" in options else ""
        return f"{label(self.launch)} warps={options['num_warps']}{registers}{self.types}"


def _types(launch: Launch) -> list[str]:
    return [str(getattr(value, "dtype", None) or type(value).__name__) for value in launch.arguments.values()]


def _identity(launch: Launch) -> tuple[Any, ...]:
    shapes = [getattr(value, "block_shape", None) for value in launch.arguments.values()]
    return label(launch), str(launch.options), str(_types(launch)), str(shapes)


@cache
def launches(capability: str, ops: tuple[str, ...] = OPS) -> tuple[Asked, ...]:
    """Everything that dispatch of these ops asks for on a capability, each once, in a fixed order."""
    arch = arch_from_capability(Version(capability))
    packed = packed_scales(arch.capability)
    found: dict[tuple[Any, ...], Asked] = {}
    for invariant in (False, True):
        home = "batch_invariant" if invariant else ""
        for op in (op for op in ops if op not in BATCH_INVARIANT or not invariant):
            for rank, limits in itertools.product(RANKS, (LIMITS, *MORE.get(capability, ()))):
                for launch in ahead.record(op, calls(op, rank, limits, packed_scales=packed), arch, home):
                    found.setdefault(_identity(launch), Asked(op, launch))
    repeated = collections.Counter(asked.label for asked in found.values())
    return tuple(
        asked._replace(types=f" of {' '.join(t.removeprefix('torch.') for t in _types(asked.launch) if 'torch' in t)}")
        if repeated[asked.label] > 1
        else asked
        for asked in found.values()
    )


def registers_and_stack(compiled: Any) -> tuple[int, int]:
    """Of one thread of a compiled kernel, in registers and bytes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = subprocess.run(
            [str(CUOBJDUMP), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", dump)
    assert usage is not None, dump
    return int(usage[1]), int(usage[2])


def compile_one(capability: str, index: int, ops: tuple[str, ...] = OPS) -> tuple[str, str, Cell]:
    """Compile the index-th launch for a capability: the kernel's name, the capability, and what it takes."""
    arch = arch_from_capability(Version(capability))
    asked = launches(capability, ops)[index]
    name, launch = asked.label, asked.launch
    triton.runtime.driver.set_active(NoGpu(arch.cc))
    try:
        compiled = launch.compile()
    except Exception as error:  # a cell of the table, and a failure of the whole
        return name, capability, Cell(error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    shared = int(compiled.metadata.shared)
    registers, stack = registers_and_stack(compiled)
    error = ""
    if shared > arch.smem:
        error = f"{shared} bytes of shared memory, {sm(Version(capability))} has {arch.smem}"
    elif stack > MOST_STACK:
        error = f"{stack} bytes of stack"
    return name, capability, Cell(registers, stack, shared, error)


def compile_share(capability: str, first: int, every: int, ops: tuple[str, ...]) -> list[tuple[str, str, Cell]]:
    """Every ``every``-th launch of a capability, in a process of its own: finding the launches takes a while."""
    return [compile_one(capability, index, ops) for index in range(first, len(launches(capability, ops)), every)]


def matrix(found: dict[str, dict[str, Cell]], origin: Mapping[str, Any]) -> Matrix:
    """The kept part of the kernels found: the totals, and each kernel with stack or an error."""
    of: dict[str, list[Cell]] = {}
    for cells in found.values():
        for capability, cell in cells.items():
            of.setdefault(capability, []).append(cell)
    worth = {name: {where: c for where, c in cells.items() if c.stack or c.error} for name, cells in found.items()}
    return Matrix(
        command=origin["command"],
        date=origin["date"],
        commit=origin["commit"],
        triton=triton.__version__,
        shared_limit={where: arch_from_capability(Version(where)).smem for where in of},
        totals={
            where: Total(len(cells), max(c.registers for c in cells), max(c.shared for c in cells))
            for where, cells in of.items()
        },
        kernels={name: cells for name, cells in worth.items() if cells},
    )


def spilled_more(made: Matrix, against: Matrix | None) -> list[str]:
    """Where a kernel has more stack than in the kept matrix of the same release of Triton."""
    worse = []
    for name, cells in made.kernels.items() if against else ():
        for capability, cell in cells.items():
            before = against.kernels.get(name, {}).get(capability, Cell()).stack
            if cell.stack > before:
                worse.append(f"{sm(Version(capability))} {name}: {cell.stack} bytes of stack, kept are {before}")
    return worse


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", nargs="+", default=CAPABILITIES)
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--every", type=int, default=1, help="compile each N-th only, from a start that differs")
    parser.add_argument("--start", type=int, default=0, help="of the first architecture; the next one starts one later")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one for each core)")
    parser.add_argument("--print", action="store_true", help="print what each kernel takes")
    parser.add_argument("--kept", action="store_true", help="a kernel may not spill more than in docs/results")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    start = time.perf_counter()
    chosen = [] if tuple(args.capability) == CAPABILITIES else ["--capability", *args.capability]
    chosen += [] if tuple(args.op) == OPS else ["--op", *args.op]
    chosen += [] if args.every == 1 else ["--every", str(args.every), "--start", str(args.start)]
    origin = provenance(" ".join(["python tools/compile_matrix.py", *chosen, "--json FILE"]))
    found: dict[str, dict[str, Cell]] = {}
    with ProcessPoolExecutor(args.jobs) as pool:
        ops = tuple(args.op)
        starts = [(args.start + i) % args.every for i in range(len(args.capability))]
        shares = [(where, start, args.every, ops) for where, start in zip(args.capability, starts, strict=True)]
        for cells in pool.map(compile_share, *zip(*shares, strict=True)):
            for name, capability, cell in cells:
                assert capability not in found.setdefault(name, {}), f"two kernels are called {name}"
                found[name][capability] = cell
                if args.print:
                    takes = f"{cell.registers} registers, {cell.stack} bytes of stack, {cell.shared} of shared memory"
                    print(f"{sm(Version(capability))} {name}: {takes}")
    made = matrix(found, origin)
    bad = [
        f"{sm(Version(capability))} {name}: {cell.error}"
        for name, cells in made.kernels.items()
        for capability, cell in cells.items()
        if cell.error
    ]
    bad += spilled_more(made, kept.matrix_of(triton.__version__)) if args.kept else []
    print(*bad, sep="\n", end="\n" if bad else "")
    count = sum(map(len, found.values()))
    print(f"Triton {triton.__version__}: {count} kernels in {time.perf_counter() - start:.0f} s, {len(bad)} bad")
    if args.json:
        records.write(made, args.json)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
