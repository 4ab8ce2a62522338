"""Tensors on cuda:1 while cuda:0 is current: every op, every provider that is there.

The whole conformance suite in that state: ``python tools/conformance.py --torch-device cuda:1``.
"""

from __future__ import annotations

from gpus import needs, provided

needs(2)

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from dsv4_backends import ops, step
from dsv4_backends.contract import CONTRACTS, Case
from dsv4_backends.runtime import ahead
from dsv4_backends.runtime.serving import Limits
from dsv4_backends.selection import plugins, policy
from dsv4_backends.testing import checks

pytestmark = pytest.mark.simulates
OTHER = torch.device("cuda", 1)
PAIRS = [
    (spec.name, op)
    for spec in plugins.load().providers
    for op in CONTRACTS
    if op in {i.op for i in spec.implementations}
]


@pytest.fixture(autouse=True)
def first_is_current() -> Iterator[None]:
    torch.cuda.set_device(0)
    yield
    assert torch.cuda.current_device() == 0, "a call left another device current"


def served(provider: str, op: str) -> tuple[checks.Subject, list[tuple[Case, dict[str, Any]]]]:
    """The provider's function on cuda:1, and the cases of level smoke that it takes."""
    found = provided(provider, op, OTHER)
    made = [(case, checks._inputs(found, case)) for case in CONTRACTS[op].at_level("smoke")]
    return found, [(case, arguments) for case, arguments in made if found.refusal(arguments) is None]


def moved(value: Any, device: str) -> Any:
    """A tensor on another device with the strides that it has: pages stay as far apart."""
    if not isinstance(value, torch.Tensor):
        return value
    storage = torch.empty(0, dtype=value.dtype, device=value.device).set_(value.untyped_storage())
    return storage.to(device).as_strided(value.shape, value.stride(), value.storage_offset())


@pytest.mark.parametrize("in_step", [False, True])
@pytest.mark.parametrize(("provider", "op"), PAIRS)
def test_calls(provider: str, op: str, in_step: bool) -> None:
    subject, cases = served(provider, op)
    assert cases
    for case, arguments in cases:
        with step() if in_step else nullcontext():
            # In a step the second call uses what the first one planned, and a call on cuda:0 between them does not.
            for device in ("cuda:1", "cuda:0", "cuda:1"):
                here = arguments if device == "cuda:1" else {k: moved(v, device) for k, v in arguments.items()}
                if subject.refusal(here) is not None:  # a library that serves one GPU in a process
                    continue
                results = subject.run(here)
                if device == "cuda:1":
                    assert {result.device for result in results} == {OTHER}
                    checks._judge("numerics", subject, case, arguments, results)


@pytest.mark.parametrize(("provider", "op"), PAIRS)
def test_through_the_public_function(provider: str, op: str) -> None:
    subject, cases = served(provider, op)
    with policy.use_providers({op: provider}):
        for case, arguments in cases:
            results = getattr(ops, op)(**arguments)
            results = results if isinstance(results, tuple) else (results,)
            checks._judge("numerics", subject, case, arguments, results)


@pytest.mark.parametrize(("provider", "op"), PAIRS)
def test_graphs(provider: str, op: str) -> None:
    subject, cases = served(provider, op)
    for case, _ in cases:
        checks.check_graph(subject, case)


def test_warmup() -> None:
    """What it compiles for cuda:1 is what calls there use."""
    triton = pytest.importorskip("triton")
    limits = Limits(max_tokens=64, max_requests=8, max_context=2000)
    ready = ahead.warmup("flash", tp=8, limits=limits, device=OTHER)
    assert sum(sum(made.values()) for made in ready.values()) > 0
    compiled: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda *, fn, **_: compiled.append(fn.name))
        assert ahead.warmup("flash", tp=8, limits=limits, device=OTHER) == ready
    assert compiled == []
