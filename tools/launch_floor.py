"""Time small calls of the Triton kernels next to kernels that only launch, or only make dependent reads.

Takes the rows of ``bench`` whose batch is at most 128. Graph replays alternate between the call and kernels with the
grids and warps of its launches: without a body, and with two or three dependent reads, each of which gets its address
from the one before (position, table, page). ``paged_mqa_logits`` has two more: one that reads and writes as many bytes
as the floor counts, in a row, and one that makes all of the call's loads and stores, without the products. All with a
cold L2 cache.
Usage, on a GPU: python tools/launch_floor.py [--op OP]... [--json FILE]
"""

from __future__ import annotations

import argparse
import functools
import sys
from typing import Any

import torch
import triton
import triton.language as tl
from dsv4_backend_triton.arch import arch_of
from dsv4_backend_triton.indexer.heads import fill
from dsv4_backend_triton.indexer.paged_mqa_logits.schedule import (
    FEW,
    MANY,
    count_places,
    item_of,
    part,
    share,
    tiles_of,
)
from dsv4_backend_triton.launch import Launch, recording
from kept import Floor, FloorRow
from triton.tools.tensor_descriptor import TensorDescriptor

from dsv4_backends import CONTRACTS, OPS, records
from dsv4_backends.bench import inputs, shapes
from dsv4_backends.bench.provenance import provenance
from dsv4_backends.bench.timing import Captured, Timer, rates
from dsv4_backends.contract.models import MODELS
from dsv4_backends.testing import checks

MOST = 128
"""Rows of the batch."""
LINKS = 1 << 22


@triton.jit
def empty(x):
    pass


@triton.jit
def chained(links, out, reads: tl.constexpr):
    """``reads`` reads, each from the address that the one before it returned."""
    program = tl.program_id(0) + tl.program_id(1) * tl.num_programs(0)
    at = program.to(tl.int64)
    for _ in tl.static_range(reads):
        at = tl.load(links + at)
    tl.store(out + program, at)


@triton.jit
def stream(source, out, reads, writes, block: tl.constexpr):
    """Reads words in a row, then writes words in a row."""
    begin, step = tl.program_id(0) * block, tl.num_programs(0) * block
    each = tl.arange(0, block)
    total = tl.zeros((block,), tl.int32)
    for i in range(begin, reads, step):
        total += tl.load(source + i + each, mask=i + each < reads, other=0)
    for i in range(begin, writes, step):
        tl.store(out + i + each, total.to(tl.float32), mask=i + each < writes, cache_modifier=".cs")


@triton.jit
def accesses(
    q_ptr, k_desc, scale_ptr, w_ptr, lens_ptr, table_ptr, out_ptr,  # q, keys and scales in words of 4 bytes
    batch, next_n, max_len, limit,
    page_stride, w_stride, len_stride_b, len_stride_n, table_stride, out_stride,
    rows: tl.constexpr, span: tl.constexpr, scan: tl.constexpr, stages: tl.constexpr, visit: tl.constexpr,
):  # fmt: skip
    """The loads and stores of ``paged_mqa_logits``, shared as there. A sum of a key's words stands for its logits."""
    keys: tl.constexpr = 64
    words: tl.constexpr = 32
    lengths = (lens_ptr, batch, next_n, limit, len_stride_b, len_stride_n)
    lane, row = tl.arange(0, scan), tl.minimum(tl.arange(0, span), rows - 1)
    ends, total = count_places(lane, lengths, rows, keys, scan, visit)
    all_tiles = (max_len + keys - 1) // keys
    item, place, count = share(lane, ends, total, all_tiles, lengths, rows, keys, scan, visit, FILL=False)
    while count > 0:
        b, row0, length = item_of(row, item, lengths, rows)
        first, last, count = part(place, count, tiles_of(tl.max(length, axis=0), keys), visit)
        place = 0
        item += 1
        if first < last:
            page_ptr = table_ptr + b * table_stride
            page_next = tl.load(page_ptr + first)
            at = row0 + tl.arange(0, span)
            row_ok = (at < next_n) & (at < row0 + rows)
            each = tl.arange(0, 64 * words)
            q = tl.load(
                q_ptr + ((b * next_n + at) * (64 * words))[:, None] + each[None, :], mask=row_ok[:, None], other=0
            )
            w_ptrs = w_ptr + ((b * next_n + at) * w_stride)[:, None] + tl.arange(0, 64)[None, :]
            w = tl.sum(tl.load(w_ptrs, mask=row_ok[:, None], other=0.0), axis=1) + tl.sum(q, axis=1)
            for j in tl.range(first, last, num_stages=stages):
                page = page_next
                page_next = tl.load(page_ptr + j + 1, mask=j + 1 < last, other=0)
                key = tl.arange(0, keys)
                scale = tl.load(scale_ptr + page.to(tl.int64) * page_stride + keys * words + key)
                k = tl.sum(tl.reshape(k_desc.load([page, 0, 0]), (keys, words)), axis=1)
                col = j * keys + key
                ptr = out_ptr + ((b * next_n + at) * out_stride)[None, :] + col[:, None]
                mask = row_ok[None, :] & (col < max_len)[:, None]
                tl.store(ptr, (k * scale)[:, None] + w[None, :], mask=mask, cache_modifier=".cs")
    item, place, count = share(lane, ends, total, all_tiles, lengths, rows, keys, scan, visit, FILL=True)
    while count > 0:
        b, row0, length = item_of(row, item, lengths, rows)
        tiles = tiles_of(tl.max(length, axis=0), keys)
        first, last, count = part(place, count, all_tiles - tiles, visit)
        place = 0
        item += 1
        at = row0 + tl.arange(0, span)
        row_ok = (at < next_n) & (at < row0 + rows)
        end = tl.minimum((tiles + last) * keys, max_len)
        fill(out_ptr, b * next_n + at, row_ok, out_stride, (tiles + first) * keys, end, 1024 // span)


def streaming(arguments: dict[str, Any], moved: float, source: torch.Tensor, out: torch.Tensor) -> None:
    """``moved`` bytes, of which the call's result is written."""
    writes = arguments["q"].shape[0] * arguments["q"].shape[1] * arguments["max_context_len"]
    sms = torch.cuda.get_device_properties(source.device).multi_processor_count
    stream[(8 * sms,)](source, out, int(moved) // 4 - writes, writes, block=4096, num_warps=4)


def accessing(arguments: dict[str, Any], waves: int = 4, stages: int = 3) -> torch.Tensor:
    """Only the loads and stores of a call of ``paged_mqa_logits`` of V4's indexer."""
    q, cache, lens, table, w = (arguments[name] for name in ("q", "k_cache", "context_lens", "block_table", "weights"))
    (b, next_n, heads, dim), (pages, keys, *_), stride = q.shape, cache.shape, cache.stride(0) // 4
    assert (heads, dim, keys) == (64, 128, 64)
    out = torch.empty((b * next_n, arguments["max_context_len"]), device=q.device)
    rows = triton.cdiv(next_n, triton.cdiv(next_n, 4))
    words = cache.as_strided((pages * cache.stride(0),), (1,)).view(torch.int32)
    sms = torch.cuda.get_device_properties(q.device).multi_processor_count
    accesses[(waves * sms,)](
        q.view(torch.int32), TensorDescriptor(words, [pages, 64, 32], [stride, 32, 1], [1, 64, 32]),
        *(words.view(torch.float32), w, lens, table, out),
        *(b, next_n, out.shape[1], min(out.shape[1], 64 * table.shape[1]), stride, w.stride(0)),
        *(lens.stride(0), lens.stride(1) if lens.dim() == 2 else 0, table.stride(0), out.stride(0)),
        rows=rows, span=triton.next_power_of_2(rows), scan=FEW if b <= FEW else MANY, stages=stages, visit=2,
        num_warps=4,
    )  # fmt: skip
    return out


def recorded(subject: checks.Subject, arguments: dict[str, Any]) -> list[Launch]:
    """The launches of a call, from tensors without storage."""
    bare = {
        name: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        if isinstance(value, torch.Tensor)
        else value
        for name, value in arguments.items()
    }
    launches: list[Launch] = []
    with recording(launches.append, arch_of(subject.device)):
        subject.run(bare)
    return launches


def hollow(launches: list[Launch], x: torch.Tensor) -> None:
    for launch in launches:
        empty[launch.grid](x, num_warps=launch.options.get("num_warps", 4))


def reading(launches: list[Launch], reads: int, links: torch.Tensor, out: torch.Tensor) -> None:
    """``reads`` dependent reads in the first launch, and one in each that follows, of what that has left."""
    for i, launch in enumerate(launches):
        chained[launch.grid](links, out, 1 if i else reads, num_warps=launch.options.get("num_warps", 4))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", choices=OPS, help="only this op; may be repeated")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    given = parser.parse_args(argv)
    device = torch.device("cuda", 0)
    timer, x = Timer(device), torch.zeros(1, device=device)
    measured = rates(timer)
    links = torch.randperm(LINKS, device=device)
    out = torch.empty_like(links)
    rows = []
    for row in shapes.rows(tuple(MODELS), 1, given.op or OPS):
        arguments = inputs.draw(row, device)
        if len(arguments[CONTRACTS[row.op].batch]) > MOST:
            continue
        subject = checks.subject("triton", row.op, device)
        launches = recorded(subject, arguments)
        calls = {
            "call": Captured(functools.partial(subject.run, arguments), device),
            "empty": Captured(functools.partial(hollow, launches, x), device),
            "two": Captured(functools.partial(reading, launches, 2, links, out), device),
            "three": Captured(functools.partial(reading, launches, 3, links, out), device),
        }
        floor = None
        if row.op == "paged_mqa_logits":
            cost = CONTRACTS[row.op].cost(**arguments)
            words = torch.zeros(int(cost.bytes) // 4, dtype=torch.int32, device=device)
            written = torch.empty(words.shape, device=device)
            calls["stream"] = Captured(functools.partial(streaming, arguments, cost.bytes, words, written), device)
            calls["access"] = Captured(functools.partial(accessing, arguments), device)
            floor = measured.floor_us(cost.flops, cost.bytes, cost.math)
        us = {name: taken.us for name, taken in timer.interleaved(calls).items()}
        rows.append(FloorRow(row.op, row.name, **us, launches=len(launches), floor=floor))
        print(f"{row.op} {row.name}", *(f"{name} {value:.2f}" for name, value in us.items()), sep="  ", flush=True)
    if given.json:
        command = "python tools/launch_floor.py" + "".join(f" --op {op}" for op in given.op or ())
        records.write(Floor(**provenance(command), rows=tuple(rows)), given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
