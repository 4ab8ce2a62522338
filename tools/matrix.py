"""The file of a compile matrix: a line for each kernel, with what it takes of each architecture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from packaging.version import Version

KEPT = Path(__file__).resolve().parents[1] / "docs" / "results"


@dataclass(frozen=True)
class Cell:
    """What a compiled kernel takes of an architecture, in registers a thread, bytes a thread and bytes a block."""

    registers: int = 0
    stack: int = 0
    shared: int = 0
    error: str = ""
    """Why the kernel is bad there; with it the numbers may be missing."""


@dataclass
class Matrix:
    """One release of Triton's.

    Attributes:
        shared_limit: Bytes of shared memory that a block may have, by compute capability.
        kernels: By kernel and its constants, then by compute capability.
    """

    command: str
    date: str
    commit: str
    triton: str
    shared_limit: dict[str, int] = field(default_factory=dict)
    kernels: dict[str, dict[str, Cell]] = field(default_factory=dict)

    @property
    def release(self) -> tuple[int, ...]:
        return Version(self.triton).release[:2]


def write(matrix: Matrix, path: Path) -> None:
    head = {key: value for key, value in asdict(matrix).items() if key != "kernels"}
    lines = [
        f"  {json.dumps(name)}: {json.dumps({where: _packed(cell) for where, cell in cells.items()})}"
        for name, cells in matrix.kernels.items()
    ]
    kernels = ",\n".join(lines)
    path.write_text(f'{json.dumps(head)[:-1]}, "kernels": {{\n{kernels}\n}}}}\n', encoding="utf-8")


def read(path: Path) -> Matrix:
    content = json.loads(path.read_text(encoding="utf-8"))
    kernels = content.pop("kernels")
    return Matrix(
        **content,
        kernels={name: {where: Cell(*cell) for where, cell in cells.items()} for name, cells in kernels.items()},
    )


def _packed(cell: Cell) -> list[int | str]:
    numbers: list[int | str] = [cell.registers, cell.stack, cell.shared]
    return [*numbers, cell.error] if cell.error else numbers


def kept(folder: Path = KEPT) -> list[Matrix]:
    """The matrices that the docs show, oldest release first."""
    return sorted(map(read, folder.glob("compile-matrix-*.json")), key=lambda matrix: matrix.release)


def kept_for(triton: str, folder: Path = KEPT) -> Matrix | None:
    """The one of a release, whatever its patch level."""
    return next((m for m in kept(folder) if m.release == Version(triton).release[:2]), None)
