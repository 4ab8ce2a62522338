"""Every kernel variant that dispatch can ask for on a machine, at the dimensions of DeepSeek V4."""

from __future__ import annotations

from dsv4_backends.contract.models import MODELS

from . import decode, einsum, hyper_connection, logits, prefill
from ._arch import Arch
from ._variant import Variant

_MOST_ROWS = 200
"""From here on the plan of decode does not change on any machine of the table."""


def all_of(arch: Arch) -> list[Variant]:
    """The variants for Flash and Pro, each once, in a fixed order."""
    found: dict[str, Variant] = {}
    for model in MODELS.values():
        rank = model.rank(1)
        made = [
            *(v for tp in (1, 2, 4, 8) for v in prefill.compile_keys(arch, model.rank(tp).heads)),
            *(
                v
                for tp in (1, 2, 4, 8)
                for v in decode.compile_keys(arch, model.rank(tp).heads, model.window, model.index_topk, _MOST_ROWS)
            ),
            *logits.compile_keys(arch, heads=model.index_heads, head_dim=model.index_dim),
            *einsum.compile_keys(arch, r=rank.o_in, d=model.o_lora_rank),
            *hyper_connection.compile_keys(arch, n=rank.hc_n, k=rank.hc_k),
        ]
        found |= {f"{variant.note} {sorted(variant.constants.items(), key=str)}": variant for variant in made}
    return list(found.values())
