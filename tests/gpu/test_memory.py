"""``check`` asks the GPU for its memory."""

from __future__ import annotations

from gpus import needs

needs()

import pytest
import torch

from dsv4_backends.runtime import check


def test_memory_of_this_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV4_BACKENDS_DENY", "deep_gemm,flash_mla")
    found, *_ = check.check("flash", tp=8, max_model_len=65536)
    assert found.memory is not None
    assert found.memory.device == torch.cuda.get_device_properties(0).total_memory
    assert found.memory.workspace
