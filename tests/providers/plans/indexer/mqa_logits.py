"""``mqa_logits``: a program computes one tile of the logits, or one after another."""

from __future__ import annotations

from collections.abc import Iterator

import traffic
from dsv4_backend_triton.launch import Launch
from launches import tile_of
from plans import once
from traffic import Arguments, Limits

from dsv4_backends.contract.models import FLASH


def covered(call: Arguments, launches: list[Launch]) -> Iterator[bool]:
    (one,) = launches
    grid, taken = one.grid, one.arguments
    if "each" in taken:  # wgmma: tiles of 128 columns, dealt in the order of blocks of 4 rows
        tiles, each, everything = taken["tiles"], taken["each"], taken["all_tiles"]
        yield from (tiles * 128 >= taken["columns"], everything == -(-len(call["q"]) // 4) * tiles)
        yield from (once(grid[0], each, everything), tiles * 128 < 2**31)
        return
    high, wide = tile_of(one, "ROWS"), tile_of(one, "BLOCK_N", "KEYS")
    if "rest" in taken:  # mma_sync: chunks of tiles that become shorter
        tiles, sizes = -(-taken["n_cols"] // wide), []
        while (left := tiles - sum(sizes)) > 0:
            size = max(-(-(left - left // taken["rest"]) // taken["wave"]), taken["least"])
            sizes += [size] * min(taken["wave"], -(-left // size))
        yield from (once(grid[0], high, len(call["q"])), grid[1] == len(sizes) < 2**16)
        yield from (sizes == sorted(sizes, reverse=True), tiles * wide < 2**31)
        return
    chunk = taken["chunk"]
    yield chunk % wide == 0
    if len(grid) == 2:
        yield from (once(grid[0], high, len(call["q"])), once(grid[1], chunk, taken["n_cols"]))
    else:
        yield 1 <= grid[0] <= -(-len(call["q"]) // high) * -(-taken["n"] // chunk)


def more_calls() -> Iterator[Arguments]:
    yield from list(traffic.calls("mqa_logits", FLASH.rank(1), Limits(max_tokens=64, max_context=2000)))[-4:]
    yield traffic.mqa(FLASH.rank(1), 4, 700) | {"max_seqlen_k": 2**31 - 1}
