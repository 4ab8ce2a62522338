"""What the tests of the Triton provider ask of each op, in one file an op: here, where the op is in the provider.

``variants.OPS`` has the op's folder, e.g. ``indexer.mqa_logits``: its file is ``indexer/mqa_logits.py``. It has

* ``covered(call, launches)``: of the launches of a call, whether each part of the results is computed, and by one
  program: one bool or more;

and, if the op needs them,

* ``unusual()``: calls that only its plain kernels take, and that serving does not make;
* ``more_calls()``: calls for which kernels serve that the calls of a small server do not ask for;
* ``workspace(call, arch)``: the most bytes that a call may allocate beyond its results, 0 without it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from types import FunctionType
from typing import Any

from dsv4_backend_triton import variants
from dsv4_backend_triton.arch import Arch
from dsv4_backend_triton.launch import Launch
from paths import ROOT
from traffic import Arguments

HERE = Path(__file__).parent
FUNCTIONS = {"covered", "unusual", "more_calls", "workspace"}


def file_of(op: str) -> Path:
    """The file of an op."""
    return HERE.joinpath(*variants.OPS[op].folder.split(".")).with_suffix(".py")


def _of(op: str) -> Any:
    file = file_of(op)
    name = file.relative_to(ROOT).as_posix()
    assert file.exists(), f"{op}: write {name} with covered(call, launches), see docs/adding-an-op.md"
    module = importlib.import_module(f"{__name__}.{variants.OPS[op].folder}")
    public = {key for key, value in vars(module).items() if isinstance(value, FunctionType) and key[0] != "_"}
    own = {key for key in public if getattr(module, key).__module__ == module.__name__}
    assert "covered" in public, f"{op}: {name} has no covered(call, launches)"
    assert own <= FUNCTIONS, f"{op}: {name}: nobody calls {sorted(own - FUNCTIONS)}; expected {sorted(FUNCTIONS)}"
    return module


def covered(op: str, call: Arguments, launches: list[Launch]) -> list[bool]:
    return list(_of(op).covered(call, launches))


def unusual(op: str) -> Iterable[Arguments]:
    return getattr(_of(op), "unusual", tuple)()


def more_calls(op: str) -> Iterable[Arguments]:
    return getattr(_of(op), "more_calls", tuple)()


def workspace(op: str, call: Arguments, arch: Arch) -> int:
    given = getattr(_of(op), "workspace", None)
    return 0 if given is None else int(given(call, arch))


def variant_of(launch: Launch) -> str:
    """The name of the file of a launch's kernel."""
    return str(launch.kernel.fn.__module__.rpartition(".")[2])


def once(blocks: int, tile: int, size: int) -> bool:
    """Whether so many tiles cover so many elements, and none of them is beyond the end."""
    return (blocks - 1) * tile < size <= blocks * tile
