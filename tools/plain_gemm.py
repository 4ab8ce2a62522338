"""Time ``fp8_einsum`` and ``mqa_logits`` next to a plain bf16 GEMM in Triton under the same instructions.

    TRITON_OVERRIDE_ARCH=sm80 DSV4_BACKENDS_DEVICE=sm_80 python tools/plain_gemm.py [--json FILE]

What an A100 cannot do without is the product in bf16 or fp16: the GEMM, on bf16 operands, is what is left without the
decoding of e4m3, the scales and the reduction over heads. It has the shape of each ``fp8_einsum``, and the best of
several launch configurations counts. ``mqa_logits`` is compared with the fastest of these GEMMs by TFLOP/s.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import triton.language as tl
from kept import PlainGemm, PlainGemmRow
from torch import Tensor

from dsv4_backends import records
from dsv4_backends.bench import inputs, run, shapes, timing
from dsv4_backends.bench.provenance import provenance
from dsv4_backends.contract import CONTRACTS
from dsv4_backends.testing import checks

COMMAND = "TRITON_OVERRIDE_ARCH=sm80 DSV4_BACKENDS_DEVICE=sm_80 python tools/plain_gemm.py"
FEWEST = 512
"""Tokens from which the tensor cores bound both ops."""
SAMPLES = 21
CONFIGURATIONS = (
    (128, 128, 32, 4, 4), (128, 128, 32, 4, 5), (128, 128, 64, 4, 3), (128, 128, 64, 4, 4), (128, 128, 64, 8, 3),
    (128, 256, 32, 8, 3), (128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (256, 128, 32, 8, 4), (64, 256, 32, 4, 4),
)  # fmt: skip
"""Tokens, outputs and K of a tile; warps; stages."""


@triton.jit
def gemm_kernel(
    x_ptr, w_ptr, out_ptr, B, N, K, x_stride_b, x_stride_h, w_stride_h, w_stride_n, o_stride_b, o_stride_h,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    n_tiles, b_tiles = tl.cdiv(N, BLOCK_N), tl.cdiv(B, BLOCK_B)
    index = tl.program_id(0)
    n0 = (index % n_tiles) * BLOCK_N
    index = index // n_tiles
    b0 = (index % b_tiles) * BLOCK_B
    h = index // b_tiles
    rows, cols, inner = b0 + tl.arange(0, BLOCK_B), n0 + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    x = x_ptr + h * x_stride_h + tl.minimum(rows, B - 1)[:, None] * x_stride_b + inner[None, :]
    w = w_ptr + h * w_stride_h + tl.minimum(cols, N - 1)[:, None] * w_stride_n + inner[None, :]
    acc = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        acc = tl.dot(tl.load(x + k), tl.trans(tl.load(w + k)), acc)
    out = out_ptr + h * o_stride_h + rows[:, None] * o_stride_b + cols[None, :]
    tl.store(out, acc.to(tl.bfloat16), mask=(rows < B)[:, None] & (cols < N)[None, :])


def gemm(x: Tensor, w: Tensor, out: Tensor, configuration: tuple[int, ...]) -> tuple[Tensor]:
    """``out[h, b, n] = x[h, b, k] @ w[h, n, k]``."""
    block_b, block_n, block_k, warps, stages = configuration
    h, b, k = x.shape
    n = w.shape[1]
    grid = (triton.cdiv(b, block_b) * triton.cdiv(n, block_n) * h,)
    strides = (x.stride(1), x.stride(0), w.stride(0), w.stride(1), out.stride(1), out.stride(0))
    tile = {"BLOCK_B": block_b, "BLOCK_N": block_n, "BLOCK_K": block_k, "STAGES": stages}
    gemm_kernel[grid](x, w, out, b, n, k, *strides, **tile, num_warps=warps)
    return (out,)


def close(got: Tensor, want: Tensor) -> bool:
    """Within two roundings to bf16 of the largest."""
    return bool((got.float() - want.float()).abs().max() <= want.abs().max().float() * 2**-7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if os.environ.get("TRITON_OVERRIDE_ARCH") != "sm80":
        parser.error(f"without TRITON_OVERRIDE_ARCH=sm80 the GEMM has this GPU's own instructions; run {COMMAND}")
    device = torch.device("cuda")
    timer = timing.Timer(device, SAMPLES)
    rows: list[PlainGemmRow] = []
    fastest = 0.0
    for row in shapes.rows((), 1, ("fp8_einsum", "mqa_logits")):
        if row.params.get("b", row.params.get("m")) < FEWEST:
            continue
        made = inputs.draw(row, device)
        judge, cost = run.Judge(row.op, made), CONTRACTS[row.op].cost(**made)
        wanted: dict[str, Callable[[], object]] = {
            "triton": functools.partial(checks.subject("triton", row.op, device).run, made)
        }
        if row.op == "fp8_einsum":
            x, w = made["x"].transpose(0, 1).to(torch.bfloat16), made["w"].to(torch.bfloat16)
            out = torch.empty((*x.shape[:2], w.shape[1]), dtype=torch.bfloat16, device=device)
            for each in CONFIGURATIONS:
                wanted[str(each)] = functools.partial(gemm, x, w, out, each)
        calls = {name: timing.Captured(call, device) for name, call in wanted.items()}
        if wrong := judge(calls["triton"]):
            raise SystemExit(f"{row.op} {row.name}: {wrong}")
        for name in calls.keys() - {"triton"}:
            out.zero_()
            calls[name].replay()
            if not close(out, x @ w.transpose(1, 2)):
                raise SystemExit(f"{row.name}: the GEMM of {name} is wrong")
        us = {name: taken.us for name, taken in timer.interleaved(calls).items()}
        ours = us.pop("triton")
        plain = cost.flops / min(us.values()) / 1e6 if us else 0.0
        fastest = max(fastest, plain)
        rows.append(PlainGemmRow(row.op, row.name, ours, cost.flops / ours / 1e6, plain or fastest))
        done = rows[-1]
        print(f"{row.op:12} {row.name:60} {ours:9.1f} us {done.tflops:6.0f} of {done.plain:4.0f} TFLOP/s", flush=True)
        if args.json:
            records.write(PlainGemm(**provenance(COMMAND), rows=tuple(rows)), args.json)
        del made, judge, wanted, calls
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
