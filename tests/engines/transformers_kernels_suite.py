"""The small kernels of the transformers integration, where they run: on the GPU, or in Triton's interpreter on the CPU.

Each is compared with the plain torch that serves elsewhere. test_transformers.py runs this file in a process of its
own, since Triton reads the interpreter's switch when it is imported. There the layers of a bf16 model pass the same
tests with the kernels as without. On a GPU tests/gpu/test_suites.py runs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from dsv4_backend_triton.arch import interpreting
from test_transformers import (  # noqa: F401
    attend,
    inference,
    one_thread,
    test_hyper_connections,
    test_output_projection,
)
from tiny_deepseek_v4 import tiny
from torch import Tensor
from transformers import DynamicCache
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

from dsv4_backends.contract import layouts
from dsv4_backends.engines import transformers as engine
from dsv4_backends.engines.transformers import fused, kernels
from dsv4_backends.engines.transformers import pages as paged
from dsv4_backends.selection import policy
from dsv4_backends.testing.checks import default_device

DEVICE = default_device()
"""Of the kernels' own tests. The whole layers run on the CPU."""


@pytest.fixture(autouse=True)
def reference(inference: None) -> Iterator[None]:  # noqa: F811
    """The ops in plain torch: the kernels of providers are tested elsewhere, and slow in the interpreter."""
    with policy.use_providers("torch"):
        yield


def drawn(*shape: int, seed: int = 0, spread: float = 0.0) -> Tensor:
    """Normal bf16 values, each row at a magnitude of its own."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = torch.exp(spread * torch.randn(*shape[:-1], 1, generator=generator))
    return (torch.randn(*shape, generator=generator) * magnitude).bfloat16().to(DEVICE)


def angles(*shape: int) -> tuple[Tensor, Tensor]:
    turn = torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 7
    return turn.cos().bfloat16().to(DEVICE), turn.sin().bfloat16().to(DEVICE)


def same_bits(result: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(result[0].view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(result[1], expected[1])


@pytest.mark.parametrize(("shape", "block"), [((1, 128), 128), ((3, 5, 256), 128), ((301, 64), 64), ((0, 128), 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantise(shape: tuple[int, ...], block: int, dtype: torch.dtype) -> None:
    x = drawn(*shape, spread=8.0).to(dtype) * 1.001
    if x.numel():
        x.view(-1)[:5] = torch.tensor([0.0, -0.0, 1e-30, 3e38, -1e-5])
    same_bits(kernels.quantise(x, block), layouts.quantize_e4m3(x, block))


@pytest.mark.parametrize("top", [448.0, 1.0, 1e-5])
def test_quantise_every_value(top: float) -> None:
    """Every bf16 that the scale of ``top`` lets through, ties and e4m3's subnormals included; a NaN stays one."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[every.abs() <= top]
    rows = torch.nn.functional.pad(every, (0, -len(every) % 127)).view(-1, 127)
    rows = torch.cat([rows, torch.full((len(rows), 1), top, dtype=rows.dtype)], 1).to(DEVICE)
    same_bits(kernels.quantise(rows, 128), layouts.quantize_e4m3(rows, 128))
    rows[0, 3] = torch.nan
    assert kernels.quantise(rows, 128)[0][0, 3].float().isnan()


@pytest.mark.parametrize(("batch", "length", "heads", "d"), [(1, 1, 64, 128), (2, 7, 3, 128), (1, 200, 17, 64)])
def test_indexer_queries(batch: int, length: int, heads: int, d: int) -> None:
    q, weights = drawn(batch, length, heads, d, spread=3.0), drawn(batch, length, heads)
    cos, sin = angles(batch, length, 32)
    values, scaled = kernels.indexer_queries(q, cos, sin, weights, 0.3)
    rotated = modeling.apply_rotary_pos_emb(q, cos, sin, unsqueeze_dim=2)
    expected, scale = layouts.quantize_e4m3(rotated, d)
    wanted = weights.float() * 0.3 * scale.squeeze(-1)
    torch.testing.assert_close(values.float(), expected.float(), rtol=1 / 8, atol=2**-9)
    assert float((values.float() == expected.float()).float().mean()) > 0.99
    torch.testing.assert_close(scaled, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("page_size", "token_bytes"), [(64, 584), (2, 584), (64, 132)])
def test_pages_to_the_byte(batch: int, page_size: int, token_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring that goes round, tokens that come as a part of others, and padding between pages left alone."""
    made = []
    for module in (kernels, None):
        monkeypatch.setattr(fused, "kernels_on", lambda device, module=module: module)
        pages = paged.Pages(batch, page_size, token_bytes, DEVICE, 64)
        raw = torch.empty(0, dtype=torch.uint8, device=DEVICE).set_(pages.cache.untyped_storage()).fill_(77)
        for start, count in ((0, 64), (62, 1), (63, 40), (103, 1)):
            x = drawn(batch, count + 3, 512 if token_bytes == 584 else 128, seed=start, spread=5.0)[:, 3:]
            (pages.write_kv if token_bytes == 584 else pages.write_keys)(start, x)
        made.append(raw)
    assert torch.equal(*made)


def hyper(rows: int, d: int, spread: float, iterations: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    generator = torch.Generator().manual_seed(rows)
    streams = drawn(1, rows, 4, d)
    mixes = torch.randn(rows, 24 if iterations else 4, generator=generator) * spread * d**0.5
    squares = streams.float().square().sum((0, 2, 3))
    scale = torch.tensor([0.5, 1.5, 1.0] if iterations else [0.5])
    base = torch.randn(mixes.shape[1], generator=generator)
    mixes[0, -4:] = torch.tensor([300.0, -300.0, 0.0, 300.0]) * d**0.5
    arguments = mixes.to(DEVICE), squares, scale.to(DEVICE), base.to(DEVICE), streams
    return arguments, {"norm_eps": 1e-6, "eps": 1e-6, "iterations": iterations}


CASES = [(rows, d, spread, n) for rows, d in ((1, 4096), (37, 1100)) for spread in (0.1, 3.0, 100.0) for n in (20, 0)]


@pytest.mark.parametrize(("rows", "d", "spread", "iterations"), [*CASES, (300, 64, 3.0, 20), (37, 64, 3.0, 1)])
def test_hyper_connection(rows: int, d: int, spread: float, iterations: int) -> None:
    """Against transformers' formulas in fp64; the norm of the streams is applied to their products."""
    arguments, eps = hyper(rows, d, spread, iterations)
    mixes, squares, scale, base, streams = (x.double() for x in arguments)
    mixes = mixes * torch.rsqrt(squares / (4 * d) + 1e-6).unsqueeze(-1)
    pre = torch.sigmoid(mixes[:, :4] * scale[0] + base[:4]) + 1e-6
    results = kernels.hyper_connection(*arguments, **eps)
    wanted = {2: (pre.unsqueeze(-1) * streams).sum(2)}
    if iterations:
        wanted[0] = 2 * torch.sigmoid(mixes[:, 4:8] * scale[1] + base[4:8]).unsqueeze(0)
        comb = (mixes[:, 8:] * scale[2] + base[8:]).view(1, -1, 4, 4).softmax(-1) + 1e-6
        comb = comb / (comb.sum(-2, keepdim=True) + 1e-6)
        for _ in range(iterations - 1):
            comb = comb / (comb.sum(-1, keepdim=True) + 1e-6)
            comb = comb / (comb.sum(-2, keepdim=True) + 1e-6)
        wanted[1] = comb
    for index, expected in wanted.items():
        torch.testing.assert_close(results[index].double(), expected, rtol=2**-8, atol=1e-5)


def test_hyper_connection_without_rows() -> None:
    arguments, eps = hyper(1, 64, 1.0, 20)
    mixes, squares, scale, base, streams = arguments
    results = kernels.hyper_connection(mixes[:0], squares[:0], scale, base, streams[:, :0], **eps)
    assert [tuple(result.shape) for result in results] == [(1, 0, 4), (1, 0, 4, 4), (1, 0, 64)]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="takes 5 GB")
def test_offsets_beyond_32_bits() -> None:
    rows = 2**31 // (4 * 4096) + 3
    (mixes, squares, scale, base, few), eps = hyper(3, 4096, 1.0, 20)
    streams = torch.zeros(1, rows, 4, 4096, dtype=torch.bfloat16, device=DEVICE)
    streams[:, -3:] = few
    filled = [torch.cat([x.new_ones((rows - 3, *x.shape[1:])), x]) for x in (mixes, squares)]
    expected = kernels.hyper_connection(mixes, squares, scale, base, few, **eps)
    for result, want in zip(kernels.hyper_connection(*filled, scale, base, streams, **eps), expected, strict=True):
        assert torch.equal(result[:, -3:], want)
    values, scales = kernels.quantise(streams, 128)
    same_bits((values[:, -3:], scales[:, -3:]), layouts.quantize_e4m3(few, 128))


@pytest.mark.skipif(not interpreting(), reason="the blocks run on the CPU")
@pytest.mark.parametrize("packed", [False, True])
def test_blocks_with_and_without_the_kernels(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole attention blocks, through the windows of both compressors."""
    model = tiny(torch.bfloat16, num_attention_heads=2, index_n_heads=4, index_topk=512)
    hidden = torch.randn(1, 132, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    engine.enable(model)
    results: list[list[Tensor]] = []
    for module in (kernels, None):
        monkeypatch.setattr(fused, "kernels_on", lambda device, module=module: module)
        cache = engine.packed_cache(model) if packed else DynamicCache(config=model.config)
        results.append([])
        for start, stop in ((0, 127), (127, 128), (128, 131), (131, 132)):
            results[-1] += [attend(model.model, layer, hidden[:, start:stop], None, cache) for layer in range(3)]
    for with_kernels, without in zip(*results, strict=True):
        error = (with_kernels.float() - without.float()).norm() / without.float().norm()
        assert float(error) < 0.01
