"""Gluon is experimental: a Triton that lacks a name costs the kernels that use it, and nothing else.

Which names those are is read from the sources. Each in turn is taken from Triton, in a process that was forked after
Triton's import, and what it costs is noted. Of the names that cost the same kernels one is taken again, and every op is
then asked what it would launch on every architecture.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
from dsv4_backend_triton import variants
from paths import ROOT

from dsv4_backends import OPS

PACKAGE = ROOT / "backends" / "dsv4_backend_triton"
GLUON = "triton.experimental.gluon"
CAPABILITIES = ("8.0", "9.0", "10.0", "12.0")


def _sources() -> dict[str, str]:
    """Files to their text. A file has dots, from the package on, as in ``sparse_mla.prefill.wgmma``."""
    files = {path: path.relative_to(PACKAGE).with_suffix("").parts for path in sorted(PACKAGE.rglob("*.py"))}
    return {".".join(parts): path.read_text() for path, parts in files.items()}


def _is_kernel(node: ast.stmt) -> bool:
    made_by = (one.func for one in getattr(node, "decorator_list", ()) if isinstance(one, ast.Call))
    return any(ast.unparse(maker) == "entry" for maker in made_by)


SOURCES = _sources()
IN_GLUON = {file for file, text in SOURCES.items() if GLUON in text}
KERNELS = {f"{file}.{node.name}" for file, text in SOURCES.items() for node in ast.parse(text).body if _is_kernel(node)}
"""Every kernel that can be launched: the functions with the decorator ``entry``."""


def file_of(kernel: str) -> str:
    return kernel.rpartition(".")[0]


def folder_of(kernel: str) -> str:
    return file_of(file_of(kernel))


def names() -> list[tuple[str, str]]:
    """Every (owner, attribute) of Gluon that the sources use: imported, through a module, or of shared memory."""
    found: set[tuple[str, str]] = set()
    methods: set[str] = set()
    for tree in (ast.parse(SOURCES[file]) for file in sorted(IN_GLUON)):
        roots: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(GLUON):
                for alias in node.names:
                    found.add((str(node.module), alias.name))
                    roots[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                owner = ast.unparse(node.value)
                root, _, rest = owner.partition(".")
                if root in roots:
                    found.add((f"{roots[root]}.{rest}".rstrip("."), node.attr))
                else:
                    methods.add(node.attr)
    shared = _owner(f"{GLUON}.language.shared_memory_descriptor")
    tensor = _owner("triton.language.tensor")
    of_shared = {m for m in methods if callable(getattr(shared, m, None)) and not hasattr(tensor, m)}
    found |= {(f"{GLUON}.language.shared_memory_descriptor", m) for m in of_shared}
    return sorted((o, a) for o, a in found if _owner(o) is not None and hasattr(_owner(o), a))


def _owner(path: str) -> Any:
    head, *rest = path.split(".")
    value: Any = importlib.import_module(head)
    for part in rest:
        try:
            value = getattr(value, part)
        except AttributeError:
            try:
                value = importlib.import_module(f"{value.__name__}.{part}")
            except (ImportError, AttributeError):
                return None
    return value


def _missing() -> dict[str, str]:
    """Why this process lacks a kernel of Gluon, by file; empty: it has it."""
    from dsv4_backend_triton import variants

    return {f"{variants.OPS[op].folder}.{v.name}": variants.missing(op, v) for op in OPS for v in gluon(op)}


def _look() -> dict[str, Any]:
    """What every op would launch where, and what is said of it, in this process."""
    import logging

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dsv4_backends").addHandler(handler)
    import plans
    import traffic as serving
    from dsv4_backend_triton import ahead
    from dsv4_backend_triton.arch import arch_from_capability
    from packaging.version import Version

    from dsv4_backends.contract.models import FLASH

    rank = FLASH.rank(1)
    narrow = serving.Limits(max_tokens=8, max_requests=2, max_context=2000)
    calls = {op: [*list(serving.calls(op, rank, narrow))[:4], *plans.more_calls(op)] for op in OPS}
    launched = {}
    for op in OPS:
        for capability in CAPABILITIES:
            recorded = ahead.record(op, calls[op], arch_from_capability(Version(capability)))
            kernels = [f"{one.kernel.fn.__module__}.{one.kernel.__name__}" for one in recorded]
            launched[f"{op} {capability}"] = [kernel.removeprefix(f"{PACKAGE.name}.") for kernel in kernels]
    notices = {op: [str(r) for r in ahead.notices(op) if r.code == "slower-kernels"] for op in OPS}
    return {"launched": launched, "said": said, "notices": notices, "missing": _missing()}


def gluon(op: str) -> list[Any]:
    return [variant for variant in variants.OPS[op].variants if variant.gluon]


def _child(owner: str, attribute: str, look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``look`` finds in a fork of this process from which a name was taken."""
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            if owner:
                gone = getattr(_owner(owner), attribute)
                delattr(_owner(owner), attribute)
                if isinstance(gone, ModuleType):
                    sys.modules[gone.__name__] = None  # type: ignore[assignment]
            answer = look()
        except BaseException as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = json.load(pipe)
    os.waitpid(pid, 0)
    return dict(answer)


NAMES = names()


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """By name: what a process without it would launch and say; "" is the process that lacks nothing.

    Names that cost the same kernels share what was found without one of them.
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = dict(json.loads(done.stdout))
    assert "error" not in answers[""], answers[""]
    return answers


def test_this_triton_has_all_of_them(found: dict[str, Any]) -> None:
    whole = found[""]
    assert whole["said"] == []
    assert set(whole["missing"].values()) == {""}
    launched = {kernel for kernels in whole["launched"].values() for kernel in kernels}
    assert launched <= KERNELS, "a kernel without entry"
    in_gluon = {kernel for kernel in KERNELS if file_of(kernel) in IN_GLUON}
    assert set(whole["missing"]) == {file_of(kernel) for kernel in in_gluon}
    assert in_gluon <= launched, "more_calls() of the op in plans/ has calls for which it serves"


@pytest.mark.parametrize("name", [f"{owner}:{attribute}" for owner, attribute in NAMES])
def test_a_missing_name_costs_what_uses_it(name: str, found: dict[str, Any]) -> None:
    whole, without = found[""], found[name]
    assert "error" not in without, without
    lost = {module for module, why in without["missing"].items() if why}
    assert lost or name in SPARE, "no kernel of Gluon is given up"
    # One line for each variant that is asked for, and no line twice; explain names every one that the op has.
    assert len(set(without["said"])) == len(without["said"]) <= 1
    assert bool(without["said"]) == bool(lost)
    for op in OPS:
        folder = variants.OPS[op].folder
        own = {f"{folder}.{variant.name}" for variant in gluon(op)} & lost
        assert len(without["notices"][op]) == len(own)
        everywhere = {kernel for capability in CAPABILITIES for kernel in whole["launched"][f"{op} {capability}"]}
        # What an op is made of: staged decode attends as prefill does, a selection has the kernels of its logits.
        others = {folder_of(kernel) for kernel in everywhere} - {folder}
        touched = any(file_of(file) in {folder, *others} for file in lost)
        of_others = {kernel for kernel in KERNELS if folder_of(kernel) in others}
        plain = {kernel for kernel in KERNELS if folder_of(kernel) == folder and file_of(kernel) not in IN_GLUON}
        for capability in CAPABILITIES:
            before, after = (f["launched"][f"{op} {capability}"] for f in (whole, without))
            if not touched:
                assert after == before
            else:
                assert set(after) <= {*before, *plain, *of_others}
                assert after
            assert not {file_of(kernel) for kernel in after} & lost


def _not_carried(function: ast.FunctionDef) -> Iterator[str]:
    """Variables that begin as another one, or another as them, and that a loop sets to it."""
    for loop in ast.walk(function):
        if not isinstance(loop, ast.For | ast.While):
            continue
        inside = {id(node) for node in ast.walk(loop)}
        assigned = [node for node in ast.walk(function) if isinstance(node, ast.Assign)]
        copies = [
            (to.id, node.value.id, id(node) in inside)
            for node in assigned
            for to in node.targets
            if isinstance(to, ast.Name) and isinstance(node.value, ast.Name)
        ]
        begins = {frozenset((to, other)) for to, other, within in copies if not within}
        yield from (to for to, other, within in copies if within and frozenset((to, other)) in begins)


def test_no_loop_sets_a_variable_to_one_that_it_began_with() -> None:
    """Triton does not carry it to the next turn: at the first turn it has the same value as before."""
    wrong = "def f():\n    b = a\n    for i in x:\n        a = b\n        b = load(i)"
    assert list(_not_carried(ast.parse(wrong).body[0])) == ["a"]  # type: ignore[arg-type]
    for file, text in SOURCES.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.decorator_list:
                assert not list(_not_carried(node)), f"{file}.{node.name}"


SPARE: set[str] = {f"{GLUON}.language.shared_memory_descriptor:_reinterpret"}
"""What a kernel can do without: it has another form for Tritons that lack it."""


if __name__ == "__main__":
    import torch  # noqa: F401
    import traffic as traffic_first  # noqa: F401
    import triton  # noqa: F401

    for module in [m for m in sys.modules if m.startswith("dsv4_backend_triton")]:
        del sys.modules[module]
    answers: dict[str, dict[str, Any]] = {"": _child("", "", _look)}
    by_cost: dict[tuple[str, ...], dict[str, Any]] = {}
    for owner, attribute in NAMES:
        lost = tuple(sorted(file for file, why in _child(owner, attribute, _missing).items() if why))
        if lost not in by_cost:
            by_cost[lost] = _child(owner, attribute, _look)
        answers[f"{owner}:{attribute}"] = by_cost[lost]
    print(json.dumps(answers))
