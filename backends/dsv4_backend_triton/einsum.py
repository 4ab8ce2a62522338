"""``fp8_einsum``: "bhr,hdr->bhd" on e4m3 operands with 128-wide block scales along r."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ._arch import Arch, arch_of
from ._launch import launch
from ._numeric import e8m0_to_fp32, fp8_operand, round_to
from ._sizes import cdiv, pow2
from ._variants import variant

# how a scale tensor stores its values
FP32, E8M0, PACKED = 0, 1, 2


@triton.jit
def _scale(ptr, offset, kb, stride_k, KIND: tl.constexpr, mask):
    """Scales of K block ``kb`` at ``ptr + offset``: fp32, an E8M0 byte, or one of four E8M0 bytes of an
    int32."""
    if KIND == 0:
        return tl.load(ptr + offset + kb * stride_k.to(tl.int64), mask=mask, other=0.0)
    elif KIND == 1:
        return e8m0_to_fp32(tl.load(ptr + offset + kb * stride_k.to(tl.int64), mask=mask, other=0))
    else:
        word = tl.load(ptr + offset + (kb // 4) * stride_k.to(tl.int64), mask=mask, other=0)
        return e8m0_to_fp32(word >> ((kb % 4) * 8))


@triton.jit
def _load_tile(
    src,
    h,
    row0,
    kb,
    rows,
    dim,
    stride_h,
    stride_row,
    R,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK: tl.constexpr,
    OPERAND: tl.constexpr,
    N_ROWS,
    CLAMP: tl.constexpr,
):
    """A [BLOCK, 128] tile of e4m3: rows row0.., K block kb of head h. Rows past N_ROWS are zero and not
    fetched, or with CLAMP repeat the last one (no mask: cheaper where such rows are rare). Either is dropped
    at the store."""
    if TMA:
        return tl.reshape(src.load([h, row0, kb * 128]), (BLOCK, 128))
    else:
        k = kb * 128 + dim
        row = rows
        if CLAMP:
            row = tl.minimum(rows, N_ROWS - 1)
        ptr = src + h.to(tl.int64) * stride_h + row.to(tl.int64)[:, None] * stride_row + k[None, :]
        if CLAMP and EVEN_K:
            raw = tl.load(ptr)
        else:
            mask = (k < R)[None, :] if CLAMP else (rows < N_ROWS)[:, None]
            if not CLAMP and not EVEN_K:
                mask = mask & (k < R)[None, :]
            if OPERAND == tl.float8e4nv:
                raw = tl.load(ptr, mask=mask, other=0.0)
            else:
                raw = tl.load(ptr, mask=mask, other=0)
        return fp8_operand(raw, OPERAND)


_SIZES = [
    "B",
    "N",
    "R",
    "x_stride_b",
    "x_stride_h",
    "w_stride_h",
    "w_stride_d",
    "xs_stride_b",
    "xs_stride_h",
    "xs_stride_k",
    "ws_stride_h",
    "ws_stride_d",
    "ws_stride_k",
    "o_stride_s",
    "o_stride_b",
    "o_stride_h",
    "splits",
]


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=["xs_ptr", "ws_ptr"])
def _einsum_kernel(
    x_src,
    w_src,
    xs_ptr,
    ws_ptr,
    out_ptr,
    B,
    N,
    R,
    x_stride_b,
    x_stride_h,
    w_stride_h,
    w_stride_d,
    xs_stride_b,
    xs_stride_h,
    xs_stride_k,
    ws_stride_h,
    ws_stride_d,
    ws_stride_k,
    o_stride_s,
    o_stride_b,
    o_stride_h,
    splits,
    X_KIND: tl.constexpr,
    W_KIND: tl.constexpr,
    W_ROWS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
    SWAP: tl.constexpr,
    TMA: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN_K: tl.constexpr,
    OPERAND: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One block: BLOCK_B tokens x PARTS * BLOCK_D outputs of one head, over one split of K.

    The product of each 128-wide K block is scaled in fp32 and added to the accumulator. SWAP makes outputs
    the M side of the product, so that few tokens waste nothing. PARTS accumulators share the token tile:
    twice the outputs per loaded byte without a scaled copy of the whole accumulator in registers.
    """
    n_tiles = tl.cdiv(N, PARTS * BLOCK_D)
    b_tiles = tl.cdiv(B, BLOCK_B)
    pid = tl.program_id(0)
    d0 = (pid % n_tiles) * (PARTS * BLOCK_D)
    pid = pid // n_tiles
    b0 = (pid % b_tiles) * BLOCK_B
    h = pid // b_tiles
    split = tl.program_id(1)
    if ALIGNED:
        x_stride_b = tl.multiple_of(x_stride_b.to(tl.int64), 16)
        x_stride_h = tl.multiple_of(x_stride_h.to(tl.int64), 16)
        w_stride_h = tl.multiple_of(w_stride_h.to(tl.int64), 16)
        w_stride_d = tl.multiple_of(w_stride_d.to(tl.int64), 16)
        o_stride_s = tl.multiple_of(o_stride_s.to(tl.int64), 8)
        o_stride_b = tl.multiple_of(o_stride_b.to(tl.int64), 8)
        o_stride_h = tl.multiple_of(o_stride_h.to(tl.int64), 8)
        n_out = tl.multiple_of(N.to(tl.int64), 8)
    else:
        n_out = N.to(tl.int64)

    h64 = h.to(tl.int64)
    tokens = b0 + tl.arange(0, BLOCK_B)
    dim = tl.arange(0, 128)
    dd = tl.arange(0, BLOCK_D)
    xs_off = h64 * xs_stride_h + tokens.to(tl.int64) * xs_stride_b
    xs_ok = tokens < B
    n_k = tl.cdiv(R, 128)
    per = tl.cdiv(n_k, splits)
    k_lo = split * per
    k_hi = tl.minimum(k_lo + per, n_k)

    if SWAP:
        acc0 = tl.zeros((BLOCK_D, BLOCK_B), tl.float32)
    else:
        acc0 = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    acc1 = acc0
    for k_step in tl.range(k_lo, k_hi, UNROLL, num_stages=STAGES):
        for u in tl.static_range(UNROLL):
            kb = k_step + u
            xs = _scale(xs_ptr, xs_off, kb, xs_stride_k, X_KIND, xs_ok)
            x = _load_tile(
                x_src,
                h,
                b0,
                kb,
                tokens,
                dim,
                x_stride_h,
                x_stride_b,
                R,
                TMA,
                EVEN_K,
                BLOCK_B,
                OPERAND,
                B,
                False,
            )
            for part in tl.static_range(PARTS):
                base = d0 + part * BLOCK_D
                w = _load_tile(
                    w_src,
                    h,
                    base,
                    kb,
                    base + dd,
                    dim,
                    w_stride_h,
                    w_stride_d,
                    R,
                    TMA,
                    EVEN_K,
                    BLOCK_D,
                    OPERAND,
                    N,
                    True,
                )
                if SWAP:
                    p = tl.dot(w, tl.trans(x), out_dtype=tl.float32)
                else:
                    p = tl.dot(x, tl.trans(w), out_dtype=tl.float32)
                if W_ROWS:
                    out_d = base + dd
                    ws = _scale(
                        ws_ptr,
                        h64 * ws_stride_h + out_d.to(tl.int64) * ws_stride_d,
                        kb,
                        ws_stride_k,
                        W_KIND,
                        out_d < N,
                    )
                    if SWAP:
                        p *= ws[:, None]
                    else:
                        p *= ws[None, :]
                    s = xs
                else:
                    # BLOCK_D divides 128: one scale for the tile
                    ws = _scale(
                        ws_ptr,
                        h64 * ws_stride_h + (base // 128).to(tl.int64) * ws_stride_d,
                        kb,
                        ws_stride_k,
                        W_KIND,
                        base < N,
                    )
                    s = xs * ws
                if SWAP:
                    p *= s[None, :]
                else:
                    p *= s[:, None]
                if part == 0:
                    acc0 += p
                else:
                    acc1 += p

    for part in tl.static_range(PARTS):
        out_d = d0 + part * BLOCK_D + dd
        ptr = out_ptr + split.to(tl.int64) * o_stride_s + h64 * o_stride_h
        if part == 0:
            acc = acc0
        else:
            acc = acc1
        if SWAP:
            acc = tl.trans(acc)
        ptr += tokens.to(tl.int64)[:, None] * o_stride_b + out_d[None, :]
        tl.store(
            ptr, round_to(acc, out_ptr.dtype.element_ty, OPERAND), mask=(tokens < B)[:, None] & (out_d < n_out)[None, :]
        )


_REDUCE_SIZES = ["N", "H", "splits", "p_stride_s", "o_stride_b", "o_stride_h"]


@triton.jit(do_not_specialize=_REDUCE_SIZES, do_not_specialize_on_alignment=["out_ptr"])
def _reduce_kernel(partial_ptr, out_ptr, N, H, splits, p_stride_s, o_stride_b, o_stride_h, BLOCK: tl.constexpr):
    """Sum the split partials [splits, b, h, d] in split order."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = col < N
    ptr = partial_ptr + row * N + col
    acc = tl.zeros((BLOCK,), tl.float32)
    for s in range(splits):
        acc += tl.load(ptr + s * p_stride_s.to(tl.int64), mask=ok, other=0.0)
    out = out_ptr + (row // H) * o_stride_b + (row % H) * o_stride_h + col
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=ok)


@dataclass(frozen=True)
class EinsumConfig:
    """Launch configuration for one token-count class."""

    block_b: int
    block_d: int
    parts: int
    swap: bool
    splits: int
    warps: int
    stages: int
    unroll: int
    tma: bool
    maxnreg: int | None
    provenance: str


@dataclass(frozen=True)
class HopperConfig:
    """Launch configuration of the warp-specialised kernel: tiles of 128 tokens x ``block_d``."""

    block_d: int
    stages: int
    regs: int
    provenance: str


@dataclass(frozen=True)
class FewConfig:
    """Launch configuration of the one for at most ``block_b`` tokens: tiles of those x 64 outputs."""

    block_b: int
    stages: int
    provenance: str


def _hopper_rows(stride_b: int, stride_h: int, b: int, h: int, r: int) -> tuple[int, int, int, int] | None:
    """A 2-D view of [b, h, r]: rows, columns, and each head's row and column offset; None where there is
    none."""
    if stride_b > 0 and stride_h % stride_b == 0 and stride_b >= r:
        return (h - 1) * (stride_h // stride_b) + b, r, stride_h // stride_b, 0
    if (h - 1) * stride_h + r <= min(stride_b, (1 << 31) - 1):
        return b, (h - 1) * stride_h + r, 0, stride_h
    return None


def _launch_hopper(x, xs, w, ws, out, config: HopperConfig | FewConfig, sms: int) -> bool:
    """Launch a warp-specialised kernel if the strides allow its 2-D tensor maps."""
    b, h, r = x.shape
    d = w.shape[1]
    x_view = _hopper_rows(x.stride(0), x.stride(1), b, h, r)
    hopper = variant("einsum_hopper")
    if x_view is None or w.stride(1) < r or w.stride(0) % w.stride(1):
        return False
    if isinstance(config, FewConfig):
        kernel, x_box, scales, block_d = hopper.einsum_few_kernel, config.block_b, max(config.block_b, 32), 64
        grid, most_registers = cdiv(d, 64) * h, 128  # two blocks share a multiprocessor
    else:
        kernel, x_box, scales, block_d = hopper.einsum_hopper_kernel, 64, 128, config.block_d
        grid, most_registers = min(cdiv(d, block_d) * h * cdiv(b, 128), sms), None
    rows, columns, x_row_h, x_col_h = x_view
    w_row_h = w.stride(0) // w.stride(1)
    x_desc = hopper.boxes(x, [rows, columns], [x.stride(0), 1], [x_box, 128], 8)
    w_desc = hopper.boxes(w, [(h - 1) * w_row_h + d, r], [w.stride(1), 1], [block_d, 128], 8)
    xs_b, xs_h, xs_k = xs.stride()
    scale_box = xs_b == 1 and xs_k % 4 == 0 and xs_k >= b and xs_h % xs_k == 0 and xs.data_ptr() % 16 == 0
    xs_desc, xs_row_h = None, 0
    if scale_box:
        xs_row_h = xs_h // xs_k
        xs_desc = hopper.boxes(xs, [(h - 1) * xs_row_h + r // 128, b], [xs_k, 1], [1, scales], 32, swizzle=0)
    launch(
        kernel,
        (grid,),
        x_desc,
        w_desc,
        xs_desc,
        xs,
        ws,
        out,
        b,
        d,
        r // 128,
        h,
        x_row_h,
        x_col_h,
        w_row_h,
        xs_row_h,
        xs_b,
        xs_h,
        xs_k,
        *ws.stride(),
        out.stride(0),
        out.stride(1),
        **_hopper_constants(config, scale_box),
        num_warps=4,
        maxnreg=most_registers,
    )
    return True


def _hopper_constants(config: HopperConfig | FewConfig, scale_box: bool) -> dict[str, Any]:
    if isinstance(config, FewConfig):
        return dict(BLOCK_B=config.block_b, STAGES=config.stages, SCALE_BOX=scale_box)
    return dict(BLOCK_D=config.block_d, STAGES=config.stages, CONSUMER_REGS=config.regs, SCALE_BOX=scale_box)


def _scale_args(scale: torch.Tensor) -> tuple[torch.Tensor, int]:
    if scale.dtype == torch.float32:
        return scale, FP32
    if scale.dtype == torch.int32:
        return scale, PACKED
    return scale.view(torch.uint8), E8M0


def _operand(arch: Arch) -> Any:
    if arch.interpret:
        return tl.float32
    return tl.float8e4nv if arch.native_fp8 else tl.bfloat16


# Keyed by compute capability, then the largest token count of the class.
_H200 = "H200, Triton 3.6.0, torch 2.11, 2026-11-22: the fastest of a sweep"
_H200_FEW = "H200, Triton 3.6.0, torch 2.11, 2026-11-27: the fastest of a sweep over Flash and Pro"
_H100 = "H100, Triton 3.6.0, torch 2.11, 2026-11-25: the fastest of a sweep over Flash and Pro"
_DERIVED = "derived: no measurement; as on SM90 without tensor maps, stages for 99 KiB of shared memory"

_TABLE: dict[Any, list[tuple[int, EinsumConfig]]] = {
    90: [
        (16, EinsumConfig(16, 64, 1, True, 1, 4, 4, 2, False, None, _H200)),
        (32, EinsumConfig(32, 64, 1, True, 1, 4, 3, 2, False, None, _H100)),
        (128, EinsumConfig(128, 64, 1, False, 1, 4, 8, 1, True, None, _H200)),
        (1 << 62, EinsumConfig(64, 128, 1, False, 1, 4, 4, 1, True, None, _H200)),
    ],
    "any": [
        (16, EinsumConfig(16, 64, 1, True, 1, 4, 6, 1, False, None, _DERIVED)),
        (32, EinsumConfig(32, 64, 1, True, 1, 4, 6, 1, False, None, _DERIVED)),
        (256, EinsumConfig(64, 64, 1, False, 1, 4, 3, 1, False, None, _DERIVED)),
        (1 << 62, EinsumConfig(128, 128, 1, False, 1, 8, 3, 1, False, None, _DERIVED)),
    ],
}


# The warp-specialised kernels. So many tokens make the N of a product. Beyond, the wide tile where it gives most
# multiprocessors work, else the narrow one for so many tokens. To redo: tools/sweep.py fp8_einsum.
_FEW_TOKENS = range(17, 65)
_INVARIANT_TOKENS = 128  # that the batch-invariant mode is laid out for
_NARROW_TOKENS = 128
_HOPPER_NARROW = HopperConfig(64, 8, 152, _H200)
_HOPPER_WIDE = HopperConfig(128, 6, 216, _H200)


def _plain_config(arch: Arch, b: int, w_rows: bool) -> EinsumConfig:
    for limit, config in _TABLE.get(arch.cc, _TABLE["any"]):
        if b <= limit:
            # scales per row of w cost registers: half the tile
            halve = w_rows and config.block_b * config.block_d > 8192
            return replace(config, block_d=config.block_d // 2) if halve else config
    raise AssertionError("the last class has no limit")


def _config(arch: Arch, b: int, h: int, d: int, w_rows: bool) -> EinsumConfig | HopperConfig | FewConfig:
    # few tokens: what keeps memory busy is the bytes that a multiprocessor waits for, in one block or in two
    alone = cdiv(d, 64) * h <= arch.sms
    usable = arch.cc == 90 and not arch.interpret and not w_rows and variant("einsum_hopper") is not None
    if usable and b in _FEW_TOKENS:
        return FewConfig(32 if b <= 32 else 64, 6 if alone else 4, _H200_FEW)
    if usable and b > _FEW_TOKENS[-1]:
        if cdiv(d, 128) * cdiv(b, 128) * h > 0.75 * arch.sms:
            return _HOPPER_WIDE
        if b <= _NARROW_TOKENS:
            return _HOPPER_NARROW
    config = _plain_config(arch, b, w_rows)
    return replace(config, stages=6, provenance=_H200_FEW) if arch.cc == 90 and alone and b <= 16 else config


def _constants(
    config: EinsumConfig,
    x_kind: int,
    w_kind: int,
    w_rows: bool,
    tma: bool,
    aligned: bool,
    r: int,
    splits: int,
    operand: Any,
) -> dict[str, Any]:
    return dict(
        X_KIND=x_kind,
        W_KIND=w_kind,
        W_ROWS=w_rows,
        BLOCK_B=config.block_b,
        BLOCK_D=config.block_d,
        PARTS=config.parts,
        SWAP=config.swap,
        TMA=tma,
        ALIGNED=aligned,
        EVEN_K=r % 128 == 0,
        OPERAND=operand,
        STAGES=config.stages,
        UNROLL=config.unroll if cdiv(r, 128) % (splits * config.unroll) == 0 else 1,
    )


def fp8_einsum(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``out[b, h, d] = sum_r x[b, h, r] * w[h, d, r]`` on block-scaled e4m3 operands, bf16 out.

    ``x`` [b, h, r] and ``w`` [h, d, r] e4m3 with r contiguous. ``x_scale`` [b, h, ceil(r/128)] fp32 or e8m0,
    or int32 [b, h, ceil(r/512)] of four packed E8M0; ``w_scale`` likewise [h, ceil(d/128) or d, ...]; any
    strides. Deterministic. Workspace: splits * b * h * d fp32 for classes that split r, else none.
    """
    return _fp8_einsum(x, x_scale, w, w_scale, out)


def _fp8_einsum(x, x_scale, w, w_scale, out=None, config=None, batch_invariant=False):
    b, h, r = x.shape
    d = w.shape[1]
    if out is None:
        out = torch.empty((b, h, d), dtype=torch.bfloat16, device=x.device)
    if b == 0 or h == 0 or d == 0:
        return out
    if r == 0:
        return out.zero_()
    arch = arch_of(x.device)
    operand = _operand(arch)
    w_rows = w_scale.shape[1] == d and d > 1
    if config is None:
        if batch_invariant:
            config = _plain_config(arch, _INVARIANT_TOKENS, w_rows)
        else:
            config = _config(arch, b, h, d, w_rows)
    view = torch.float8_e4m3fn if operand == tl.float8e4nv else torch.uint8
    x, w = x.view(view), w.view(view)
    xs, x_kind = _scale_args(x_scale)
    ws, w_kind = _scale_args(w_scale)
    strides = (x.stride(0), x.stride(1), w.stride(0), w.stride(1))
    keys_aligned = all(s % 16 == 0 for s in strides)
    aligned = keys_aligned and d % 8 == 0 and out.stride(0) % 8 == 0 and out.stride(1) % 8 == 0
    if isinstance(config, HopperConfig | FewConfig):
        plain = x_kind == FP32 and w_kind == FP32 and not w_rows and r % 128 == 0 and aligned
        pointers = (x.data_ptr() | w.data_ptr() | out.data_ptr()) % 16 == 0
        if plain and pointers and _launch_hopper(x, xs, w, ws, out, config, arch.sms):
            return out
        config = _plain_config(arch, b, w_rows)
    tma = config.tma and keys_aligned and x.data_ptr() % 16 == 0 and w.data_ptr() % 16 == 0
    x_src, w_src = x, w
    if tma:
        x_src = TensorDescriptor(
            x, [h, b, r], [max(x.stride(1), 16), max(x.stride(0), 16), 1], [1, config.block_b, 128]
        )
        w_src = TensorDescriptor(
            w, [h, d, r], [max(w.stride(0), 16), max(w.stride(1), 16), 1], [1, config.block_d, 128]
        )
    n_k = cdiv(r, 128)
    splits = min(config.splits, n_k)
    target, o_strides = out, (0, out.stride(0), out.stride(1))
    if splits > 1:
        target = torch.empty((splits, b, h, d), dtype=torch.float32, device=x.device)
        o_strides = (target.stride(0), target.stride(1), target.stride(2))
    tiles = cdiv(d, config.parts * config.block_d) * cdiv(b, config.block_b) * h
    launch(
        _einsum_kernel,
        (tiles, splits),
        x_src,
        w_src,
        xs,
        ws,
        target,
        b,
        d,
        r,
        x.stride(0),
        x.stride(1),
        w.stride(0),
        w.stride(1),
        *xs.stride(),
        *ws.stride(),
        *o_strides,
        splits,
        **_constants(config, x_kind, w_kind, w_rows, tma, aligned, r, splits, operand),
        num_warps=config.warps,
        maxnreg=config.maxnreg,
    )
    if splits > 1:
        block = min(1024, pow2(d, 16))
        launch(
            _reduce_kernel,
            (b * h, cdiv(d, block)),
            target,
            out,
            d,
            h,
            splits,
            target.stride(0),
            out.stride(0),
            out.stride(1),
            BLOCK=block,
            num_warps=4,
        )
    return out
