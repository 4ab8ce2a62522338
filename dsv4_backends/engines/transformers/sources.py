"""Compares the source text of what the integration replaces or relies on in transformers with a known version."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect

from ...selection.provider import Reason

_SOURCES = {
    "models.deepseek_v4.modeling_deepseek_v4": {
        "apply_rotary_pos_emb": "d938fef910b008b2",
        "eager_attention_forward": "3cb759e14962bed1",
        "DeepseekV4Attention": "7488877da3dee472",
        "DeepseekV4CSACache": "96bb30b6ea13bf71",
        "DeepseekV4CSACompressor": "d2ca031682522c3a",
        "DeepseekV4DecoderLayer": "b88513b6cbf223d8",
        "DeepseekV4GroupedLinear": "7ac7c14125c7fe86",
        "DeepseekV4HCACache": "cc8e4ac64a08e3fa",
        "DeepseekV4HCACompressor": "6ae7fd0c744b3a24",
        "DeepseekV4HyperConnection": "1ba448fb49c686ec",
        "DeepseekV4HyperHead": "517a2c661313e80c",
        "DeepseekV4Indexer": "f9ce58af472da7b8",
        "DeepseekV4IndexerScorer": "e80cbb0e2d1871c3",
        "DeepseekV4Model": "7261474fabd1aedd",
    },
    "masking_utils": {
        "create_sliding_window_causal_mask": "1df4553adac5b299",
        "_preprocess_mask_arguments": "df23eb733c6e49fa",
    },
    "cache_utils": {"DynamicSlidingWindowLayer": "ea27db942c137843"},
}
"""By module, each name with a digest of its source in the version below."""
TESTED = "5.17.0"


def _digest(module: str, name: str) -> str:
    try:
        source = inspect.getsource(getattr(importlib.import_module(f"transformers.{module}"), name))
    except (ImportError, AttributeError, OSError, TypeError):
        return "missing"
    return hashlib.sha256(source.encode()).hexdigest()[:16]


@functools.cache
def unknown() -> Reason | None:
    """Why the installed transformers is not supported."""
    try:
        import transformers
        from transformers.models import deepseek_v4  # noqa: F401
    except ImportError as error:
        return Reason("engine-source", f"transformers with DeepSeek V4 cannot be imported: {error}", hint())
    changed = [
        name for module, names in _SOURCES.items() for name, known in names.items() if _digest(module, name) != known
    ]
    if changed:
        message = f"transformers {transformers.__version__} is not known: its {', '.join(changed)} differ"
        return Reason("engine-source", f"{message} from those of {TESTED}", hint())
    return None


def hint() -> str:
    return f"pip install transformers=={TESTED}"
