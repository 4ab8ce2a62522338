"""``indexer_topk``: the kernels of ``mqa_logits``, then those of ``selection.py``, some rows at a time.

Where no row can have fewer keys than there are columns, the logits are in the full form, which has the faster kernels.
"""

from __future__ import annotations

from torch import Tensor

from ..mqa_logits.op import mqa_logits
from ..selection import Plan, Rows, Shape, in_chunks, planned
from .op import Call


def plan(shape: Shape) -> Plan:
    return planned("indexer_topk", shape)


def launch(call: Call, config: Plan) -> None:
    m, n = call.q.shape[0], call.k.shape[0]
    width = None if call.columns == n else call.columns

    def write(part: slice, logits: Tensor) -> None:
        given = (call.weights[part], call.starts[part], call.ends[part])
        invariant = call.shape.batch_invariant
        mqa_logits(call.q[part], call.k, call.k_scale, *given, max_seqlen_k=width, out=logits, batch_invariant=invariant)

    rows = Rows(call.starts, call.ends, 1, 1, 0, n, width is not None)
    in_chunks(config, m, call.columns, rows, call.topk, call.out, write)
