"""The ops whose kernel, tile or splits follow from the batch, in the mode where they do not.

What serves a row is then what serves it alone: a row's bits are the same in every batch. ``sparse_mla_prefill`` and
``paged_mqa_logits`` are not here, since they are so in any mode.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any

from . import ahead
from .hyper_connection.hc_prenorm_gemm import op as hyper_connection
from .indexer.mqa_logits import op as indexer
from .projection.fp8_einsum import op as projection
from .sparse_mla.decode import op as sparse_mla


def _mode(op: Callable[..., Any], run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` in the mode, with the signature of ``op``."""
    return update_wrapper(partial(run, batch_invariant=True), op)


sparse_mla_decode = _mode(sparse_mla.sparse_mla_decode, sparse_mla.decode)
mqa_logits = _mode(indexer.mqa_logits, indexer.logits)
fp8_einsum = _mode(projection.fp8_einsum, projection.einsum)
hc_prenorm_gemm = _mode(hyper_connection.hc_prenorm_gemm, hyper_connection.prenorm_gemm)

warmup = partial(ahead.warmup, home="batch_invariant")
workspace = partial(ahead.workspace, home="batch_invariant")
