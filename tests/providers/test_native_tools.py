"""The tools that call DeepGEMM and FlashMLA directly, without these: their table of ops, and their rows."""

from __future__ import annotations

import importlib.util
from typing import Any

import native_calls
import native_overhead
import pytest
import torch
from paths import ROOT

from dsv4_backends import CONTRACTS
from dsv4_backends.bench import shapes
from dsv4_backends.runtime.bind import signature_mismatch
from dsv4_backends.selection import plugins
from dsv4_backends.selection.provider import Tier


def test_every_op_of_a_native_provider_has_a_direct_call() -> None:
    claimed = {
        implementation.op: provider.name
        for provider in plugins.load().providers
        if provider.tier is Tier.NATIVE
        for implementation in provider.implementations
    }
    assert claimed == native_overhead.PROVIDERS


def test_the_provider_of_vllms_kernels_has_the_contracts_signatures() -> None:
    """Its functions import vLLM when they are called, so that they can be looked at without it."""
    spec = importlib.util.spec_from_file_location("vllm_kernels", ROOT / "tools/vllm_kernels/vllm_kernels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (provider,) = module.dsv4_providers()
    assert provider.implementations
    for implementation in provider.implementations:
        for target in filter(None, (implementation.target, implementation.refuses)):
            function = getattr(module, target.partition(":")[2])
            assert signature_mismatch(CONTRACTS[implementation.op], function) is None, target


@pytest.mark.parametrize("op", native_calls.NATIVE)
def test_rows_as_engines_have_them(op: str) -> None:
    """Every row is one of ``bench``; drawn small, its arguments are the contract's, with head dimension and buffers."""
    assert list(native_overhead.ROWS[op].values()) == shapes.rows((), 1, (op,))
    contract = CONTRACTS[op]
    for row in shapes.tiny((op,)):
        made: dict[str, Any] = native_overhead.as_engines_have_it(row, torch.device("cpu"))
        contract.check(**made)
        assert (set(contract.buffers) <= set(made)) == native_calls.NATIVE[op].buffers
        for name in ("k_cache", "extra_k_cache", "kv", "indices"):
            if name in made and "1" in contract.args[name].forms[-1].dims:  # type: ignore[union-attr]
                assert 1 in made[name].shape[1:-1]
