"""What a target can say: a method, around what stands there, a release, a capability, a package, an option."""

from __future__ import annotations

import importlib
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsv4_backends import PolicyError, engines
from dsv4_backends.commands import cli
from dsv4_backends.engines import patching
from dsv4_backends.engines.base import HookedEngine
from dsv4_backends.engines.patching import NOT_NEEDED, PLANNED, REFUSED, REPLACED, Target
from dsv4_backends.selection.policy import VARIABLES

OP = "hc_prenorm_gemm"
KERNELS = """
    class Base:
        def inherited(self, x): return ("own", x)

    class Kernel(Base):
        factor = 3
        def __init__(self, offset=0): self.offset = offset
        def run(self, x, scale=1): return ("own", x * scale + self.offset)

    def outer(x, y=0): return ("own", x, y)
"""
OURS = """
    def run(own, self, x, scale=1):
        return own(self, x, scale) if x < 0 else ("ours", x * scale + self.offset)
    def doubled(own, x, y=0): return own(2 * x, y)
    def incremented(own, x, y=0): return own(x + 1, y)
    def plain(x, y=0): return ("ours", x, y)
    def anything(own, *args, **kwargs): return own(*args, **kwargs)
    def too_few(own, x): return own(x)
"""


def target(attribute: str, ours: str, **more: Any) -> Target:
    return Target("small_engine.kernels", attribute, more.pop("op", ""), "a part", f"small_ours:{ours}", **more)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An installed engine ``small_engine`` 1.2.0 with these targets: ``make(target, ...)``."""
    made: list[HookedEngine] = []

    def install(*targets: Target, version: str = "1.2.0") -> HookedEngine:
        (tmp_path / "small_engine").mkdir()
        (tmp_path / "small_engine" / "__init__.py").write_text("")
        (tmp_path / "small_engine" / "kernels.py").write_text(textwrap.dedent(KERNELS))
        (tmp_path / "small_ours.py").write_text(textwrap.dedent(OURS))
        info = tmp_path / f"small_engine-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: small_engine\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setitem(engines.ENGINES, "small_engine", "nowhere:ENGINE")
        made.append(HookedEngine(name="small_engine", targets=targets))
        return made[0]

    monkeypatch.setenv("DSV4_BACKENDS_DEVICE", "cpu")
    yield install
    for engine in made:
        engine.undo()
    for name in [name for name in sys.modules if name.partition(".")[0] in ("small_engine", "small_ours")]:
        del sys.modules[name]


def state(engine: HookedEngine, device: str | None = None) -> tuple[str, list[str]]:
    (row,) = engine.plan(device).rows
    return row.state, [reason.code for reason in row.reasons]


def test_a_method(make: Any) -> None:
    engine = make(target("Kernel.run", "run", around=True))
    engine.apply()
    kernels = importlib.import_module("small_engine.kernels")
    kernel = kernels.Kernel(5)
    assert kernel.run(2, scale=10) == ("ours", 25)
    assert kernel.run(-2) == ("own", 3)
    (row,) = engine.rows
    assert (row.state, row.calls, row.passed_on) == (REPLACED, 2, 1)
    assert engine.undo() == []
    assert kernel.run(2, scale=10) == ("own", 25)


def test_a_method_that_somebody_else_has_replaced_since(make: Any) -> None:
    engine = make(target("Kernel.run", "run", around=True))
    engine.apply()
    kernels = importlib.import_module("small_engine.kernels")
    kernels.Kernel.run = somebodys = lambda self, x: x
    assert engine.undo() == ["small_engine.kernels:Kernel.run"]
    assert kernels.Kernel.run is somebodys


@pytest.mark.parametrize("attribute", ["Kernel.inherited", "Kernel.nothing", "Missing.run"])
def test_a_method_that_the_class_does_not_have(make: Any, attribute: str) -> None:
    """An inherited method is refused: replacing it would change other subclasses too."""
    engine = make(target(attribute, "run", around=True))
    assert state(engine) == (REFUSED, ["engine-target"])


def test_the_parameters_of_a_method(make: Any) -> None:
    known = {"caller": "Kernel.run", "signatures": (("self", "x"),)}
    engine = make(target("Kernel.run", "run", around=True, **known))
    (row,) = engine.plan().rows
    assert row.state == REFUSED
    assert "expected (self, x), got (self, x, scale)" in row.reasons[0].message


def test_several_around_one_name(make: Any) -> None:
    """The later one is outside, and each can be told from the other; ``undo`` takes them off in turn."""
    engine = make(target("outer", "doubled", around=True), target("outer", "incremented", around=True))
    engine.apply()
    kernels = importlib.import_module("small_engine.kernels")
    assert kernels.outer(3, y=7) == ("own", 8, 7)
    assert [(row.calls, row.passed_on) for row in engine.rows] == [(1, 1), (1, 1)]
    assert engine.undo() == []
    assert kernels.outer(3) == ("own", 3, 0)


@pytest.mark.parametrize(("ours", "expected"), [("anything", REPLACED), ("too_few", REFUSED)])
def test_what_is_around_takes_the_same_parameters(make: Any, ours: str, expected: str) -> None:
    engine = make(target("outer", ours, around=True))
    engine.apply()
    importlib.import_module("small_engine.kernels")
    assert engine.rows[0].state == expected


@pytest.mark.parametrize(
    ("version", "releases", "expected"),
    [("1.2.0", ">=1.2", PLANNED), ("1.1.0", ">=1.2", NOT_NEEDED), ("1.1.dev3", ">=1.2", PLANNED), ("1.1", "", PLANNED)],
)
def test_by_release(make: Any, version: str, releases: str, expected: str) -> None:
    """The number of a build from source says nothing: then the name is looked for."""
    engine = make(target("outer", "plain", releases=releases), version=version)
    assert state(engine)[0] == expected


def test_by_capability(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the engine's own works it stays, unless the user chooses a provider of the op."""
    engine = make(target("outer", "plain", op=OP, lacking=("<9",)))
    assert state(engine, "sm_80") == state(engine, "sm_89") == (PLANNED, [])
    assert state(engine, "sm_90") == state(engine, "sm_120") == (NOT_NEEDED, ["engine-served"])
    (row,) = engine.plan("sm_90").rows
    assert str(row.reasons[0]) == "small_engine's own serves; replaced on compute capability below 9"
    monkeypatch.setenv("DSV4_BACKENDS_PIN", f"{OP}=triton")
    assert state(engine, "sm_90") == (PLANNED, [])


def test_a_package_that_the_engine_needs(make: Any, tmp_path: Path) -> None:
    engine = make(
        target("outer", "plain", lacking=("<9",), without="small_package"),
        target("Kernel.run", "run", around=True, without="small_package"),
    )
    assert [row.state for row in engine.plan("sm_90").rows] == [PLANNED, PLANNED]
    (tmp_path / "small_package").mkdir()
    (tmp_path / "small_package" / "__init__.py").write_text("")
    # The second is for its absence alone, so it is not even listed.
    assert [(row.target.attribute, row.state) for row in engine.plan("sm_90").rows] == [("outer", NOT_NEEDED)]
    assert [(row.target.attribute, row.state) for row in engine.plan("sm_80").rows] == [("outer", PLANNED)]


def test_help_names_every_option() -> None:
    assert VARIABLES["DSV4_BACKENDS_ENGINE_OPTIONS"].endswith(f": {','.join(engines.OPTIONS)}")


def test_an_option_that_nobody_can_turn_on(make: Any) -> None:
    expected = (
        "engine small_engine: small_engine.kernels:outer: option: expected a word of dsv4_backends.engines.OPTIONS "
        f"({', '.join(engines.OPTIONS)}), got 'small'"
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        make(target("outer", "plain", option="small"))


def test_an_option(make: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(engines.OPTIONS, "small", "small_engine: something else")
    engine = make(target("outer", "plain", option="small"))
    assert state(engine) == (NOT_NEEDED, ["engine-option"])
    assert engine.plan().rows[0].reasons[0].hint == "small in DSV4_BACKENDS_ENGINE_OPTIONS turns it on"
    monkeypatch.setenv("DSV4_BACKENDS_ENGINE_OPTIONS", "small, ")
    assert state(engine) == (PLANNED, [])
    monkeypatch.setenv("DSV4_BACKENDS_ENGINE_OPTIONS", "smal")
    with pytest.raises(PolicyError, match="unknown option 'smal', did you mean 'small'"):
        engine.plan()
    assert cli.main(["doctor", "--device", "cpu"]) == 1
    assert "DSV4_BACKENDS_ENGINE_OPTIONS: unknown option" in capsys.readouterr().out


def test_what_holds_a_name() -> None:
    assert patching.held(patching, "source_of") == (patching, "source_of")
    assert patching.held(patching, "Row.refuse") == (patching.Row, "refuse")
