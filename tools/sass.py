"""Compare the machine code (SASS) of the Triton provider's kernels before and after a change, without a GPU.

``record`` compiles every launch that dispatch asks for, as ``compile_matrix.py`` finds them, and keeps a hash of each
kernel's SASS. ``compare`` matches two records by op, capability and hash, and lists what differs. Names of functions
and files are not hashed, so moved and renamed kernels compare equal. Usage:

    python tools/sass.py record [--capability 8.0 ...] [--op OP ...] [--every N] [--jobs N] --json FILE
    python tools/sass.py compare [--op OP ...] BEFORE AFTER
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import compile_matrix
import triton
from packaging.version import Version

from dsv4_backends import OPS, records
from dsv4_backends.bench.provenance import provenance

CAPABILITIES = ("8.0", "9.0", "10.0", "12.0")
"""One of each instruction set for matrix products, and 10.0, where the plain kernels serve."""


@dataclass(frozen=True)
class Entry:
    """One compiled launch.

    Attributes:
        code: The hash of its SASS.
        shared: Bytes of shared memory.
        label: The kernel and its constants, for the reader only.
    """

    op: str
    capability: str
    code: str
    shared: int
    label: str

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.op, self.capability, self.code, self.shared


@dataclass(frozen=True)
class Record:
    """What ``record`` keeps."""

    command: str
    date: str
    triton: str
    entries: tuple[Entry, ...]


def normalised(dump: str, name: str) -> str:
    """The instructions of ``cuobjdump -sass`` with their encodings, without the names of functions and files."""
    lines = (line.strip() for line in dump.splitlines())
    code = [line for line in lines if line.startswith("/*") or re.match(r"\.L_x_\d+:", line)]
    return "\n".join(code).replace(name, "kernel")


def sass(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [compile_matrix.CUOBJDUMP, "-sass", file.name], capture_output=True, text=True, check=True
        )
    return done.stdout


def record_share(capability: str, ops: Sequence[str], every: int) -> list[Entry]:
    """Every ``every``-th launch of some ops on a capability."""
    found = []
    cc = compile_matrix.arch_from_capability(Version(capability)).cc
    triton.runtime.driver.set_active(compile_matrix.NoGpu(cc))
    for asked in [one for one in compile_matrix.launches(capability) if one.op in ops][::every]:
        compiled = asked.launch.compile()
        code = normalised(sass(compiled.asm["cubin"]), compiled.metadata.name)
        assert code, f"no SASS of {asked.label}"
        short = hashlib.sha256(code.encode()).hexdigest()[:16]
        found.append(Entry(asked.op, capability, short, int(compiled.metadata.shared), asked.label))
    return found


def write(entries: Iterable[Entry], command: str, path: Path) -> None:
    made = provenance(command)
    records.write(Record(made["command"], made["date"], triton.__version__, tuple(entries)), path)


def read(path: Path) -> Record:
    return records.read(Record, path)


def differences(before: Iterable[Entry], after: Iterable[Entry]) -> list[str]:
    """What only one of two records has, as lines; where an op's label on a capability has another hash, it changed."""
    gone = Counter(entry.key for entry in before)
    came = Counter(entry.key for entry in after)
    gone, came = gone - came, came - gone
    old = {(e.op, e.capability, e.label): e for e in before if e.key in gone}
    new = {(e.op, e.capability, e.label): e for e in after if e.key in came}
    lines = []
    for where in sorted({*old, *new}):
        kind = "changed" if where in old and where in new else "gone" if where in old else "new"
        codes = " -> ".join(f"{e.code}, {e.shared} bytes shared" for e in (old.get(where), new.get(where)) if e)
        lines.append(f"{kind}: {' '.join(where)}: {codes}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("--capability", nargs="+", default=CAPABILITIES)
    recording.add_argument("--every", type=int, default=1, help="each N-th only, of the same order")
    recording.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one for each core)")
    recording.add_argument("--json", type=Path, required=True)
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    for command in (recording, comparing):
        command.add_argument("--op", nargs="+", choices=OPS, default=tuple(OPS), help="default: all")
    args = parser.parse_args()
    if args.command == "record":
        with ProcessPoolExecutor(args.jobs) as pool:
            shares = [(capability, args.op, args.every) for capability in args.capability]
            entries = [entry for part in pool.map(record_share, *zip(*shares, strict=True)) for entry in part]
        chosen = "" if len(args.op) == len(OPS) else f" --op {' '.join(args.op)}"
        write(entries, f"python tools/sass.py record{chosen} --every {args.every} --json FILE", args.json)
        print(f"Triton {triton.__version__}: {len(entries)} kernels")
        return 0
    before, after = read(args.before), read(args.after)
    old, new = ([entry for entry in record.entries if entry.op in args.op] for record in (before, after))
    if before.triton != after.triton:
        print(f"different versions of Triton: {before.triton} and {after.triton}", file=sys.stderr)
        return 2
    lines = differences(old, new)
    print(*lines, sep="\n", end="\n" if lines else "")
    counts = f"{len(old)} kernels before, {len(new)} after"
    print(f"Triton {after.triton}: {counts}, {len(lines)} differ")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
