"""Fakes of DeepGEMM and FlashMLA for machines that cannot run them.

Each has the parameters of one real release line, in the form in which that line has them (a Python function, a pybind11
function, a ``torch.ops`` function), asserts what the real one asserts or silently counts on, computes with the oracle,
and leaves garbage where the real one leaves memory as it was. ``install`` makes a distribution of one.
"""

from __future__ import annotations

from pathlib import Path

from installed import distribution


def install(
    place: Path,
    name: str,
    version: str,
    package: str,
    source: str,
    *,
    headers: tuple[str, ...] = (),
    compiled: bytes | None = None,
) -> None:
    """Write a package and its metadata as pip would have, under ``place``.

    Args:
        name: Of the distribution; empty for files that none owns.
        package: Its import name, perhaps with dots.
        source: Its ``__init__.py``.
        headers: Names of the kernel headers that DeepGEMM ships.
        compiled: Content of its compiled file.
    """
    folder = place.joinpath(*package.split("."))
    folder.mkdir(parents=True, exist_ok=True)
    for parent in folder.relative_to(place).parents:
        if parent.name:
            (place / parent / "__init__.py").touch()
    (folder / "__init__.py").write_text(source)
    impls = folder / "include" / "deep_gemm" / "impls"
    impls.mkdir(parents=True, exist_ok=True)
    for header in headers:
        (impls / header).touch()
    if compiled is not None:
        (folder / "cuda.cpython-312-x86_64-linux-gnu.so").write_bytes(compiled)
    if name:
        distribution(place, name, version)
