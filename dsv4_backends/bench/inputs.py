"""Draw a row's arguments on the device that is timed: random, valid, and in the layouts that an engine keeps.

The contracts' own cases are drawn on the CPU, so that they are the same on every machine; caches of gigabytes would
take minutes there. Here the seed is fixed but the values differ between kinds of device.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..contract.settings import without_autocast
from ..runtime.serving import WINDOW_PAGE as PAGE
from ..runtime.serving import round_up
from .shapes import SCALES, Row

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PIECE = 1 << 17
"""Tokens that are quantised at a time: half a GiB of temporaries."""


def draw(row: Row, device: torch.device) -> dict[str, Any]:
    """The arguments of a row's call on ``device``."""
    import torch

    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{row.op}/{row.name}".encode()))
    with without_autocast():
        return _DRAW[row.op](_Draw(generator, device), **row.params)


class _Draw:
    """Random tensors on one device."""

    def __init__(self, generator: torch.Generator, device: torch.device) -> None:
        self.generator, self.device = generator, device

    def normal(self, *shape: int, dtype: str = "float32", scale: float = 1.0) -> Tensor:
        import torch

        drawn = torch.empty(shape, dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32, device=self.device)
        return drawn.normal_(0, scale, generator=self.generator).to(getattr(torch, dtype))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        import torch

        return torch.randint(low, high, shape, generator=self.generator, device=self.device)

    def powers(self, *shape: int) -> Tensor:
        return 2.0 ** self.integers(-3, 4, *shape).float()

    def pages(self, count: int, each: int) -> Tensor:
        """A table ``[count, each]`` that deals out shuffled pages."""
        import torch

        return torch.randperm(count * each, generator=self.generator, device=self.device).view(count, each)


def _range(stop: int, like: Tensor) -> Tensor:
    import torch

    return torch.arange(stop, device=like.device)


def _prefill(draw: _Draw, *, s_q: int, h_q: int, window: int, selected: int, compressed: int) -> dict[str, Any]:
    """A chunk of ``s_q`` tokens. Keys: the compressed ones of the context, the window before the chunk, its own."""
    import torch

    kv = draw.normal(compressed + window + s_q, 512, dtype="bfloat16")
    near = compressed + 1 + _range(s_q, kv).unsqueeze(1) + _range(window, kv)
    far = draw.integers(0, max(compressed, 1), s_q, selected)
    return {
        "q": draw.normal(s_q, h_q, 512, dtype="bfloat16"),
        "kv": kv,
        "indices": torch.cat([near, far], 1).int(),
        "sm_scale": 512**-0.5,
        "attn_sink": draw.normal(h_q),
    }


def _kv_cache(draw: _Draw, pages: int) -> Tensor:
    import torch

    from ..contract import layouts

    stride = round_up(PAGE * layouts.KV_BYTES, layouts.PAGE_ALIGNMENT)
    raw = torch.zeros((pages, stride), dtype=torch.uint8, device=draw.device)
    cache = raw.as_strided((pages, PAGE, layouts.KV_BYTES), (stride, layouts.KV_BYTES, 1))
    for slots in torch.arange(pages * PAGE, device=draw.device).split(PIECE):
        layouts.write_kv(cache, slots, draw.normal(len(slots), 512, dtype="bfloat16"))
    return cache


def _decode(draw: _Draw, *, b: int, s_q: int, h_q: int, window: int, selected: int, compressed: int) -> dict[str, Any]:
    """A batch in which every request has its own window of pages and its own compressed keys, all lengths full."""
    import torch

    def slots(table: Tensor, keys: Tensor) -> Tensor:
        """The slots of ``keys [b, s_q, n]``, by number within a request."""
        return (table.gather(1, (keys // PAGE).flatten(1)).view(keys.shape) * PAGE + keys % PAGE).int()

    pages = -(-(window + s_q + PAGE) // PAGE)
    near_table = draw.pages(b, pages)
    first = draw.integers(0, PAGE, b, 1, 1)
    near = first + _range(s_q, first).view(1, s_q, 1) + _range(window, first)
    far_table = draw.pages(b, -(-compressed // PAGE))
    far = draw.integers(0, compressed, b, s_q, selected)

    def full(length: int) -> Tensor:
        return torch.full((b,), length, dtype=torch.int32, device=draw.device)

    return {
        "q": draw.normal(b, s_q, h_q, 512, dtype="bfloat16"),
        "k_cache": _kv_cache(draw, near_table.numel()),
        "indices": slots(near_table, near),
        "sm_scale": 512**-0.5,
        "attn_sink": draw.normal(h_q),
        "topk_length": full(window),
        "extra_k_cache": _kv_cache(draw, far_table.numel()),
        "extra_indices": slots(far_table, far),
        "extra_topk_length": full(selected),
    }


def _mqa(draw: _Draw, *, m: int, n: int, h: int, d: int) -> dict[str, Any]:
    """A chunk at the end of its context: a key stands for four tokens, and the last query sees them all."""
    import torch

    k = draw.normal(n, d, dtype="float8_e4m3fn")
    ends = n - (m - 1 - _range(m, k)) // 4
    return {
        "q": draw.normal(m, h, d, dtype="float8_e4m3fn"),
        "k": k,
        "k_scale": draw.powers(n),
        "weights": draw.normal(m, h, scale=h**-0.5),
        "row_starts": torch.zeros(m, dtype=torch.int32, device=draw.device),
        "row_ends": ends.int(),
    }


def _paged(draw: _Draw, *, b: int, keys: int, h: int, d: int) -> dict[str, Any]:
    """One token of each request, all contexts full."""
    import torch

    from ..contract import layouts

    table = draw.pages(b, -(-keys // PAGE))
    stride = round_up(PAGE * (d + layouts.INDEXER_SCALE_BYTES), layouts.PAGE_ALIGNMENT)
    raw = torch.zeros((table.numel(), stride), dtype=torch.uint8, device=draw.device)
    cache = raw.as_strided((table.numel(), PAGE, d + 4), (stride, d + 4, 1))
    for slots in torch.arange(table.numel() * PAGE, device=draw.device).split(4 * PIECE):
        layouts.write_indexer_keys(cache, slots, draw.normal(len(slots), d))
    return {
        "q": draw.normal(b, 1, h, d, dtype="float8_e4m3fn"),
        "k_cache": cache,
        "weights": draw.normal(b, h, scale=h**-0.5),
        "context_lens": torch.full((b, 1), keys, dtype=torch.int32, device=draw.device),
        "block_table": table.int(),
        "max_context_len": keys,
    }


def _einsum(draw: _Draw, *, b: int, h: int, r: int, d: int, scales: str = SCALES[0]) -> dict[str, Any]:
    """Values group-major, as vLLM's quantiser makes them; scales in fp32."""
    import torch

    blocks = -(-r // 128)
    x = draw.normal(h, b, r, dtype="float8_e4m3fn").transpose(0, 1)
    x_scale = draw.powers(h, blocks, round_up(b, 4))[..., :b].permute(2, 0, 1)
    if scales != SCALES[0]:
        x_scale = x_scale.contiguous()
    # A group at a time: the fp32 draw of all weights is four times their size.
    w = torch.empty((h, d, r), dtype=torch.float8_e4m3fn, device=draw.device)
    for group in w:
        group.copy_(draw.normal(d, r))
    return {"x": x, "x_scale": x_scale, "w": w, "w_scale": draw.powers(h, -(-d // 128), blocks)}


def _hyper_connection(draw: _Draw, *, m: int, k: int, n: int, num_splits: int) -> dict[str, Any]:
    return {
        "x": draw.normal(m, k, dtype="bfloat16"),
        "fn": draw.normal(n, k, scale=k**-0.5),
        "num_splits": num_splits,
    }


_DRAW: dict[str, Callable[..., dict[str, Any]]] = {
    "sparse_mla_prefill": _prefill,
    "sparse_mla_decode": _decode,
    "mqa_logits": _mqa,
    "paged_mqa_logits": _paged,
    "fp8_einsum": _einsum,
    "hc_prenorm_gemm": _hyper_connection,
}
