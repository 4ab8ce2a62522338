"""Triton's cache on disk, where it cannot be used: an error that names the variable, and ``doctor`` finds it before."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import traffic as serving
import triton
from compile_matrix import NoGpu
from dsv4_backend_triton import ahead
from dsv4_backend_triton import launch as triton_launch
from dsv4_backend_triton.arch import arch_from_capability
from packaging.version import Version

from dsv4_backends import OPS
from dsv4_backends.commands import cli
from dsv4_backends.commands.shared import FINDING
from dsv4_backends.engines.transformers import kernels as transformers_kernels
from dsv4_backends.errors import CacheError, DSV4Error
from dsv4_backends.runtime import launching

X = torch.zeros(4)


class Kernel:
    """A kernel whose compilation fails."""

    def __init__(self, error: Exception) -> None:
        self.error, self.fn, self.arg_names = error, object(), ["x"]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.warmup

    def warmup(self, *args: Any, **kwargs: Any) -> None:
        raise self.error


LAUNCHERS: dict[str, Callable[[Any], None]] = {
    "triton": lambda kernel: triton_launch.launch_kernel(kernel, (1,), X),
    "triton ahead": lambda kernel: triton_launch.Launch(kernel, (1,), {}, {}).compile(),
    "adapters": lambda kernel: launching.launch(kernel, -1, (1, 1, 1), (X,), (), ()),
    "transformers": lambda kernel: transformers_kernels._launch(kernel, (1,), X, X),
}


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/nope/.triton/cache")
    return "/nope/.triton/cache"


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied", "/nope"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/nope/.triton/cache/abc"),
        OSError(errno.EROFS, "Read-only file system", "/nope/.triton/cache/abc/tmp.pid_1"),
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("`ptxas` failed: No space left on device"),
        RuntimeError("Could not create or locate cache dir"),
    ],
    ids=str,
)
def test_the_error_names_the_variable_and_the_path(folder: str, launcher: str, error: Exception) -> None:
    with pytest.raises(CacheError) as raised:
        LAUNCHERS[launcher](Kernel(error))
    assert isinstance(raised.value, DSV4Error)
    for word in (folder, "TRITON_CACHE_DIR", "TRITON_HOME", str(error)):
        assert word in str(raised.value)
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "No such file", "/usr/bin/gcc"), RuntimeError("CUDA error"), ValueError()]
)
def test_other_errors_stay_what_they_are(folder: str, launcher: str, error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        LAUNCHERS[launcher](Kernel(error))
    assert raised.value is error


def _unusable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str) -> str:
    file = tmp_path / "file"
    file.write_text("")
    home = {"home": file, "cache": tmp_path / "x", "full": tmp_path / "x"}[how]
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_HOME", str(home))
    if how == "cache":
        monkeypatch.setenv("TRITON_CACHE_DIR", str(file / "cache"))
        return str(file / "cache")
    if how == "full":

        class Full:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None: ...

            def write(self, data: bytes) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    return str(home / ".triton" / "cache")


@pytest.mark.parametrize("how", ["home", "cache", "full"])
def test_it_is_found_ahead(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file is in place of the directory, or the disk is full; so it fails for root as well."""
    path = _unusable(monkeypatch, tmp_path, how)
    problem = launching.cache_problem()
    assert problem is not None
    assert path in problem.message
    monkeypatch.setattr(ahead, "interpreting", lambda: False)
    assert cli.main(["doctor", "--device", "sm_90"]) == FINDING
    said = capsys.readouterr().out
    assert "[cache-unusable]" in said
    assert "TRITON_CACHE_DIR" in said
    assert said.count("[cache-unusable]") == 1
    assert cli.main(["explain", "fp8_einsum", "--device", "sm_90"]) == 0
    assert "[cache-unusable]" in capsys.readouterr().out


def _doctor_says(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(ahead, "interpreting", lambda: False)
    assert cli.main(["doctor", "--device", "sm_90"]) == FINDING
    return capsys.readouterr().out


@pytest.mark.parametrize("home", ["/proc/none", "/dev/null"])
def test_a_home_that_is_none_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: str
) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.delenv("TRITON_HOME", raising=False)
    monkeypatch.setenv("HOME", home)
    # Triton has read it when it was imported.
    monkeypatch.setattr(launching, "_cache_folder", lambda: f"{home}/.triton/cache")
    said = _doctor_says(monkeypatch, capsys)
    assert f"HOME is {home}, which " in said
    assert "set HOME or TRITON_CACHE_DIR" in said
    assert "~" not in said


def test_an_empty_variable_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    told = "TRITON_CACHE_DIR is empty; unset it or name a directory"
    assert f"[cache-unusable] {told} (" in _doctor_says(monkeypatch, capsys)
    error = launching.cache_error(RuntimeError("Could not create or locate cache dir"))
    assert str(error) == told


@pytest.mark.parametrize("variable", ["TRITON_CACHE_MANAGER", "TRITON_REMOTE_CACHE_BACKEND"])
@pytest.mark.parametrize("value", ["no_such_module:X", "nope", "os:nope", "os:PathLike"])
def test_a_cache_manager_that_is_none_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    told = f"Triton cannot use {variable}={value}: "
    assert f"[cache-unusable] {told}" in _doctor_says(monkeypatch, capsys)
    assert str(launching.cache_error(ModuleNotFoundError("No module named 'nope'"))).startswith(told)


def test_a_call_names_the_cache_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real compilation, whose error is Triton's own."""
    monkeypatch.setenv("TRITON_CACHE_MANAGER", "no_such_module:X")
    monkeypatch.setattr(triton.runtime.driver, "_active", NoGpu(80))
    call = serving.prenorm(8, 1024, 24)
    launch = next(iter(ahead.record("hc_prenorm_gemm", [call], arch_from_capability(Version("8.0")))))
    with pytest.raises(CacheError, match=r"TRITON_CACHE_MANAGER=no_such_module:X: .*No module named"):
        launch.compile()


def test_nothing_is_said_of_a_good_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "not" / "yet"))
    assert launching.cache_problem() is None
    assert list(tmp_path.iterdir()) == []
    assert [list(ahead.notices(op)) for op in OPS] == [[]] * len(OPS)


def test_triton_itself_fails_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A real compilation, whose error is Triton's own."""
    path = _unusable(monkeypatch, tmp_path, "home")
    monkeypatch.setattr(triton.runtime.driver, "_active", NoGpu(80))
    call = serving.prenorm(8, 1024, 24)
    launch = next(iter(ahead.record("hc_prenorm_gemm", [call], arch_from_capability(Version("8.0")))))
    with pytest.raises(CacheError) as raised:
        launch.compile()
    assert path in str(raised.value)
