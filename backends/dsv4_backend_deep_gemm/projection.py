"""``fp8_einsum`` by DeepGEMM's function of this name."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_backends.contract import layouts
from dsv4_backends.provider import Reason, elsewhere, on_its_device

from ._alignment import ALIGNMENT, aligned
from ._device import library_for, refuses_device

_EXPRESSION = "bhr,hdr->bhd"
_BLOCK = 128
_TOKENS = 4
"""The alignment of scales, whose tokens are contiguous: 16 bytes."""
_BLOCKWISE = (1, 128, 128)
_ROWWISE = (1, 1, 128)


def _blackwell(x: Tensor) -> bool:
    """Whether the library converts scales to exponents for the tensor cores. Not run on hardware."""
    if x.is_cuda:
        return torch.cuda.get_device_capability(x.device)[0] >= 10
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 10


def fp8_einsum_refuses(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, *, out: Tensor | None = None
) -> Reason | None:
    """Widths that are not multiples of a block, and scales that the architecture's kernels do not support."""
    if (reason := refuses_device(x)) is not None:
        return reason
    r, d = x.shape[2], w.shape[1]
    if r % _BLOCK or d % _BLOCK:
        return Reason("shape", f"needs r and d to be multiples of 128, this call has {r} and {d}")
    rowwise = w_scale.shape[1] != d // _BLOCK
    if not _blackwell(x):
        return Reason("shape", "needs a scale for each 128 rows of w, this call has one for each") if rowwise else None
    if torch.float32 in (x_scale.dtype, w_scale.dtype):
        # The library would keep only their exponents.
        return Reason("shape", "needs power-of-two scales on this GPU: e8m0, or packed in int32; these are float32")
    if rowwise and not x_scale.dtype == w_scale.dtype == torch.int32:
        return Reason("shape", "needs scales packed in int32 where each row of w has its own")
    return None


def _fp32(scale: Tensor, blocks: int) -> Tensor:
    """A scale of the contract as fp32, one for each block. Exact, also for code 0 (2^-127) and 255 (NaN)."""
    if scale.dtype == torch.int32:
        codes = layouts.e8m0_unpack(scale.contiguous())[..., :blocks]
        return layouts.e8m0_decode(codes)
    return scale.float()


def _tokens_contiguous(scale: Tensor) -> Tensor:
    """``[b, h, blocks]`` with b contiguous and padded, as engines write it: the library uses this without a copy."""
    b, h, blocks = scale.shape
    padded = b + -b % _TOKENS
    if scale.stride() == (1, blocks * padded, padded):
        return scale
    wide = torch.empty((h, blocks, padded), dtype=scale.dtype, device=scale.device)[..., :b].permute(2, 0, 1)
    return wide.copy_(scale)


def fp8_einsum(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, *, out: Tensor | None = None) -> Tensor:
    """See ``dsv4_backends.contract.projection``."""
    if elsewhere(x):
        with on_its_device(x):
            return fp8_einsum(x, x_scale, w, w_scale, out=out)
    b, h, r = x.shape
    d = w.shape[1]
    wanted = x.new_empty((b, h, d), dtype=torch.bfloat16) if out is None else out
    blocks, padded = r // _BLOCK, b + -b % _TOKENS
    (xb, xh, _), (wh, wd, _), (ob, oh, _) = x.stride(), w.stride(), wanted.stride()
    if (  # the library copies no argument; addresses and strides in bytes
        not (x.data_ptr() | w.data_ptr() | wanted.data_ptr() | xb | xh | wh | wd | 2 * ob | 2 * oh) % ALIGNMENT
        and x_scale.dtype is torch.float32
        and w_scale.dtype is torch.float32
        and w_scale.shape[1] == d // _BLOCK
        and w_scale.is_contiguous()
        and x_scale.stride() == (1, blocks * padded, padded)
        and b > 0
        and r > 0
    ):
        library_for(x).einsum(_EXPRESSION, (x, x_scale), (w, w_scale), wanted, None, _BLOCKWISE)
        return wanted
    if b == 0 or r == 0:
        return wanted.zero_()
    if w_scale.shape[1] == d // _BLOCK:
        recipe = _BLOCKWISE
        sfa = _tokens_contiguous(_fp32(x_scale, r // _BLOCK))
        sfb = _fp32(w_scale, r // _BLOCK).contiguous()
    else:  # packed, on Blackwell
        recipe = _ROWWISE
        sfa = _tokens_contiguous(x_scale)
        # Rows of a group contiguous and padded, like the tokens.
        sfb = _tokens_contiguous(w_scale.transpose(0, 1)).transpose(0, 1)
    # The kernel stores with the tensor memory accelerator.
    direct = all(stride % 8 == 0 for stride in wanted.stride()[:2]) and wanted.data_ptr() % ALIGNMENT == 0
    target = wanted if direct else torch.empty((b, h, d), dtype=torch.bfloat16, device=x.device)
    library_for(x).einsum(_EXPRESSION, (aligned(x), sfa), (aligned(w), sfb), target, None, recipe)
    return wanted if direct else wanted.copy_(target)
