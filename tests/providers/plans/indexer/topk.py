"""``indexer_topk`` and ``paged_indexer_topk``: logits, maxima, candidates and selection of some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

from dsv4_backend_triton.arch import Arch
from dsv4_backend_triton.launch import Launch
from traffic import Arguments


def covered(call: Arguments, launches: list[Launch]) -> Iterator[bool]:
    names = ["_maxima_kernel", "_candidates_kernel", "_select_kernel"]
    selects = launches[3::4]
    yield sum(one.grid[0] for one in selects) == call["q"].shape[:-2].numel()
    for first in range(0, len(launches), 4):
        maxima, candidates, select = own = launches[first + 1 : first + 4]
        yield [one.kernel.__name__ for one in own] == names
        yield maxima.grid == candidates.grid == (*select.grid, select.arguments["splits"])
        tile, groups, keep = (candidates.arguments[name] for name in ("TILE", "GROUPS", "KEEP"))
        yield tile * maxima.grid[1] == groups >= 2 * call["topk"] <= keep
        yield all(one.arguments["KEEP"] == keep for one in own)


def workspace(call: Arguments, arch: Arch) -> int:
    """The logits of some rows, whatever the number of rows and keys."""
    return 256 * 2**20
