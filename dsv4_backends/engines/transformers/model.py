"""Enable and disable the integration in a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...contract.sparse_mla.meaning import HEAD_DIM, MAX_HEADS
from ...selection.provider import Reason
from . import compressors, hyper_connections, projection
from .attention import attention
from .handover import hand_over_pages, window_of
from .refusals import EngineError
from .replaced import Mode, Replaced
from .sources import unknown

NAME = "dsv4_backends"
"""The ``attn_implementation``."""


@dataclass(frozen=True)
class Part:
    """How one part of a model is served.

    Attributes:
        name: The part.
        ops: The ops that serve it now; none where ``reason`` is given.
        modules: How many modules of the model belong to it.
        reason: Why no op serves it.
    """

    name: str
    ops: tuple[str, ...]
    modules: int
    reason: Reason | None = None

    def __str__(self) -> str:
        served = ", ".join(self.ops) if self.reason is None else f"no op: {self.reason} [{self.reason.code}]"
        return f"{self.name} ({self.modules} modules): {served}"


def _check_model(model: Any) -> None:
    if (reason := unknown()) is not None:
        raise EngineError(reason)
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4PreTrainedModel

    if not isinstance(model, DeepseekV4PreTrainedModel):
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise EngineError(Reason("engine-model", f"expected a DeepSeek V4 model of transformers, got {kind!r}"))
    config = model.config
    if config.head_dim != HEAD_DIM:
        raise EngineError(
            Reason("engine-model", f"head_dim: the ops are defined for {HEAD_DIM}, got {config.head_dim}")
        )
    if not 1 <= config.num_attention_heads <= MAX_HEADS:
        message = f"num_attention_heads: expected 1 to {MAX_HEADS}, got {config.num_attention_heads}"
        raise EngineError(Reason("engine-model", message))
    if (dtype := _dtype(model)) not in (torch.bfloat16, torch.float32):
        raise EngineError(Reason("engine-model", f"dtype: expected bfloat16 or float32, got {dtype}"))


def _dtype(model: Any) -> torch.dtype:
    dtype: torch.dtype = model.get_input_embeddings().weight.dtype
    return dtype


def register() -> None:
    """Make ``attn_implementation="dsv4_backends"`` known to transformers, for models that are loaded with it.

    Raises:
        EngineError: an unsupported version of transformers.
    """
    if (reason := unknown()) is not None:
        raise EngineError(reason)
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, window_of)


def enable(model: Any, *, fp8: bool | None = None) -> tuple[Part, ...]:
    """Run a DeepSeek V4 model of transformers on the ops, in place.

    Args:
        model: A ``DeepseekV4ForCausalLM`` or ``DeepseekV4Model`` in bfloat16, or in float32 (then no op serves it),
            with its weights, on its device.
        fp8: Whether FP8 ops serve the indexer and the output projection, whose weights are then quantised in blocks
            of 128 x 128 (exact for weights that came from such a checkpoint). Default: for bfloat16 models.

    Returns:
        What serves each part of the model, or why no op does.

    Raises:
        EngineError: an unsupported version of transformers or model, a model that is enabled already, a module whose
            ``forward`` is replaced already, or ``fp8`` for a float32 model.
    """
    _check_model(model)
    bf16 = _dtype(model) is torch.bfloat16
    if fp8 and not bf16:
        raise EngineError(Reason("engine-dtype", "the FP8 ops serve bfloat16 models, this one is float32"))
    fp8 = bf16 if fp8 is None else fp8
    if _enabled(model) is not None:
        raise EngineError(Reason("engine-state", "the model is enabled already", "disable(model) first"))
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

    register()
    mode = Mode(fp8, model.config._attn_implementation)
    plans: list[Replaced] = []
    functions: dict[type, Callable[..., Any]] = {
        modeling.DeepseekV4HCACompressor: compressors.compress_heavily,
        modeling.DeepseekV4CSACompressor: compressors.compress_and_select,
        modeling.DeepseekV4HyperConnection: hyper_connections.hyper_connection,
        modeling.DeepseekV4HyperHead: hyper_connections.hyper_head,
    }
    for module in model.modules():
        if (function := functions.get(type(module))) is not None:
            plans.append(Replaced(function, module, mode))
        elif type(module) is modeling.DeepseekV4GroupedLinear and fp8 and module.weight.dtype is torch.bfloat16:
            plans.append(Replaced(projection.grouped_linear, module, mode, *projection.quantise_weight(module)))
    for plan in plans:
        if "forward" in vars(plan.module):
            kind = type(plan.module).__name__
            raise EngineError(Reason("engine-state", f"the forward of a {kind} has been replaced by other code"))
    for plan in plans:
        plan.module.forward = plan
    model.set_attn_implementation(NAME)
    return _parts(model, mode, modeling)


def _parts(model: nn.Module, mode: Mode, modeling: Any) -> tuple[Part, ...]:
    def count(*kinds: type) -> int:
        return sum(type(module) in kinds for module in model.modules())

    float32 = None
    if _dtype(model) is not torch.bfloat16:
        float32 = Reason("engine-dtype", "the ops take bfloat16, the model is float32: plain torch serves")
    unquantised = float32 or (None if mode.fp8 else Reason("engine-dtype", "fp8=False: plain torch serves"))
    own = "transformers' own code serves"
    projections = [m for m in model.modules() if "GroupedLinear" in type(m).__name__]
    replaced = [m for m in projections if isinstance(vars(m).get("forward"), Replaced)]
    projection = None
    if float32 is not None or not mode.fp8:
        projection = Reason("engine-dtype", f"{'fp8=False' if float32 is None else 'the model is float32'}: {own}")
    elif len(replaced) < len(projections):
        kind = type(next(m for m in projections if m not in replaced)).__name__
        projection = Reason("engine-dtype", f"{kind} holds no bfloat16 weight: {own}")

    def part(name: str, served: tuple[str, ...], modules: int, reason: Reason | None) -> Part:
        return Part(name, served if reason is None else (), modules, reason)

    connections = count(modeling.DeepseekV4HyperConnection, modeling.DeepseekV4HyperHead)
    return (
        part("attention", ("sparse_mla_prefill", "sparse_mla_decode"), count(modeling.DeepseekV4Attention), float32),
        part("indexer", ("mqa_logits", "paged_mqa_logits"), count(modeling.DeepseekV4Indexer), unquantised),
        part("hyper-connections", ("hc_prenorm_gemm",), connections, float32),
        part("output projection", ("fp8_einsum",), len(projections), projection),
    )


def _replacements(model: nn.Module) -> Iterator[tuple[nn.Module, Replaced]]:
    for module in model.modules():
        if isinstance(plan := vars(module).get("forward"), Replaced):
            yield module, plan


def _enabled(model: nn.Module) -> Mode | None:
    return next((plan.mode for _, plan in _replacements(model)), None)


def disable(model: Any) -> None:
    """Remove the integration from a model. It then computes bit for bit what it did before ``enable``.

    Raises:
        EngineError: the model is not enabled.
    """
    if (mode := _enabled(model)) is None:
        raise EngineError(Reason("engine-state", "the model is not enabled"))
    for module, _ in list(_replacements(model)):
        del module.forward
    model.set_attn_implementation(mode.previous)


def packed_cache(model: Any) -> Any:
    """An empty cache of FP8 pages for an enabled model, to be passed as ``past_key_values``.

    Keys are stored as the contract's pages (584 bytes, indexer keys 132), and calls with up to 8 tokens read them by
    ``sparse_mla_decode`` and ``paged_mqa_logits``. It can be filled and reset. It cannot be reordered or cropped.

    Raises:
        EngineError: the model is not enabled, or not with ``fp8``.
    """
    mode = _enabled(model)
    if mode is None or not mode.fp8:
        message = "is not enabled" if mode is None else "runs without FP8"
        raise EngineError(Reason("engine-state", f"a packed cache needs an enabled model with fp8, this one {message}"))
    from .cache import PackedCache

    return PackedCache(model.config, hand_over_pages)
