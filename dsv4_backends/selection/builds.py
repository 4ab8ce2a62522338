"""What is installed of the libraries that providers adapt: their probes run, here or in a child process.

A probe without ``load`` reads metadata and files, so it runs in this process whenever a choice is made. With ``load``
it imports the library, which can crash, print, take seconds or create a CUDA context. So this process does that only
when a call is about to use the library; commands do it in a child process. Neither does it if metadata, files or the
claims already exclude the provider.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from ..contract import OPS
from ..locks import bindings
from .foreign import raised, run, shown, words
from .provider import Build, Implementation, ProviderSpec, Reason

Builds = Mapping[str, Build]

_TIMEOUT = 60
"""Seconds for the import of a library in a child process: DeepGEMM and FlashMLA take 5 to 20, torch included."""
_CHILD = f"from {__name__} import _child; _child()"


def _failed(message: str) -> Builds:
    """The same reason for every op: a probe that fails must not take the choice down with it."""
    return {op: Build(reasons=(Reason("probe-failed", message),)) for op in OPS}


@lru_cache(maxsize=32)
def _probe(target: str, load: bool) -> Builds:
    module, _, name = target.partition(":")

    def ask() -> Builds:
        found = getattr(importlib.import_module(module), name)(load)
        if not isinstance(found, Mapping):
            return _failed(f"the probe {target} did not return a mapping of Build objects: {shown(found)}")
        for op, build in found.items():
            if type(build) is not Build or not isinstance(op, str):
                return _failed(f"the probe {target} did not return Build objects, for {shown(op)} {shown(build)}")
            Build.__post_init__(build)
        return dict(found)

    try:
        # An import of the library has a process of its own where there is a limit.
        return ask() if load else run(ask)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return _failed(f"the probe {target} {raised(error)}")


def look(provider: ProviderSpec) -> Builds:
    """What metadata and files say. Nothing of the library is imported."""
    with bindings:  # a fork waits, see plugins.load
        return _probe(provider.probe, False) if provider.probe else {}


def load(provider: ProviderSpec) -> Builds:
    """What an import of the library in this process says."""
    with bindings:
        return _probe(provider.probe, True) if provider.probe else {}


def load_apart(provider: ProviderSpec) -> Builds:
    """What an import of the library in a child process says."""
    return _ask_child(provider.probe) if provider.probe else {}


def notices(implementation: Implementation) -> tuple[Reason, ...]:
    """The notices of an implementation that can serve, see ``Implementation.notices``."""
    target = implementation.notices
    if target is None:
        return ()
    module, _, name = target.partition(":")
    try:
        found = run(lambda: tuple(getattr(importlib.import_module(module), name)(implementation.op)))
        if all(isinstance(reason, Reason) for reason in found):
            return found
        message = f"{target} did not return Reason objects"
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        message = f"{target} {raised(error)}"
    return (Reason("notices-failed", message),)


def forget() -> None:
    """Forget all results: the next call probes again."""
    _probe.cache_clear()
    _ask_child.cache_clear()


@lru_cache(maxsize=32)
def _ask_child(target: str) -> Builds:
    # The child sees what this process sees, also where sys.path was changed.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        child = subprocess.run(
            [sys.executable, "-c", _CHILD, target],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",  # what a library prints need not be UTF-8
            timeout=_TIMEOUT,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return _failed(f"the library was not imported within {_TIMEOUT} s")
    except (OSError, ValueError) as error:
        return _failed(f"no child process could be started: {words(error)}")
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["it said nothing"])[-1]
        how = f"signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
        message = f"the process that imported the library ended with {how}: {last}"
        return {op: Build(reasons=(Reason("library-load", message),)) for op in OPS}
    try:
        return {op: _from_json(build) for op, build in json.loads(child.stdout).items()}
    except Exception as error:
        return _failed(f"the child process answered nonsense: {words(error)}")


def _child() -> None:
    # Libraries print, from C as well; only the answer may reach the pipe.
    pipe = os.dup(1)
    os.dup2(2, 1)
    found = _probe(sys.argv[1], True)
    os.write(pipe, json.dumps({op: asdict(build) for op, build in found.items()}).encode())
    sys.stdout.flush()
    # A library's own clean-up may crash, which is not what was asked.
    os._exit(0)


def _from_json(build: dict[str, Any]) -> Build:
    claim = build["capability"]
    return Build(
        name=build["name"],
        owners=tuple(build["owners"]),
        capability=None if claim is None else tuple(claim),
        reasons=tuple(Reason(**reason) for reason in build["reasons"]),
    )
