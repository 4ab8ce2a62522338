"""What DeepGEMM leaves undefined becomes -inf, and compressed rows go to their places, in one pass."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


# One compiled variant for each set of flags, whatever the sizes.
@triton.jit(do_not_specialize=["width", "row_stride", "source_stride", "rows_per_length"])
def _finish_kernel(
    target,
    source,
    starts,
    ends,
    width,
    row_stride,
    source_stride,
    rows_per_length,
    STARTS: tl.constexpr,
    SHIFTED: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    last = tl.load(ends + row // rows_per_length)
    first = 0
    if STARTS:
        start = tl.load(starts + row // rows_per_length)
        first = start if SHIFTED else first
        last = last if SHIFTED else last - start
    inside = (column >= first) & (column < last)
    here = column < width
    if COPIES:
        values = tl.load(source + row * source_stride + (column - first), mask=inside & here, other=float("-inf"))
        tl.store(target + row * row_stride + column, values, mask=here)
    else:
        # Nothing inside is read or written.
        tl.store(target + row * row_stride + column, float("-inf"), mask=here & (inside == 0))


def finish(
    logits: Tensor, starts: Tensor | None, ends: Tensor, width: int, *, shifted: bool = False, out: Tensor | None
) -> Tensor:
    """Logits as the contract wants them.

    Args:
        logits: fp32 ``[m, width]``. Column j of row i is key ``starts[i] + j``, and undefined where that is
            not below ``ends[i]``. Without ``out`` and shift it is changed in place.
        starts, ends: int32, one for each row or for each group of as many rows; ``0 <= starts <= ends`` where there are
            starts. Without them they are 0, and ends may be any numbers.
        width: Columns of the result.
        shifted: Key n belongs in column n of the result; otherwise columns stay.
        out: fp32 ``[m, width]`` to write to.
    """
    rows = logits.shape[0]
    copies = shifted or out is not None
    if out is None:
        target = torch.empty((rows, width), dtype=logits.dtype, device=logits.device) if shifted else logits
    else:
        target = out
    if rows == 0 or width == 0:
        return target
    group = rows // ends.shape[0]
    if logits.is_cuda or _INTERPRETED:
        grid = (rows, -(-width // _BLOCK))
        strides = target.stride(0), logits.stride(0)
        begin = ends if starts is None else starts
        flags = {"STARTS": starts is not None, "SHIFTED": shifted, "COPIES": copies}
        _finish_kernel[grid](target, logits, begin, ends, width, *strides, group, **flags, BLOCK=_BLOCK)
        return target
    start = torch.zeros_like(ends) if starts is None else starts
    first, last = (bound.repeat_interleave(group).unsqueeze(1) for bound in (start, ends))
    column = torch.arange(width, device=logits.device)
    if shifted:
        moved = logits.gather(1, (column - first).clamp(0, logits.shape[1] - 1))
        return target.copy_(moved.where((column >= first) & (column < last), -torch.inf))
    return target.copy_(logits.where(column < last - first, -torch.inf))
