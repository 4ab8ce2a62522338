"""``fp8_einsum``: a program computes one tile of the result, or one after another."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import traffic
from dsv4_backend_triton.launch import Launch
from launches import tile_of
from plans import variant_of
from traffic import Arguments

from dsv4_backends.contract.models import FLASH


def covered(call: Arguments, launches: list[Launch]) -> Iterator[bool]:
    (one,) = launches
    grid, taken = one.grid, one.arguments
    (b, h, r), d = call["x"].shape, call["w"].shape[1]
    if variant_of(one) in ("wgmma", "wgmma_few"):
        yield r <= 128 * tile_of(one, "SCALES")
    elif variant_of(one) == "mma_sync":
        yield r <= 2**16
    if variant_of(one) == "wgmma_few":
        yield grid == (-(-d // tile_of(one, "OUTPUTS")), -(-b // taken["BLOCK_B"]), h)
    elif variant_of(one) == "wgmma":
        tiles = h * -(-d // (taken["BLOCK_D"] * taken["HALVES"])) * -(-b // (2 * tile_of(one, "TOKENS")))
        yield 1 <= grid[0] <= tiles
    else:
        wide, high = tile_of(one, "BLOCK_D", "OUTPUTS"), tile_of(one, "BLOCK_B", "TOKENS")
        yield grid[0] == h * -(-d // wide) * -(-b // high)


def unusual() -> Iterator[Arguments]:
    """Packed scales, tokens that cannot be read 16 bytes at a time, more groups than a grid's third dimension, and more
    K blocks than there are places for their scales."""
    yield from (traffic.einsum(FLASH.rank(1), tokens, packed=True) for tokens in (7, 32, 300))
    for tokens in (32, 300):
        call = traffic.einsum(FLASH.rank(1), tokens)
        wide = (tokens, call["x"].shape[1], call["x"].shape[2] + 8)
        yield call | {"x": torch.empty(wide, dtype=call["x"].dtype, device="meta")[..., :-8]}
    many = [(1, 20, 64, 128 * 129), (1, 300, 128, 128 * 129), (9, 300, 1024, 2**16 + 128)]
    for h, b, d, r in ((70000, 20, 64, 128), *many):
        x, w = (torch.empty(h, n, r, dtype=torch.float8_e4m3fn, device="meta") for n in (b, d))
        x_scale, w_scale = (torch.empty(*n, r // 128, device="meta") for n in ((b, h), (h, 1)))
        yield {"x": x.transpose(0, 1), "x_scale": x_scale, "w": w, "w_scale": w_scale}


def more_calls() -> Iterator[Arguments]:
    yield from (traffic.einsum(FLASH.rank(1), tokens) for tokens in (16, 32, 200, 600, 4000))
