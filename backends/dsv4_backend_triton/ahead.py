"""Before serving: compile what calls would compile, and report the memory that they would take.

Both run the op's own function on tensors without storage, with launches recorded instead of made.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import torch

from dsv4_backends.provider import Reason, cache_problem

from .arch import Arch, arch_of, interpreting
from .launch import Launch, recording
from .variants import OPS, slower


def record(op: str, calls: Iterable[dict[str, Any]], arch: Arch, home: str = "") -> Iterable[Launch]:
    """The launches of each call on ``arch``, one after the other. ``home``: the module of the op's function, if it is
    not the usual one."""
    for arguments in calls:
        yield from _recorded(op, arguments, arch, home)[1]


def warmup(op: str, calls: Iterable[dict[str, Any]], device: torch.device, home: str = "") -> int:
    """Compile and load every kernel that the calls ask for; returns how many there are.

    Args:
        op: The contract's name.
        calls: Arguments with tensors on the meta device, aligned to 16 bytes as an engine's are.
        device: The GPU. In Triton's interpreter there is nothing to compile.
        home: As for ``record``.
    """
    arch = arch_of(device)
    if arch.interpret:
        return 0
    ready: set[int] = set()
    with torch.cuda.device(device):
        for launch in record(op, calls, arch, home):
            kernel = launch.compile()
            if id(kernel) not in ready:
                ready.add(id(kernel))
                _ = kernel.run  # loads the module, which a first launch would do, perhaps during the capture of a graph
    return len(ready)


def workspace(op: str, arguments: dict[str, Any], device: torch.device, home: str = "") -> int:
    """Bytes that a call allocates on ``device`` beyond its results: tensors that its kernels get and that are neither
    arguments nor results.

    Args:
        op: The contract's name.
        arguments: With tensors on the meta device.
        device: The GPU. The number of its multiprocessors decides into how many splits keys go.
        home: As for ``record``.
    """
    results, launches = _recorded(op, arguments, arch_of(device), home)
    results = results if isinstance(results, tuple) else (results,)
    outside = {_storage(value) for value in (*arguments.values(), *results) if isinstance(value, torch.Tensor)}
    given = [value for launch in launches for value in launch.arguments.values() if isinstance(value, torch.Tensor)]
    return sum({_storage(t): t.untyped_storage().nbytes() for t in given if _storage(t) not in outside}.values())


def notices(op: str) -> Iterable[Reason]:
    """Why kernels of an op cannot be compiled here, or why slower ones serve."""
    if not interpreting() and (problem := cache_problem()) is not None:
        yield problem
    for variant in OPS[op].variants:
        if why := slower(op, variant):
            yield Reason("slower-kernels", why)


def _storage(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata


def _recorded(op: str, arguments: dict[str, Any], arch: Arch, home: str) -> tuple[Any, list[Launch]]:
    """The results of the op's function, and the launches that it would make."""
    function = getattr(importlib.import_module(f"{__package__}.{home or OPS[op].folder + '.op'}"), op)
    launches: list[Launch] = []
    with recording(launches.append, arch):
        return function(**arguments), launches
