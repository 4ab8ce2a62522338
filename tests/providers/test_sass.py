"""tools/sass.py: the same code under another name is the same, other code is not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import sass
import torch
import triton
import triton.language as tl
from dsv4_backend_triton.launch import Launch


@triton.jit
def _twice(x, size: tl.constexpr):
    at = tl.arange(0, size)
    tl.store(x + at, 2.0 * tl.load(x + at))


@triton.jit
def _renamed_twice(x, block: tl.constexpr):
    place = tl.arange(0, block)
    tl.store(x + place, 2.0 * tl.load(x + place))


@triton.jit
def _three_times(x, size: tl.constexpr):
    at = tl.arange(0, size)
    tl.store(x + at, 3.0 * tl.load(x + at))


def test_names_do_not_count_and_code_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver = triton.runtime.driver
    monkeypatch.setattr(driver, "_active", sass.compile_matrix.NoGpu(80))

    def record(kernel: Any, constant: str) -> list[Any]:
        x = torch.empty(128, device="meta")
        launch = Launch(kernel, (1,), {"x": x, constant: 128}, {"num_warps": 1, "enable_fp_fusion": True})
        asked = sass.compile_matrix.Asked("some_op", launch)
        monkeypatch.setattr(sass.compile_matrix, "launches", lambda _: (asked,))
        return list(sass.record_share("8.0", ["some_op"], 1))

    one, same, other = record(_twice, "size"), record(_renamed_twice, "block"), record(_three_times, "size")
    assert sass.differences(one, one) == sass.differences(one, same) == []
    assert len(sass.differences(one, other)) == 2  # another label too: one is gone, one is new
    (line,) = sass.differences(one, [dataclasses.replace(other[0], label=one[0].label)])
    assert line.startswith("changed: some_op 8.0 twice size=128 warps=1: ")
    assert one[0].code in line
    assert other[0].code in line
    more = dataclasses.replace(one[0], shared=one[0].shared + 16)
    assert len(sass.differences(one, [more])) == 1
    assert sass.differences(one, [*one, *one])[0].startswith("new: ")
    sass.write(one, "a command", tmp_path / "one.json")
    read = sass.read(tmp_path / "one.json")
    assert (read.command, read.triton, list(read.entries)) == ("a command", triton.__version__, one)


def test_names_and_files_are_dropped() -> None:
    dump = """
Fatbin elf code:
arch = sm_80
\t\tFunction : _twice
\t.headerflags\t@"EF_CUDA_SM80"
        /*0000*/                   MOV R1, c[0x0][0x28] ;  /* 0x00000a0000017a02 */
        /*0010*/                   CALL.REL.NOINC `(_twice) ;
"""
    lines = sass.normalised(dump, "_twice").splitlines()
    assert lines[0].startswith("/*0000*/")
    assert lines[1].endswith("`(kernel) ;")
    assert len(lines) == 2
