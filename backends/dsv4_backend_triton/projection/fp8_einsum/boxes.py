"""What the wgmma kernels of ``fp8_einsum`` share: which calls their tensor maps can describe, and the launch."""

from __future__ import annotations

from typing import Any

from triton.experimental.gluon import language as gl

from ...launch import launch_kernel
from ...lib.boxes import boxes
from .op import FP32, Call

SCALES = gl.constexpr(128)
"""Of 128 outputs at most, in shared memory: one for each K block."""


def _rows(stride_b: int, stride_h: int, b: int, h: int, r: int) -> tuple[int, int, int, int] | None:
    """A 2-D view of [b, h, r]: rows, columns, and each head's row and column offset; None if there is none."""
    if stride_b > 0 and stride_h % stride_b == 0 and stride_b >= r:
        return (h - 1) * (stride_h // stride_b) + b, r, stride_h // stride_b, 0
    if (h - 1) * stride_h + r <= min(stride_b, (1 << 31) - 1):
        return b, (h - 1) * stride_h + r, 0, stride_h
    return None


def takes(call: Call) -> bool:
    """Whether they take a call: fp32 scales, whole K blocks, no more than ``SCALES``, 16-byte boundaries, and operands
    with a 2-D tensor map."""
    x, w, (b, h, r) = call.x, call.w, call.x.shape
    pointers = (x.data_ptr() | w.data_ptr() | call.out.data_ptr()) % 16 == 0
    plain = call.x_kind == FP32 and call.w_kind == FP32 and call.aligned
    whole = r % 128 == 0 and r <= 128 * SCALES.value
    two_dimensional = w.stride(1) >= r and w.stride(0) % w.stride(1) == 0
    return plain and whole and pointers and two_dimensional and _rows(x.stride(0), x.stride(1), b, h, r) is not None


def launch_boxes(
    kernel: Any, grid: tuple[int, ...], call: Call, tokens: int, outputs: int, scales: int, group: int, **others: Any
) -> None:
    """Launch with boxes of so many tokens, outputs and scales, and stages of ``group`` K blocks: of one where they are
    no multiple of it. Scales that are not in boxes occupy registers, so they are for two K blocks at most."""
    x, xs, w, ws, out = call.x, call.xs, call.w, call.ws, call.out
    (b, h, r), d = x.shape, w.shape[1]
    view = _rows(x.stride(0), x.stride(1), b, h, r)
    assert view is not None
    rows, columns, x_row_h, x_col_h = view
    w_row_h = w.stride(0) // w.stride(1)
    xs_b, xs_h, xs_k = xs.stride()
    scale_box = xs_b == 1 and xs_k % 4 == 0 and xs_k >= b and xs_h % xs_k == 0 and xs.data_ptr() % 16 == 0
    if r // 128 % group:
        group = 1
    xs_desc, xs_row_h = None, 0
    if scale_box:
        xs_row_h = xs_h // xs_k
        xs_desc = boxes(xs, [(h - 1) * xs_row_h + r // 128, b], [xs_k, 1], [group, scales], 32, swizzle=0)
    else:
        group = min(group, 2)
    launch_kernel(
        kernel, grid, boxes(x, [rows, columns], [x.stride(0), 1], [tokens, 128], 8),
        boxes(w, [(h - 1) * w_row_h + d, r], [w.stride(1), 1], [outputs, 128], 8), *(xs_desc, xs, ws, out),
        *(b, d, r // 128, h, x_row_h, x_col_h, w_row_h, xs_row_h),
        *(xs_b, xs_h, xs_k, *ws.stride(), out.stride(0), out.stride(1)), GROUP=group, SCALE_BOX=scale_box, **others,
    )  # fmt: skip
