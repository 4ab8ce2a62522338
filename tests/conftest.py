"""Every test starts with the environment's settings cleared and every binding forgotten, and leaves them so."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import interpreter
import pytest
import torch
from installed import distribution

from dsv4_backends.runtime import bind
from dsv4_backends.selection import policy


def pytest_configure(config: pytest.Config) -> None:
    if interpreter.ON:
        if why := interpreter.trouble_here():
            raise pytest.UsageError(f"TRITON_INTERPRET=1: {why}")
        interpreter.remember()
    if hasattr(config, "workerinput"):  # pytest-xdist: each core has a process, so threads would wait for each other
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test starts first: started late, the other processes end long before it."""
    items.sort(key=lambda item: item.get_closest_marker("longest") is None)


@pytest.fixture
def triton_interpreter() -> None:
    """For tests that start a process with ``TRITON_INTERPRET=1``: the extra ``test`` installs what that needs."""
    if why := interpreter.trouble_here():
        pytest.fail(why)


@pytest.fixture(autouse=True)
def clean_settings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    kept = {"DSV4_BACKENDS_LEVEL", "DSV4_BACKENDS_TORCH_DEVICE"}
    if request.node.get_closest_marker("simulates"):
        kept.add("DSV4_BACKENDS_DEVICE")
    for name in [name for name in os.environ if name.startswith(policy.PREFIX) and name not in kept]:
        monkeypatch.delenv(name)
    path = list(sys.path)
    yield
    assert policy.active() is None, "a test left a policy active"
    if gone := [folder for folder in sys.path if folder not in path]:  # fake distributions were there
        sys.path[:] = path
        # Another test's fake of the same name must not find this one's code.
        for name, module in list(sys.modules.items()):
            if (getattr(module, "__file__", None) or "").startswith(tuple(gone)):
                del sys.modules[name]
        bind.reset()
    elif bind._default is not None and bind._default.policy != policy.Policy():
        bind.reset()  # bound under the settings of a test


@pytest.fixture
def fake_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Install a plugin: ``fake_plugin(name, source, dist=..., version=..., files=...)``; its module is NAME_plugin."""

    def install(
        name: str, source: str, *, dist: str = "", version: str = "1.0", files: Mapping[str, str] | None = None
    ) -> None:
        modules = {f"{name}_plugin.py": source} | dict(files or {})
        points = {"dsv4_backends": {name: f"{name}_plugin"}}
        distribution(tmp_path, dist or f"{name}-kernels", version, files=modules, points=points)
        monkeypatch.syspath_prepend(str(tmp_path))
        for file in modules:
            sys.modules.pop(file.removesuffix(".py"), None)
        bind.reset()

    return install
