"""``paged_indexer_topk``: the kernel of ``paged_mqa_logits``, then those of ``selection.py``, some requests at a time."""

from __future__ import annotations

from torch import Tensor

from ..paged_mqa_logits.op import paged_mqa_logits
from ..selection import Plan, Rows, Shape, in_chunks, planned
from .op import Call


def plan(shape: Shape) -> Plan:
    return planned("paged_indexer_topk", shape)


def launch(call: Call, config: Plan) -> None:
    b, next_n = call.q.shape[:2]

    def write(part: slice, logits: Tensor) -> None:
        given = (call.weights[part.start * next_n : part.stop * next_n], call.lens[part], call.table[part])
        paged_mqa_logits(call.q[part], call.k_cache, *given, call.columns, out=logits)

    lens = call.lens
    strides = (lens.stride(0), lens.stride(1) if lens.dim() == 2 else 0)
    rows = Rows(None, lens, next_n, *strides, call.columns, compressed=True)
    in_chunks(config, b, call.columns, rows, call.topk, call.out, write)
