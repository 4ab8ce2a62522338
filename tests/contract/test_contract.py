"""Contracts as objects, and what is refused before anything is launched."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv4_backends import CONTRACTS, OPS, ContractError, PolicyError, ops, workspace_bytes
from dsv4_backends.contract import LEVELS, OpContract
from dsv4_backends.contract.arguments import ScalarArg, TensorArg
from dsv4_backends.contract.checker import _tensor_guards, check_source, checked_function
from dsv4_backends.contract.models import FLASH
from dsv4_backends.contract.traffic import Deployment, Limits
from dsv4_backends.runtime import bind
from dsv4_backends.testing import numerics, oracle

E4M3 = torch.float8_e4m3fn


def arguments(op: str, name: str = "small") -> dict[str, Any]:
    contract = CONTRACTS[op]
    return contract.inputs(next(case for case in contract.cases if case.name == name), "cpu")


@pytest.mark.parametrize("contract", CONTRACTS.values(), ids=list(CONTRACTS))
class TestContract:
    def test_says_what_it_means(self, contract: OpContract) -> None:
        doc = inspect.getdoc(contract.function) or ""
        for section in ("Args:", "Returns:", "Raises:", "Source:"):
            assert section in doc
        for name in contract.args:
            assert f"    {name}: " in doc or f"{name}," in doc or f", {name}" in doc, name
        assert all(tolerance.why for tolerance in contract.tolerances.values())

    def test_public_function_has_its_signature_and_doc(self, contract: OpContract) -> None:
        public = getattr(ops, contract.name)
        assert inspect.signature(public) == contract.signature
        assert public.__doc__ == contract.function.__doc__
        lines, _ = inspect.getsourcelines(public)  # where an editor's "go to definition" ends
        assert inspect.getsourcefile(public) == ops.__file__
        assert lines[0].startswith(f"def {contract.name}(")

    def test_traffic_is_of_this_op_and_fits_the_contract(self, contract: OpContract) -> None:
        traffic, rank = contract.traffic, FLASH.rank(8)
        server = Deployment(rank, Limits(max_tokens=5, max_requests=2, max_context=2000, next_n=2), packed_scales=True)
        needs = list(traffic.needs(server))
        rows = [*traffic.rows("flash", rank), *traffic.tiny]
        assert {each.op for each in (*needs, *rows)} == {contract.name}
        for arguments in (*traffic.calls(server), *(need.arguments() for need in needs)):
            assert contract.check(**arguments).type == "meta"
        assert set(traffic.held) <= set(contract.args)
        assert contract.partials in ("", *contract.args)

    def test_a_stack_trace_passes_through_its_lines(self, contract: OpContract) -> None:
        first, *others = contract.args
        with pytest.raises(ContractError) as raised:
            getattr(ops, contract.name)(**{first: 0}, **{n: None for n in others if not contract.is_optional(n)})
        places = [frame.path for frame in raised.traceback]
        assert str(places[1]) == ops.__file__
        assert "check and dispatch of" in str(places[2])

    def test_its_check_can_be_printed(self, contract: OpContract) -> None:
        command = [sys.executable, "-m", "dsv4_backends.contract", contract.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        compile(text, "printed", "exec")
        assert text.startswith(f"def {contract.name}(")
        assert text == check_source(contract)
        assert all(name in text for name in contract.args)

    def test_levels_grow(self, contract: OpContract) -> None:
        sizes = [len(contract.at_level(level)) for level in LEVELS]
        assert 0 < sizes[0] < sizes[1] < sizes[2]

    def test_inputs_repeat_and_pass_the_check(self, contract: OpContract) -> None:
        for case in contract.at_level("smoke"):
            first, second = (contract.inputs(case, "cpu") for _ in range(2))
            other = contract.inputs(case, "cpu", variant=1)
            assert contract.check(**first) == torch.device("cpu")
            for name, value in first.items():
                if isinstance(value, torch.Tensor):
                    same = (value.shape, value.stride(), value.dtype)
                    assert same == (other[name].shape, other[name].stride(), other[name].dtype)
                    assert numerics.same_bits(value, second[name])

    def test_cost_grows_with_the_batch(self, contract: OpContract) -> None:
        made = contract.inputs(contract.at_level("default")[-1], "cpu")
        cost = contract.cost(**made)
        assert cost.flops > 0
        assert cost.bytes >= sum(made[name].numel() for name in ("q", "x") if name in made)
        assert cost.math in ("bf16", "fp8", "tf32")


def test_costs_by_hand() -> None:
    """The costs of these shapes as computed by hand, for published times of the native libraries."""
    meta: dict[str, Any] = {"device": "meta"}
    prefill = CONTRACTS["sparse_mla_prefill"].cost(
        torch.empty(4096, 64, 512, dtype=torch.bfloat16, **meta),
        torch.empty(32768, 512, dtype=torch.bfloat16, **meta),
        torch.empty(4096, 640, dtype=torch.int32, **meta),
        1.0,
    )
    assert prefill.flops == 4 * 4096 * 64 * 640 * 512
    short = CONTRACTS["sparse_mla_prefill"].cost(
        torch.empty(2, 64, 512, dtype=torch.bfloat16),
        torch.empty(32768, 512, dtype=torch.bfloat16),
        torch.empty(2, 640, dtype=torch.int32),
        1.0,
        topk_length=torch.tensor([128, 700], dtype=torch.int32),
    )
    assert short.flops == 4 * 64 * (128 + 640) * 512
    assert short.bytes == 4 * 2 * 64 * 512 + 2 * (128 + 640) * 512 + 4 * (128 + 640) + 8 * 2 * 64
    decode = CONTRACTS["sparse_mla_decode"].cost(
        torch.empty(2, 3, 64, 512, dtype=torch.bfloat16),
        torch.empty(100, 64, 584, dtype=torch.uint8),
        torch.empty(2, 3, 128, dtype=torch.int32),
        1.0,
        topk_length=torch.tensor([128, 0], dtype=torch.int32),
        extra_k_cache=torch.empty(1, 2, 584, dtype=torch.uint8),
        extra_indices=torch.empty(2, 3, 8192, dtype=torch.int32),
        extra_topk_length=torch.tensor([10, -1], dtype=torch.int32),
    )
    assert decode.flops == 4 * 64 * 3 * 138 * 512
    assert decode.bytes == 4 * 6 * 64 * 512 + 584 * (3 * 128 + 2) + 4 * 3 * 138 + 4 * 6 * 64
    einsum = CONTRACTS["fp8_einsum"].cost(
        torch.empty(1, 8, 4096, dtype=E4M3, **meta),
        torch.empty(1, 8, 32, **meta),
        torch.empty(8, 1024, 4096, dtype=E4M3, **meta),
        torch.empty(8, 8, 32, **meta),
    )
    assert einsum.bytes == 8 * 4096 + 8 * 1024 * 4096 + 2 * 8 * 1024 + 4 * (8 * 32 + 8 * 8 * 32)
    paged = CONTRACTS["paged_mqa_logits"].cost(
        torch.empty(32, 1, 64, 128, dtype=E4M3),
        torch.empty(1, 64, 132, dtype=torch.uint8),
        torch.empty(32, 64),
        torch.full((32, 1), 16384, dtype=torch.int32),
        torch.empty(32, 256, dtype=torch.int32),
        16384,
    )
    assert paged.flops == 2 * 32 * 16384 * 64 * 128
    assert 132 * 32 * 16384 < paged.bytes < 140 * 32 * 16384


WRONG: list[tuple[str, dict[str, Any], str]] = [
    (
        "sparse_mla_prefill",
        {"q": None},
        "argument q: expected a tensor bfloat16 [s_q, h_q, 512], got NoneType",
    ),
    ("sparse_mla_prefill", {"q": [1]}, "argument q: expected a tensor"),
    (
        "sparse_mla_prefill",
        {"q": torch.zeros(3, 8, 576, dtype=torch.bfloat16)},
        "bfloat16 [s_q=3, h_q=8, 512]",
    ),
    ("sparse_mla_prefill", {"q": torch.zeros(3, 8, 512)}, "got float32 [3, 8, 512]"),
    (
        "sparse_mla_prefill",
        {"q": torch.zeros(3, 129, 512, dtype=torch.bfloat16)},
        "expected 1 to 128 heads, got h_q 129",
    ),
    (
        "sparse_mla_prefill",
        {"q": torch.zeros(3, 0, 512, dtype=torch.bfloat16)},
        "expected 1 to 128 heads, got h_q 0",
    ),
    (
        "sparse_mla_prefill",
        {"q": torch.zeros(512, 8, 3, dtype=torch.bfloat16).permute(2, 1, 0)},
        "argument q",
    ),
    ("sparse_mla_prefill", {"kv": torch.zeros(9, 2, 512, dtype=torch.bfloat16)}, "argument kv"),
    ("sparse_mla_prefill", {"kv": torch.zeros(9, 512, dtype=torch.bfloat16, device="meta")}, "on cpu"),
    (
        "sparse_mla_prefill",
        {"indices": torch.zeros(3, 20, dtype=torch.int64)},
        "expected int32 [s_q=3, topk]",
    ),
    ("sparse_mla_prefill", {"indices": torch.zeros(4, 20, dtype=torch.int32)}, "got int32 [4, 20]"),
    ("sparse_mla_prefill", {"sm_scale": "1"}, "argument sm_scale: expected a number, got '1'"),
    ("sparse_mla_prefill", {"sm_scale": None}, "argument sm_scale: expected a number, got None"),
    ("sparse_mla_prefill", {"attn_sink": torch.zeros(9)}, "expected float32 [h_q=8]"),
    ("sparse_mla_prefill", {"topk_length": torch.zeros(8, dtype=torch.int32)}, "expected int32 [s_q=3]"),
    ("sparse_mla_prefill", {"out": torch.zeros(3, 8, 512)}, "argument out: expected bfloat16"),
    ("sparse_mla_decode", {"k_cache": torch.zeros(9, 4, 656, dtype=torch.uint8)}, "argument k_cache"),
    (
        "sparse_mla_decode",
        {"k_cache": torch.zeros(9, 8, 584, dtype=torch.uint8)[:, ::2]},
        "contiguous within a page",
    ),
    ("sparse_mla_decode", {"k_cache": torch.zeros(9, 4, 584)}, "uint8/int8/float8_e4m3fn"),
    ("sparse_mla_decode", {"indices": torch.zeros(2, 20, dtype=torch.int32)}, "[b=2, s_q=1, topk]"),
    ("sparse_mla_decode", {"topk_length": torch.zeros(2, 1, dtype=torch.int32)}, "argument topk_length"),
    ("sparse_mla_decode", {"extra_indices": torch.zeros(2, 1, 4, dtype=torch.int32)}, "together, or neither"),
    (
        "sparse_mla_decode",
        {"extra_k_cache": torch.zeros(1, 2, 584, dtype=torch.uint8)},
        "together, or neither",
    ),
    (
        "sparse_mla_decode",
        {"extra_topk_length": torch.zeros(2, dtype=torch.int32)},
        "argument extra_topk_length",
    ),
    ("mqa_logits", {"q": torch.zeros(5, 8, 32, dtype=torch.uint8)}, "argument q: expected float8_e4m3fn"),
    ("mqa_logits", {"k": torch.zeros(37, 64).to(E4M3)}, "float8_e4m3fn [n=37, d=32]"),
    ("mqa_logits", {"k_scale": torch.zeros(36)}, "float32 [n=37]"),
    ("mqa_logits", {"weights": torch.zeros(5, 9)}, "float32 [m=5, h=8]"),
    ("mqa_logits", {"row_ends": torch.zeros(5)}, "argument row_ends: expected int32"),
    ("mqa_logits", {"max_seqlen_k": -1}, "argument max_seqlen_k: expected an int of at least 0, got -1"),
    ("mqa_logits", {"max_seqlen_k": True}, "argument max_seqlen_k: expected an int"),
    ("mqa_logits", {"out": torch.zeros(5, 38)}, "argument out"),
    (
        "paged_mqa_logits",
        {"context_lens": torch.zeros(3, 2, dtype=torch.int32)},
        "int32 [b=3, next_n=1] or int32 [b=3]",
    ),
    ("paged_mqa_logits", {"k_cache": torch.zeros(9, 4, 132, dtype=torch.uint8)}, "d + 4=36"),
    (
        "paged_mqa_logits",
        {"k_cache": torch.zeros(9, 150, dtype=torch.uint8)[:, :144].unflatten(1, (4, 36))},
        "multiple of 4",
    ),
    ("paged_mqa_logits", {"weights": torch.zeros(4, 8)}, "b * next_n=3"),
    ("paged_mqa_logits", {"max_context_len": 1.5}, "argument max_context_len"),
    ("fp8_einsum", {"x_scale": torch.zeros(3, 2, 1)}, "ceil(r, 128)=2"),
    ("fp8_einsum", {"x_scale": torch.zeros(3, 2, 2, dtype=torch.int32)}, "ceil(r, 512)=1"),
    ("fp8_einsum", {"w": torch.zeros(3, 128, 256).to(E4M3)}, "float8_e4m3fn [h=2, d=128, r=256]"),
    ("fp8_einsum", {"w_scale": torch.zeros(2, 3, 2)}, "argument w_scale"),
    ("fp8_einsum", {"x": torch.zeros(256, 2, 3).to(E4M3).permute(2, 1, 0)}, "last dimension contiguous"),
    ("hc_prenorm_gemm", {"fn": torch.zeros(24, 255)}, "float32 [n=24, k=256]"),
    ("hc_prenorm_gemm", {"num_splits": 0}, "expected an int of at least 1, got 0"),
    ("hc_prenorm_gemm", {"out": torch.zeros(3, 24)}, "out and sqr_sum together, or neither"),
    (
        "hc_prenorm_gemm",
        {"num_splits": 2, "out": torch.zeros(3, 24), "sqr_sum": torch.zeros(3)},
        "argument out",
    ),
]


@pytest.mark.parametrize(
    ("op", "change", "words"), WRONG, ids=[f"{o}-{'-'.join(c)}-{i}" for i, (o, c, _) in enumerate(WRONG)]
)
def test_refused_before_anything_is_launched(op: str, change: dict[str, Any], words: str) -> None:
    for _ in range(3):  # so that the signature is known: a known one must not let a wrong call through
        getattr(ops, op)(**arguments(op))
    before = bind.stats()
    with pytest.raises(ContractError) as caught:
        getattr(ops, op)(**(arguments(op) | change))
    message = str(caught.value)
    assert message.startswith(f"{op}: argument ")
    assert words in message
    assert bind.stats() == before
    assert isinstance(caught.value, ValueError)


def test_every_tensor_argument_is_refused_in_some_way() -> None:
    for op, contract in CONTRACTS.items():
        for name, arg in contract.args.items():
            if isinstance(arg, TensorArg):
                with pytest.raises(ContractError, match=f"{op}: argument {name}"):
                    getattr(ops, op)(**(arguments(op) | {name: torch.zeros(1, 1, 1, 1, 1, dtype=torch.complex64)}))


def test_strides_that_the_contract_frees() -> None:
    decode = arguments("sparse_mla_decode")
    wide = torch.zeros(2, 1, 8, 640, dtype=torch.bfloat16)[..., :512]
    ops.sparse_mla_decode(**(decode | {"q": wide}))
    one = arguments("fp8_einsum", "one of each")
    assert ops.fp8_einsum(**(one | {"x": one["x"].as_strided((1, 1, 1), (7, 7, 7))})).shape == (1, 1, 1)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_no_wrong_size_passes(data: st.DataObject) -> None:
    """Growing any one dimension of any tensor is refused, unless it is the only one that holds that size's name."""
    op = data.draw(st.sampled_from(OPS))
    contract = CONTRACTS[op]
    made = arguments(op, "lengths" if op.startswith("sparse") else "small")
    name = data.draw(st.sampled_from([n for n, v in made.items() if isinstance(v, torch.Tensor)]))
    value = made[name]
    dim = data.draw(st.integers(0, value.dim() - 1))
    shape = list(value.shape)
    shape[dim] += data.draw(st.sampled_from([1, 2, 128]))
    arg = contract.args[name]
    assert isinstance(arg, TensorArg)
    symbol = arg.forms[0].dims[dim] if len(arg.forms[0].dims) == value.dim() else ""
    uses = sum(
        symbol in form.shape.replace(",", " ").split()
        for n, other in contract.args.items()
        if isinstance(other, TensorArg) and n in made and made[n] is not None
        for form in other.forms[:1]
    )
    grown = (
        torch.zeros(shape, dtype=torch.uint8).to(value.dtype)
        if value.dtype is not E4M3
        else torch.zeros(shape).to(E4M3)
    )
    tied = symbol in "hd" and not (op.startswith("inverse") and shape[dim] % made["groups"] == 0)
    tied = tied or symbol == "width"  # the compressor's state has one of two widths
    if symbol.isidentifier() and uses == 1 and not tied:
        contract.check(**(made | {name: grown}))
    else:
        with pytest.raises(ContractError):
            contract.check(**(made | {name: grown}))


@pytest.mark.parametrize("op", OPS)
def test_a_known_signature_skips_the_check(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After two calls of one shape the next is recognised; another shape, and one tensor twice, are not."""
    contract = CONTRACTS[op]
    check = checked_function(contract, (), ("return len(seen)",), {})
    made = arguments(op, "lengths" if op.startswith("sparse") else "small")
    assert [check(**made) for _ in range(4)] == [0, 1, 1, 1]
    assert [check(**arguments(op, "one of each")) for _ in range(3)] == [1, 2, 2]
    assert check(**made) == 2
    if op == "sparse_mla_decode":
        same = made | {"extra_topk_length": made["topk_length"]}
        assert [check(**same) for _ in range(4)] == [2, 2, 2, 2]
    if op == "hc_prenorm_gemm":
        assert [check(**(made | {"num_splits": n})) for n in (1, 2, 2, 2, 3)] == [2, 2, 3, 3, 3]


def test_signatures_are_bounded() -> None:
    contract = CONTRACTS["hc_prenorm_gemm"]
    check = checked_function(contract, (), ("return len(seen)",), {})
    for m in range(20):
        x, fn = torch.zeros(m, 64, dtype=torch.bfloat16), torch.zeros(8, 64)
        assert max(check(x, fn) for _ in range(3)) <= 4


def test_without_pytorchs_guards_every_call_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch._C._dynamo.guards", None)
    contract = CONTRACTS["hc_prenorm_gemm"]
    check = checked_function(contract, (), ("return len(seen)",), {})
    made = arguments("hc_prenorm_gemm")
    assert [check(**made) for _ in range(4)] == [0, 0, 0, 0]
    with pytest.raises(ContractError):
        check(made["x"], made["fn"][:, :-1])


def test_guards_that_changed_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The class is private: one that takes other arguments, or accepts every call, is not used."""
    from torch._C._dynamo import guards

    class Careless:
        def __init__(self, *tensors: Any, **options: Any) -> None: ...

        def check(self, *tensors: Any) -> bool:
            return True

    assert _tensor_guards() is guards.TensorGuards
    for changed in (Careless, lambda: None):
        monkeypatch.setattr(guards, "TensorGuards", changed)
        assert _tensor_guards() is None


def test_every_scalar_has_a_kind() -> None:
    for contract in CONTRACTS.values():
        for arg in contract.args.values():
            assert isinstance(arg, (TensorArg, ScalarArg))


@pytest.mark.parametrize("contract", CONTRACTS.values(), ids=lambda contract: contract.name)
def test_pickled_by_name(contract: OpContract) -> None:
    assert pickle.loads(pickle.dumps(contract)) is contract
    other = dataclasses.replace(contract, partials="")
    assert copy.copy(other) == other


def test_a_call_that_lacks_arguments_names_them() -> None:
    with pytest.raises(PolicyError, match="unknown op 'x'"):
        oracle.expected("x", {})
    for call in (
        lambda: oracle.expected("hc_prenorm_gemm", {}),
        lambda: workspace_bytes("hc_prenorm_gemm", "cpu"),
        lambda: bind.who_serves("hc_prenorm_gemm", {}),
    ):
        with pytest.raises(ContractError, match="hc_prenorm_gemm: missing arguments x, fn"):
            call()
    with pytest.raises(ContractError, match="hc_prenorm_gemm: unknown argument y"):
        workspace_bytes("hc_prenorm_gemm", "cpu", x=1, fn=2, y=3)
