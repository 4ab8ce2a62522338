"""Changes vLLM's warm-up, which compiles kernels before serving: without those that are replaced, and with ours.

vLLM does not start if a kernel of its warm-up does not compile, and some of the replaced ones do not on this GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...contract.traffic import Limits
from ...errors import DSV4Error
from ..patching import PLANNED, REPLACED

_log = logging.getLogger("dsv4_backends")

Own = Callable[..., Any]


def add(own: Own, self: Any, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """``JitWarmupRegistry._add``, which does not register kernels that are replaced."""
    from . import ENGINE

    name = type(kernel).__name__
    rows = [row for row in ENGINE.rows if row.state in (PLANNED, REPLACED)]
    if any(name in row.target.kernels for row in rows):
        return
    if name == "PackSeqTritonKernel" and any(row.target.attribute == "pack_seq_triton" for row in rows):
        kwargs = {**kwargs, "dtype": torch.uint8, "pad_value": 0}  # as attention.pack calls it
    own(self, kernel, args, kwargs)


def compile_ours(own: Own, worker: Any, *args: Any, **kwargs: Any) -> Any:
    """``kernel_warmup`` of a worker: first all kernels of our providers that its model needs, then vLLM's own."""
    config = worker.vllm_config
    if config.kernel_config.enable_jit_warmup:
        try:
            _compile_ours(config, worker.device)
        except (DSV4Error, ValueError) as error:  # for example another model: kernels compile at their first call
            _log.warning("vllm: the ops are not compiled ahead: %s", error)
    return own(worker, *args, **kwargs)


def _compile_ours(config: Any, device: torch.device) -> None:
    from ...runtime import ahead
    from . import ENGINE

    ops = {row.target.op for row in ENGINE.rows if row.target.op and row.state in (PLANNED, REPLACED)}
    if not ops:
        return
    speculative = config.speculative_config
    tp = config.parallel_config.tensor_parallel_size
    hf = config.model_config.hf_config
    heads = hf.num_attention_heads // tp
    limits = Limits(
        max_tokens=config.scheduler_config.max_num_batched_tokens,
        max_requests=config.scheduler_config.max_num_seqs,
        max_context=config.model_config.max_model_len,
        next_n=1 + (speculative.num_speculative_tokens if speculative is not None else 0),
        heads=64 if heads <= 64 else 128,  # the attention layer's padding
    )
    ready = ahead.warmup(hf.to_dict(), tp=tp, limits=limits, device=device, ops=sorted(ops))
    made = {provider: sum(by.get(provider, 0) for by in ready.values()) for by in ready.values() for provider in by}
    _log.info("vllm: compiled ahead: %s", ", ".join(f"{provider} {n}" for provider, n in made.items()))


class _Nothing:
    """A kernel whose package is missing: nothing of it is compiled ahead."""

    def register_warmup(self, *args: object, **kwargs: object) -> None:
        return


@contextlib.contextmanager
def _stand_in(name: str) -> Iterator[None]:
    """Within the block, importing the module ``name`` gives kernels with nothing to compile."""
    if name in sys.modules:  # a constructor inside another
        yield
        return
    package, _, last = name.rpartition(".")
    parent = importlib.import_module(package)
    module = types.ModuleType(name)
    module.__getattr__ = lambda attribute: _Nothing()  # type: ignore[method-assign]
    sys.modules[name] = module
    try:
        yield
    finally:
        del sys.modules[name]
        vars(parent).pop(last, None)


def construct_without_tilelang(own: Own, self: Any, *args: Any, **kwargs: Any) -> None:
    """A constructor that registers TileLang's kernels, run without TileLang."""
    with _stand_in("vllm.model_executor.kernels.mhc.tilelang_kernels"):
        own(self, *args, **kwargs)


def construct_without_cutedsl(own: Own, self: Any, *args: Any, **kwargs: Any) -> None:
    """A constructor that registers the CuTe DSL's kernels, run without the CuTe DSL."""
    with _stand_in("vllm.models.deepseek_v4.nvidia.ops.sparse_attn_compress_cutedsl"):
        own(self, *args, **kwargs)
