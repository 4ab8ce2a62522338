"""The provider's function for ``sparse_mla_prefill``, and a call as its kernels take it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import variants
from ...arch import Arch, arch_of
from ...lib.sizes import cdiv, common_unit
from ...lib.softmax import LOG2E

# For the portable kernel and the one on mma.sync, which have the same parameters.
ANY_ALIGNMENT = ["sink", "idx", "lengths", "lse", "max_logits"]


class Shape(NamedTuple):
    """All that a plan depends on. ``vectors``: whether rows lie on 16-byte boundaries."""

    arch: Arch
    heads: int
    vectors: bool


class Tile(NamedTuple):
    """The tile of one program."""

    heads: int
    keys: int
    warps: int
    stages: int = 1


class Call(NamedTuple):
    """A call with its results allocated: ``q`` and ``out`` [s_q, h, 512], ``kv`` [s_kv, 512], ``indices`` [s_q, topk].

    ``strides``, in elements: query row, query head, key, output row, output head.
    """

    shape: Shape
    q: Tensor
    kv: Tensor
    indices: Tensor
    sm_scale: float
    sink: Tensor | None
    lengths: Tensor | None
    out: Tensor
    max_logits: Tensor
    lse: Tensor
    strides: tuple[int, ...]

    @staticmethod
    def of(
        arch: Arch, q: Tensor, kv: Tensor, indices: Tensor, sm_scale: float, sink: Tensor | None,
        lengths: Tensor | None, out: Tensor, max_logits: Tensor, lse: Tensor,
    ) -> Call:  # fmt: skip
        """From the op's arguments and results, in the order above."""
        kv = kv if kv.ndim == 2 else kv[:, 0]
        indices = indices if indices.ndim == 2 else indices[:, 0]
        strides = (q.stride(0), q.stride(1), kv.stride(0), out.stride(0), out.stride(1))
        unit = common_unit(*(t.data_ptr() for t in (q, kv, out)), *(2 * stride for stride in strides))
        shape = Shape(arch, q.shape[1], vectors=unit == 16)
        return Call(shape, q, kv, indices, sm_scale, sink, lengths, out, max_logits, lse, strides)

    def arguments(self, tile_heads: int, unit: int) -> tuple[tuple[int], tuple[Any, ...]]:
        """The grid and the arguments of the kernels above, strides in units of so many elements."""
        s_q, heads, _ = self.q.shape
        blocks = cdiv(heads, tile_heads)
        return (s_q * blocks,), (
            *(self.q, self.kv, self.indices),
            self.indices if self.lengths is None else self.lengths,
            self.lse if self.sink is None else self.sink,
            *(self.out, self.max_logits, self.lse),
            *(int(self.sink is not None), int(self.lengths is not None)),
            self.sm_scale * LOG2E.value,
            *(heads, blocks, self.indices.shape[1], self.kv.shape[0]),
            *(stride // unit for stride in self.strides),
            self.indices.stride(0),
        )


def sparse_mla_prefill(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    *,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``dsv4_backends.ops.sparse_mla_prefill``. No workspace."""
    s_q, heads, _ = q.shape
    if out is None:
        out = torch.empty(q.shape, dtype=torch.bfloat16, device=q.device)
    max_logits = torch.empty((s_q, heads), dtype=torch.float32, device=q.device)
    lse = torch.empty_like(max_logits)
    if q.numel():
        arguments = (q, kv, indices, sm_scale, attn_sink, topk_length, out, max_logits, lse)
        variants.run("sparse_mla_prefill", Call.of(arch_of(q.device), *arguments))
    return out, max_logits, lse
