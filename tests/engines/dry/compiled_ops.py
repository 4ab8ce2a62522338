"""vLLM's compiled ops without a GPU: each is called, counted, and computes nothing."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from typing import Any

import torch
from gpu import OnCpu
from torch import Tensor

calls: collections.Counter[str] = collections.Counter()
_kept: list[torch.library.Library] = []  # a library lives as long as its object


def _marlin_weight(w: Tensor, size_k: int, size_n: int, bits: int, *rest: Any) -> Tensor:
    return torch.zeros(size_k // 16, size_n * (bits // 2), dtype=torch.int32)


def _marlin_gemm(a: Tensor, *args: Any) -> Tensor:
    m, n = args[9:11]  # after c, weight, bias, three scales, zeros, workspace and type
    return torch.zeros(m, n, dtype=a.dtype)


def _query(
    q: Tensor, kv: Tensor, cache: Tensor, slots: Tensor, positions: Tensor, table: Tensor, heads: int, *rest: Any
) -> Tensor:
    return torch.nn.functional.pad(q, (0, 0, 0, heads - q.shape[1]))


RESULTS: dict[str, Callable[..., Any]] = {
    "_C::fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert": _query,
    "_C::get_cuda_view_from_cpu_tensor": lambda tensor: tensor,
    "_C::gptq_marlin_repack": _marlin_weight,
    "_C::marlin_gemm": _marlin_gemm,
    "_moe_C::moe_wna16_marlin_gemm": lambda a, c, *rest: torch.zeros(1) if c is None else c,
}
"""Ops that return something: its shape is what the caller goes on with."""
NAMESPACES = ("_C", "_moe_C", "_C_cache_ops", "_C_utils", "_C_cuda_utils")


def _answer(name: str) -> Callable[..., Any]:
    def answer(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        if name in RESULTS:
            return RESULTS[name](*args, **kwargs)
        namespace, _, rest = name.partition("::")
        op, _, overload = rest.partition(".")
        if getattr(getattr(getattr(torch.ops, namespace), op), overload or "default")._schema.returns:
            raise NotImplementedError(f"{name} returns something that nobody has said here")
        return None

    return answer


def on_cpu() -> None:
    """Give every op of vLLM's libraries that only a GPU has a kernel for the CPU."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for namespace in NAMESPACES:
        library = torch.library.Library(namespace, "IMPL")
        _kept.append(library)
        for name in torch._C._dispatch_get_all_op_names():
            here = name.startswith(f"{namespace}::")
            if here and has(name, "CUDA") and not has(name, "CPU") and not has(name, "CompositeImplicitAutograd"):
                library.impl(name.partition("::")[2], _answer(name), "CPU")
    aten = torch.library.Library("aten", "IMPL")
    _kept.append(aten)
    for name in ("mm", "bmm"):  # with a result of another dtype: only CUDA has it
        product = getattr(torch, name)
        aten.impl(f"{name}.dtype", lambda a, b, dtype, f=product: f(a.float(), b.float()).to(dtype), "CPU")


def count_pythons_own() -> None:
    """Ops that vLLM registers in Python are counted too, and ``cuda`` means the CPU inside them as well."""
    import vllm.utils.torch_utils as utils

    register = utils.direct_register_custom_op

    def counting(op_name: str, op_func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        @functools.wraps(op_func)
        def call(*a: Any, **k: Any) -> Any:
            calls[f"vllm::{op_name}"] += 1
            with OnCpu():
                return op_func(*a, **k)

        return register(op_name, call, *args, **kwargs)

    utils.direct_register_custom_op = counting


def deep_gemm_of_its_own() -> None:
    """What vLLM calls of DeepGEMM beside what the plugin replaces: linears, experts and their scales."""
    import vllm.third_party.deep_gemm as vendored
    import vllm.utils.deep_gemm as library

    def counted(name: str, answer: Callable[..., Any] = lambda *args, **kwargs: None) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[f"deep_gemm::{name}"] += 1
            return answer(*args, **kwargs)

        return call

    for name, answer in (("set_pdl", None), ("get_num_sms", 132)):
        setattr(vendored, name, counted(name, lambda *args, answer=answer: answer))
    library._lazy_init()  # the plugin's names are replaced now
    for name in ("fp8_gemm_nt", "grouped", "grouped_fp4", "grouped_masked"):
        setattr(library, f"_{name}_impl", counted(name))
    library._transform_sf_into_required_layout_impl = counted("transform_sf", lambda sf=None, *args, **kwargs: sf)
