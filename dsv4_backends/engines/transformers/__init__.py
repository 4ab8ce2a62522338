"""Hugging Face transformers' DeepSeek V4 on the ops: ``enable(model)``, ``disable(model)``, ``packed_cache(model)``.

transformers attends eagerly: a dense mask over every key, and every key copied for every head. Here the attention gets
lists of keys instead. A query sees its window and, in a compressing layer, the compressed keys that the indexer or
causality leaves it; its row of the list names them, compressed ones first, all valid ones together. Nothing of the
size [queries, keys] is made: long calls go in chunks of rows.

Attention comes in by transformers' own ``AttentionInterface`` and ``AttentionMaskInterface``, under the name
``dsv4_backends``. The parts that have no registry (the compressors with the indexer, the hyper-connections, the grouped
output projection) are replaced by an instance's ``forward``, which ``disable`` takes away again.

A decode step is bound by the host, which launches thousands of kernels of a few numbers each. So what all layers of a
call need alike is made once, and chains of small steps are kernels of their own (``kernels.py``).

bf16 tensors go through ``dsv4_backends.ops``. A float32 model runs the same lists through plain torch (see
``exact.py``): the ops take bf16, and transformers' eager model in float32 is the oracle for the lists.

What is replaced is known by its source text. A transformers in which it reads differently is refused.
"""

from __future__ import annotations

from .model import NAME, Part, disable, enable, packed_cache, register
from .refusals import EngineError
from .targets import ENGINE

__all__ = ["ENGINE", "NAME", "EngineError", "Part", "disable", "enable", "packed_cache", "register"]
