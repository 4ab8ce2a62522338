"""Hugging Face transformers' DeepSeek V4 on the ops: ``enable(model)``, ``disable(model)``, ``packed_cache(model)``.

transformers runs attention eagerly: a dense mask over every key, and every key copied for every head. Here the
attention gets lists of keys instead. A query sees its window and, in a compressing layer, the compressed keys that the
indexer selects or that causality allows. Its row of the list names these keys: compressed ones first, then window keys,
valid entries before invalid ones. Nothing of the size [queries, keys] is allocated: long calls are cut into chunks of
rows.

The attention is registered in transformers' ``AttentionInterface`` and ``AttentionMaskInterface`` under the name
``dsv4_backends``. The parts without a registry (the compressors with the indexer, the hyper-connections, the grouped
output projection) get a ``forward`` on the instance, which ``disable`` removes.

A decode step is bound by the host, which launches thousands of small kernels. So what all layers of a call share is
computed once, and chains of small steps are one kernel each (``kernels.py``).

bf16 tensors go through ``dsv4_backends.ops``. A float32 model runs the same lists through plain torch (``exact.py``):
the ops take bf16, and the tests compare the lists with transformers' eager model in float32.

The source text of everything that is replaced is compared with a known version. Another text is refused.
"""

from __future__ import annotations

from .model import NAME, Part, disable, enable, packed_cache, register
from .refusals import EngineError
from .targets import ENGINE

__all__ = ["ENGINE", "NAME", "EngineError", "Part", "disable", "enable", "packed_cache", "register"]
