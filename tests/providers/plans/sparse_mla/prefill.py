"""``sparse_mla_prefill``: a program computes some heads of a query token."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import traffic
from dsv4_backend_triton.launch import Launch
from launches import tile_of
from plans import once
from traffic import Arguments


def covered(call: Arguments, launches: list[Launch]) -> Iterator[bool]:
    (one,) = launches
    rows, heads, _ = call["q"].shape
    high = tile_of(one, "HEADS", "BH", "_HEADS")
    if "n_items" in one.arguments:  # programs that take one item after another
        items, groups = one.arguments["n_items"], one.arguments["GROUPS"]
        yield from (items == rows * groups, 1 <= one.grid[0] <= items, once(groups, high, heads))
        return
    blocks, taken = one.arguments["head_blocks"], one.arguments.get("block_heads", high)
    yield from (one.grid[0] == rows * blocks, once(blocks, taken, heads), taken <= high)


def unusual() -> Iterator[Arguments]:
    """Rows that cannot be read 16 bytes at a time."""
    apart = torch.empty(4096, 1, 516, dtype=torch.bfloat16, device="meta")[..., :512]
    yield from (traffic.prefill(heads, 9, 4096, 640) | {"kv": apart} for heads in (20, 64))


def more_calls() -> Iterator[Arguments]:
    yield from (traffic.prefill(heads, 512, 4096, 640) for heads in (16, 64))
