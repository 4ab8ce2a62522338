"""``sparse_mla_decode``: a program computes some heads of a query token, or of one split of its keys."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import traffic
from dsv4_backend_triton.arch import Arch
from dsv4_backend_triton.launch import Launch
from dsv4_backend_triton.sparse_mla.decode.plan import MOST_SPLITS
from plans import variant_of
from plans.sparse_mla import prefill
from traffic import Arguments


def covered(call: Arguments, launches: list[Launch]) -> Iterator[bool]:
    main, *others = launches
    flat = {"q": call["q"].flatten(0, 1)}
    (rows, heads, _), taken = flat["q"].shape, main.arguments
    if variant_of(main) == "staged":  # then it attends as prefill does
        keys = taken["topk1"] + taken["topk2"]
        tiles = sum(-(-taken[f"topk{scope}"] // taken["BN"]) for scope in (1, 2))
        yield from (main.grid == (rows, max(tiles, 1)), others[0].arguments["topk"] == keys)
        yield from prefill.covered(flat, others)
        return
    yield from prefill.covered(flat, [main])
    splits = taken["splits"]
    yield from (main.grid[1] == splits <= MOST_SPLITS, taken["SPLIT"] == (splits > 1) == bool(others))
    even = taken.get("even", 0)  # splits by the lengths
    wide = taken["topk2"] > 1024 or (taken["topk2"] == 1024 and taken["page2"] == 2 and even == 1)
    yield not even or (wide and isinstance(call.get("extra_topk_length"), torch.Tensor))
    for combine in others:  # all partial results of a row fit the registers of one that combines them
        found = combine.arguments
        yield combine.grid == (rows * -(-heads // found.get("BH", 1)),)
        yield found["splits"] == splits <= (2 * found["HALF"] if even else found["BS"])
        yield found.get("even", 0) == even <= found.get("HALF", 0)


def unusual() -> Iterator[Arguments]:
    """Pages that cannot be read 16 bytes at a time."""
    odd = torch.empty(1024, 64 * 584 + 8, dtype=torch.uint8, device="meta")[:, : 64 * 584].view(1024, 64, 1, 584)
    rows = (1, 8, 128)
    yield from (traffic.decode(heads, b, 1, 128, (512, 64)) | {"k_cache": odd} for heads in (20, 64) for b in rows)


def more_calls() -> Iterator[Arguments]:
    yield from (traffic.decode(64, b, 1, 128, (512, 64)) for b in (1, 8, 128))
    yield from (traffic.decode(heads, b, 1, 128, (8192, 2)) for heads in (64, 128) for b in (4, 16, 64))
    yield from (traffic.decode(heads, 8192 // heads, 1, 128, (1024, 2)) for heads in (64, 128))


def workspace(call: Arguments, arch: Arch) -> int:
    """An index's KiB and a little, or the partial results of the splits."""
    q, extra = call["q"], call.get("extra_indices")
    rows, heads = q.shape[0] * q.shape[1], q.shape[2]
    indices = call["indices"].shape[2] + (0 if extra is None else extra.shape[2])
    partials = MOST_SPLITS * rows * heads * (512 + 1) * 4
    return int(max(rows * (indices * 1028 + 4 + 4 * heads), partials))
