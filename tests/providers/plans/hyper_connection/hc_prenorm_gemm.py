"""``hc_prenorm_gemm``: a program computes one tile of the products, over all columns of x or a piece of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import traffic
from dsv4_backend_triton.arch import Arch
from dsv4_backend_triton.launch import Launch
from launches import tile_of
from plans import once
from traffic import Arguments


def covered(call: Arguments, launches: list[Launch]) -> Iterator[bool]:
    main, *others = launches
    grid, taken = main.grid, main.arguments
    (m, k), n, results = call["x"].shape, len(call["fn"]), call.get("num_splits") or 1
    pieces, step = grid[1], tile_of(main, "BLOCK_K", "STEP")
    yield once(grid[0], tile_of(main, "BLOCK_M", "ROWS"), m)
    yield once(grid[2], tile_of(main, "BLOCK_N", "MIXES"), n)
    yield from (pieces * taken["per"] >= k, taken["per"] % step == 0, bool(others) == (pieces > results))
    for reduce in others:
        yield reduce.arguments["group"] * results == pieces
        yield reduce.arguments["group"] <= reduce.arguments["GROUP"]


def unusual() -> Iterator[Arguments]:
    """Sizes beside the tiles, and rows that cannot be read 16 bytes at a time."""
    for m, n, k, stride in ((200, 33, 1024, 0), (200, 24, 96, 0), (8192, 24, 1024, 1028)):
        x = torch.empty_strided((m, k), (stride or k, 1), dtype=torch.bfloat16, device="meta")
        yield {"x": x, "fn": torch.empty(n, k, device="meta"), "num_splits": 4}


def more_calls() -> Iterator[Arguments]:
    yield from (traffic.prenorm(m, 4096, 24) for m in (8, 200, 8192))


def workspace(call: Arguments, arch: Arch) -> int:
    """As many partial results as keep the machine busy, whatever the batch."""
    two_blocks = 2 * 128 * (24 + 1) * 4  # of mma_sync's rows, for each multiprocessor
    return 2 << 20 if arch.wgmma else two_blocks * arch.sms
