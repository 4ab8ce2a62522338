"""The ops whose kernel, tile or splits follow from the batch, in the mode where they do not.

What serves a row is then what serves it alone: a row's bits are the same in every batch. ``sparse_mla_prefill`` and
``paged_mqa_logits`` are not here, since they are so in any mode.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any

from . import ahead, decode, einsum, hyper_connection, logits


def _mode(op: Callable[..., Any], run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` in the mode, with the signature of ``op``."""
    return update_wrapper(partial(run, batch_invariant=True), op)


sparse_mla_decode = _mode(decode.sparse_mla_decode, decode._sparse_mla_decode)
mqa_logits = _mode(logits.mqa_logits, logits._mqa_logits)
fp8_einsum = _mode(einsum.fp8_einsum, einsum._fp8_einsum)
hc_prenorm_gemm = _mode(hyper_connection.hc_prenorm_gemm, hyper_connection._hc_prenorm_gemm)

warmup = partial(ahead.warmup, home="batch_invariant")
workspace = partial(ahead.workspace, home="batch_invariant")
