"""The adapters over DeepGEMM and FlashMLA, with fakes of the libraries."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import dsv4_backend_deep_gemm
import dsv4_backend_flash_mla
import pytest
import torch
from dsv4_backend_deep_gemm import probe as deep_gemm_probe
from dsv4_backend_flash_mla import probe as flash_mla_probe
from fakes import deep_gemm as fake_deep_gemm
from fakes import flash_mla as fake_flash_mla

from dsv4_backends import CONTRACTS
from dsv4_backends.runtime.bind import load_implementation
from dsv4_backends.testing import checks

CPU = torch.device("cpu")
PACKAGES = {"deep_gemm": dsv4_backend_deep_gemm, "flash_mla": dsv4_backend_flash_mla}
FAKES: dict[str, Any] = {"deep_gemm": fake_deep_gemm, "flash_mla": fake_flash_mla}
PLAIN = {
    "sparse_mla_decode": (
        "flash_mla_with_kvcache",
        {"b": 2, "s_q": 1, "h_q": 64, "topk": 64, "extra_topk": 128, "length": "random", "layout": "heads"},
    ),
    "sparse_mla_prefill": ("flash_mla_sparse_fwd", {"s_q": 3, "h_q": 64, "s_kv": 40, "topk": 128, "layout": "heads"}),
    "mqa_logits": ("fp8_mqa_logits", {"m": 5, "n": 70}),
    "paged_mqa_logits": ("fp8_paged_mqa_logits", {"b": 3, "context": 100, "layout": "heads"}),
    "fp8_einsum": ("fp8_einsum", {"b": 4, "h": 2, "r": 256, "d": 128}),
    "hc_prenorm_gemm": ("tf32_hc_prenorm_gemm", {"m": 4, "k": 256}),
}
"""By op: the library's function, and a case that needs nothing made for it but a schedule and safe lengths."""


def forget() -> None:
    deep_gemm_probe.deep_gemm.cache_clear()
    flash_mla_probe.flash_mla.cache_clear()


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """``use(library, line)``: the module of that name is the fake of that line."""

    def put(library: str, line: str, **options: Any) -> None:
        module = ModuleType(library)
        module.__dict__.update(FAKES[library].LINES[line](**options))
        monkeypatch.setitem(sys.modules, library, module)
        forget()

    yield put
    forget()


def subject(library: str, op: str) -> checks.Subject:
    (spec,) = PACKAGES[library].dsv4_providers()
    implementation = next(i for i in spec.implementations if i.op == op)
    function = load_implementation(op, implementation.target)
    refuses = None if implementation.refuses is None else load_implementation(op, implementation.refuses)
    return checks.Subject(library, CONTRACTS[op], implementation, function, refuses, CPU)


def ops_of(library: str) -> list[str]:
    (spec,) = PACKAGES[library].dsv4_providers()
    return [i.op for i in spec.implementations]
