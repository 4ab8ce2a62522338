"""Remove the device code of other architectures from a linked library; the rest compresses well.

Works on the containers in ``.nv_fatbin``. Each stays at its address, which the program passes to the driver: the kept
entries move to its front, its size shrinks, and the bytes after them become zeros: the ELF keeps its size and offsets.
PTX is kept only where a container has no code for the kept architecture. A container with neither gets the file's
smallest entry of another architecture, so that the driver answers "no kernel image" as before.
Usage: python tools/cut_device_code.py IN.so OUT.so --keep 90
"""

from __future__ import annotations

import argparse
import collections
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CONTAINER = 0xBA55ED50
CUBIN = 2
"""The kind of an entry; PTX is 1."""


class Entry(NamedTuple):
    container: int  # its offset in the file
    start: int
    end: int
    kind: int
    arch: int


def sections(blob: bytes) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of every section of a 64-bit ELF."""
    if blob[:5] != b"\x7fELF\x02":
        raise SystemExit("not a 64-bit ELF")
    (table,) = struct.unpack_from("<Q", blob, 0x28)
    size, count, names = struct.unpack_from("<HHH", blob, 0x3A)
    heads = [struct.unpack_from("<IIQQQQIIQQ", blob, table + i * size) for i in range(count)]
    for head in heads:
        start = heads[names][4] + head[0]
        yield blob[start : blob.index(b"\0", start)].decode(), head[4], head[5]


def entries(blob: bytes, start: int, end: int) -> Iterator[Entry]:
    at = start
    while end - at >= 16:
        magic, _, head, size = struct.unpack_from("<IHHQ", blob, at)
        if magic != CONTAINER:
            if any(blob[at : at + 8]):
                raise SystemExit(f"no container at {at:#x}: {magic:#x}")
            at += 8
            continue
        entry, stop = at + head, at + head + size
        while entry < stop:
            kind, _, length, payload = struct.unpack_from("<HHIQ", blob, entry)
            (arch,) = struct.unpack_from("<I", blob, entry + 28)
            yield Entry(at, entry, entry + length + payload, kind, arch)
            entry += length + payload
        at = stop + -(stop - start) % 8


def cut(blob: bytearray, keep: int) -> tuple[int, int]:
    """Cut in place; returns the bytes of device code before and after."""
    before = after = 0
    for name, offset, size in sections(blob):
        if name not in (".nv_fatbin", "__nv_relfatbin"):
            continue
        containers = collections.defaultdict(list)
        for entry in entries(bytes(blob), offset, offset + size):
            containers[entry.container].append(entry)
        every = [entry for found in containers.values() for entry in found]
        foreign = [entry for entry in every if entry.kind == CUBIN and entry.arch // 10 != keep // 10]
        smallest = min(foreign, key=lambda entry: entry.end - entry.start, default=None)
        stand_in = bytes(blob[smallest.start : smallest.end]) if smallest else b""
        for at, found in containers.items():
            kept = [entry for entry in found if entry.kind == CUBIN and entry.arch == keep]
            kept = kept or [entry for entry in found if entry.kind != CUBIN]
            body = b"".join(bytes(blob[entry.start : entry.end]) for entry in kept)
            first, last = found[0].start, found[-1].end
            if not body:
                body = stand_in if len(stand_in) <= last - first else bytes(blob[found[0].start : found[0].end])
            before, after = before + last - first, after + len(body)
            blob[first:last] = body + bytes(last - first - len(body))
            struct.pack_into("<Q", blob, at + 8, len(body))
    return before, after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--keep", type=int, default=90, help="architecture, such as 90")
    given = parser.parse_args()
    blob = bytearray(given.source.read_bytes())
    before, after = cut(blob, given.keep)
    given.target.write_bytes(blob)
    print(f"{given.source.name}: {before} bytes of device code, {after} kept")


if __name__ == "__main__":
    main()
