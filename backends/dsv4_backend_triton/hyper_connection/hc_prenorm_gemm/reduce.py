"""``hc_prenorm_gemm``: the launch of a kernel that cuts k into pieces, and the kernel that sums them."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from ...launch import entry, launch_kernel
from ...lib.sizes import cdiv, pow2
from .op import Call


def launch_splits(
    kernel: Any, call: Call, config: Any, sources: tuple[Any, Any], strides: tuple[int, ...], blocks: int, **others: Any
) -> None:
    """Launch a kernel and, if it makes more partials than the caller asks for, the kernel that sums them.

    Args:
        sources: x and fn, as tensors or tensor maps.
        strides: Their strides, as the kernel takes them.
        blocks: The number of blocks along n.
    """
    _, m, n, k, _, _ = call.shape
    out, sqr_sum, arch, results = call.out, call.sqr_sum, call.shape.arch, call.num_splits or 1
    splits = call.pieces(config)
    per = cdiv(cdiv(k, config.block_k), splits) * config.block_k
    out_strides = (0, *out.stride())[-3:-1]
    sqr_strides = (0, *sqr_sum.stride())[-2:]
    target, target_sqr, o_strides, s_strides = out, sqr_sum, out_strides, sqr_strides
    reduce = splits > results
    if reduce:
        work = torch.empty(splits * m * (n + 1), dtype=torch.float32, device=out.device)
        target, target_sqr, o_strides, s_strides = work, work[splits * m * n :], (m * n, n), (m, 1)
    pdl = reduce and arch.pdl
    grid = (cdiv(m, config.block_m), splits, blocks)
    sizes = (m, n, k, *strides, *o_strides, *s_strides, per)
    launch_kernel(kernel, grid, *sources, target, target_sqr, *sizes, **others, PDL=pdl)
    if reduce:
        group, block = splits // results, 128
        launch_kernel(
            _hc_reduce_kernel, (cdiv(m * n, block) + cdiv(m, block), results),
            *(work, out, sqr_sum, m, n, group, *out_strides, *sqr_strides), BLOCK=block, GROUP=pow2(group),
            ALIGNED=n % 4 == 0, PDL=pdl, num_warps=1, **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip


@triton.jit
def _sum_partials(src, size, dst, width, stride, block, group, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """The sum of ``group`` partials of ``size`` elements, one after the other at ``src``, into rows of ``width`` at
    ``dst``. All are loaded before the first is used."""
    start = block.to(tl.int64) * BLOCK
    each = tl.arange(0, BLOCK)
    at = start + each
    ok = at < size
    values = ()
    for i in tl.static_range(GROUP):
        there = ok & (each < tl.where(i < group, BLOCK, 0))  # the interpreter cannot combine a mask and a scalar by and
        values += (tl.load(src + i * size + at, mask=there, other=0.0),)  # type: ignore[assignment]
    total = values[0]  # type: ignore[misc]
    for i in tl.static_range(1, GROUP):
        total += values[i]
    row0 = start // width
    beyond = (start - row0 * width).to(tl.int32) + each
    tl.store(dst + (row0 + beyond // width) * stride + beyond % width, total, mask=ok)


@entry(triton.jit, "M", any_alignment=["out_ptr", "sqr_ptr"])
def _hc_reduce_kernel(
    part_ptr, out_ptr, sqr_ptr,
    M, N, group,
    o_stride_s, o_stride_m, s_stride_s, s_stride_m,  # in elements
    BLOCK: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Sum each ``group`` of partials, in a fixed order, into one of the results.

    Workspace: [results * group, M, N] mixes, then [results * group, M] sums of squares. ALIGNED: N % 4 == 0.
    """
    block = tl.program_id(0)
    result = tl.program_id(1).to(tl.int64)
    mixes = M.to(tl.int64) * N
    if ALIGNED:
        mixes = tl.multiple_of(mixes, 4)
    blocks = tl.cdiv(mixes, BLOCK).to(tl.int32)
    if PDL:
        gdc_wait()
    if block < blocks:
        src, dst = part_ptr + result * group * mixes, out_ptr + result * o_stride_s
        _sum_partials(src, mixes, dst, N, o_stride_m, block, group, BLOCK, GROUP)
    else:
        part_ptr += tl.num_programs(1).to(tl.int64) * group * mixes
        src, dst = part_ptr + result * group * M, sqr_ptr + result * s_stride_s
        _sum_partials(src, M.to(tl.int64), dst, 1, s_stride_m, block - blocks, group, BLOCK, GROUP)
