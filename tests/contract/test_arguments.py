"""Arguments of real callers: which are accepted, and that all others raise ContractError and nothing else."""

from __future__ import annotations

import fractions
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv4_backends import CONTRACTS, OPS, ContractError, NoProviderError, ops, stats
from dsv4_backends.contract import OpContract
from dsv4_backends.contract.arguments import ScalarArg, TensorArg
from dsv4_backends.contract.checker import checked_function, overlaps_itself
from dsv4_backends.testing.numerics import same_bits

ALL_VECTORS = [
    (op, name)
    for op, contract in CONTRACTS.items()
    for name, arg in contract.args.items()
    if isinstance(arg, TensorArg) and arg.layout == "vector"
]

FORMS = [(op, with_buffers) for op, contract in CONTRACTS.items() for with_buffers in contract.forms]
"""The ``torch.library`` forms."""


def arguments(op: str, name: str = "") -> dict[str, Any]:
    contract = CONTRACTS[op]
    name = name or ("lengths" if op.startswith("sparse") else "last entries" if op.startswith("gather") else "small")
    return contract.inputs(next(case for case in contract.cases if case.name == name), "cpu")


def results(op: str, made: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    found = getattr(ops, op)(**made)
    return found if isinstance(found, tuple) else (found,)


def buffers(op: str, made: dict[str, Any]) -> dict[str, torch.Tensor]:
    contract = CONTRACTS[op]
    if contract.in_place:
        return {name: made[name] for name in contract.buffers}
    fake = contract.function(**made)
    fakes = dict(zip(contract.returns, fake if isinstance(fake, tuple) else (fake,), strict=True))
    return {name: fakes[name] for name in contract.buffers}


def floating(contract: OpContract) -> list[str]:
    args = contract.args.items()
    return [n for n, a in args if isinstance(a, TensorArg) and any("float" in form.dtypes for form in a.forms)]


def refused(op: str, argument: str, words: str, made: dict[str, Any]) -> None:
    before = stats()
    with pytest.raises(ContractError) as caught:
        getattr(ops, op)(**made)
    message = str(caught.value)
    assert message.startswith(f"{op}: argument {argument}: "), message
    assert words in message, message
    assert stats() == before


# ------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("op", OPS)
def test_what_requires_grad_is_refused_under_grad_mode_alone(op: str) -> None:
    contract, made = CONTRACTS[op], arguments(op)
    plain = results(op, made)
    made |= buffers(op, made)
    names = [name for name in floating(contract) if name in made and made[name].is_floating_point()]
    assert names
    for name in names:
        tracked = made | {name: made[name].detach().requires_grad_()}
        for _ in range(3):  # known from the second call on, and not once grad mode is back
            with torch.no_grad():
                for found, want in zip(results(op, tracked), plain, strict=True):
                    assert same_bits(found, want)
            refused(op, name, "requires grad", tracked)
        with torch.inference_mode():
            results(op, tracked)
        assert not any(found.requires_grad for found in results(op, made))


@pytest.mark.parametrize(("op", "with_buffers"), FORMS)
def test_the_library_op_refuses_gradients_too(op: str, with_buffers: bool) -> None:
    contract, made = CONTRACTS[op], arguments(op)
    if with_buffers:
        made |= buffers(op, made)
    first = next(name for name in floating(contract) if made[name].is_floating_point())
    made[first].requires_grad_()
    target = getattr(torch.ops.dsv4_backends, contract.library_name(with_buffers=with_buffers))
    values = [made.get(name) for name in contract.library_names(with_buffers=with_buffers)]
    with pytest.raises(ContractError, match=f"{op}: argument {first}: requires grad"):
        target(*values)
    with torch.no_grad():
        found = target(*values)
    for result in found if isinstance(found, tuple) else (found,):
        assert result is None or not result.requires_grad


def test_compiled_and_fake_calls_refuse_gradients() -> None:
    made = arguments("hc_prenorm_gemm")
    fn = torch.nn.Parameter(made["fn"])
    torch.compiler.reset()
    run = torch.compile(ops.hc_prenorm_gemm, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="argument fn: requires grad"):
        run(made["x"], fn)
    with torch.no_grad():
        mixes, _ = run(made["x"], fn)
    assert not mixes.requires_grad
    torch.compiler.reset()
    with torch._subclasses.FakeTensorMode() as mode:
        x, fake = mode.from_tensor(made["x"]), mode.from_tensor(fn)
        with pytest.raises(ContractError, match="argument fn: requires grad"):
            ops.hc_prenorm_gemm(x, fake)
        with torch.no_grad():
            assert not ops.hc_prenorm_gemm(x, fake)[0].requires_grad


# PyTorch's own, when forward-mode AD is first used.
scripts = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")


@scripts
@pytest.mark.parametrize("op", OPS)
def test_dual_tensors_are_refused(op: str) -> None:
    contract, made = CONTRACTS[op], arguments(op)
    plain = results(op, made)
    for _ in range(2):
        results(op, made)  # known from here on
    names = contract.library_names(with_buffers=CONTRACTS[op].forms[0])
    for name in floating(contract):
        if name not in made or made[name].dtype not in (torch.bfloat16, torch.float32):
            continue
        with torch.autograd.forward_ad.dual_level():
            dual = made | {name: torch.autograd.forward_ad.make_dual(made[name], torch.ones_like(made[name]))}
            for found, want in zip(results(op, made), plain, strict=True):
                assert same_bits(found, want)
            refused(op, name, "is a dual tensor", dual)
            with torch.no_grad():  # forward mode goes on there
                refused(op, name, "is a dual tensor", dual)
            with pytest.raises(ContractError, match=f"{op}: argument {name}: is a dual tensor"):
                getattr(torch.ops.dsv4_backends, op)(*[dual.get(n) for n in names])
            with torch.inference_mode():
                results(op, dual)


@scripts
def test_a_compiled_call_refuses_dual_tensors() -> None:
    made = arguments("hc_prenorm_gemm")
    torch.compiler.reset()
    run = torch.compile(ops.hc_prenorm_gemm, backend="aot_eager", fullgraph=True)
    run(**made)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(made["x"], torch.ones_like(made["x"]))
        with pytest.raises(Exception, match="argument x: is a dual tensor"):
            run(dual, made["fn"])


# ------------------------------------------------------------------------------------------------------ transforms


@scripts
@pytest.mark.parametrize("op", OPS)
def test_transforms_of_torch_func_are_refused_in_a_sentence(op: str) -> None:
    contract, made = CONTRACTS[op], arguments(op)
    results(op, made)
    results(op, made)
    first = next(iter(contract.args))
    batched = torch.stack([made[first].view(torch.uint8)] * 2).view(made[first].dtype)

    def call(value: torch.Tensor) -> Any:
        return getattr(ops, op)(**(made | {first: value}))

    with pytest.raises(ContractError, match=f"{op}: argument {first}: comes from vmap of torch.func"):
        torch.func.vmap(call)(batched)
    names = contract.library_names(with_buffers=CONTRACTS[op].forms[0])
    with pytest.raises(ContractError, match=f"{op}: argument {first}: comes from vmap of torch.func"):
        torch.func.vmap(
            getattr(torch.ops.dsv4_backends, op), in_dims=tuple(0 if name == first else None for name in names)
        )(*[batched if name == first else made.get(name) for name in names])
    told = f"{op}: argument .*: comes from a transform of torch.func, and .* call it outside the transform$"
    tracked = next(n for n in floating(contract) if n in made and made[n].is_floating_point())
    with pytest.raises(ContractError, match=told):
        torch.func.grad(lambda value: results(op, made | {tracked: value})[0].sum())(made[tracked])
    for value in made.values():
        if isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float32):
            name = next(n for n in made if made[n] is value)
            with pytest.raises(ContractError, match=told):
                torch.func.jvp(lambda v, name=name: getattr(ops, op)(**(made | {name: v})), (value,), (value,))


# --------------------------------------------------------------------------------------------------------- numbers


SCALARS = [(op, n, a) for op, c in CONTRACTS.items() for n, a in c.args.items() if isinstance(a, ScalarArg)]
BOOLS = [(op, name) for op, name, arg in SCALARS if arg.kind == "bool"]
SCALARS = [scalar for scalar in SCALARS if scalar[2].kind != "bool"]


@pytest.mark.parametrize(("op", "name", "arg"), SCALARS, ids=[f"{op}-{name}" for op, name, _ in SCALARS])
class TestNumbers:
    def test_what_counts_as_a_number_is_taken(self, op: str, name: str, arg: ScalarArg) -> None:
        made = arguments(op)
        plain: float = 0.25 if arg.kind == "float" else made.get(name, 40)
        want = results(op, made | {name: plain})
        taken: list[Any] = [np.int64(plain), np.int32(plain), np.array(int(plain))]
        if arg.kind == "float":
            taken = [np.float32(plain), np.float64(plain), np.array(plain), np.float16(plain), fractions.Fraction(1, 4)]
        for value in taken:
            for _ in range(3):
                for a, b in zip(results(op, made | {name: value}), want, strict=True):
                    assert same_bits(a, b), value

    def test_others_are_refused(self, op: str, name: str, arg: ScalarArg) -> None:
        made = arguments(op)
        for _ in range(3):
            results(op, made)
        given = made.get(name, 1)
        for value, words in (
            (torch.tensor(given), "whose value a call would have to wait for"),
            (True, "got True"),
            (np.True_, "got np.True_"),
            ("1", "got '1'"),
            (1j, "got 1j"),
            (np.array([given]), "got array"),
            ([given], "got ["),
            (object, "got <class"),
        ):
            refused(op, name, words, made | {name: value})
        if arg.kind == "float":
            for value in (float("nan"), float("inf"), -float("inf"), np.float32("nan"), 1e39, 10**400):
                refused(op, name, "expected a number that is finite in fp32", made | {name: value})
        else:
            for value in (2**31, 2**63, 2**64, 10**400, np.uint64(2**63)):
                refused(op, name, "expected an int of at most 2147483647", made | {name: value})
            refused(op, name, "of at least", made | {name: -(2**63)})
            refused(op, name, "expected an int", made | {name: np.float32(1)})


@pytest.mark.parametrize(("op", "name"), BOOLS)
def test_bools(op: str, name: str) -> None:
    made = arguments(op)
    for value in (True, False):
        want = results(op, made | {name: value})
        for same in (np.bool_(value), np.array(value)):
            for a, b in zip(results(op, made | {name: same}), want, strict=True):
                assert same_bits(a, b)
    for value, words in ((torch.tensor(True), "whose value"), (1, "got 1"), (0.0, "got 0.0"), ("no", "got 'no'")):
        refused(op, name, words, made | {name: value})


# --------------------------------------------------------------------------------------------------------- vectors


@pytest.mark.parametrize(("op", "name"), ALL_VECTORS)
@pytest.mark.parametrize("how", ["expanded", "strided"])
def test_vectors_may_have_any_stride(op: str, name: str, how: str) -> None:
    """The provider gets a contiguous one, and the call is known as one with a contiguous one is."""
    made = arguments(op)
    value = made[name]
    strides = {"expanded": value.amin().expand(value.shape), "strided": torch.stack([value] * 3, -1)[..., 1]}
    strange = strides[how]
    assert 0 in strange.stride() or strange.stride()[-1] == 3
    want = results(op, made | {name: strange.contiguous()})
    library = getattr(torch.ops.dsv4_backends, op)
    names = CONTRACTS[op].library_names(with_buffers=CONTRACTS[op].forms[0])
    for _ in range(4):
        for a, b in zip(results(op, made | {name: strange}), want, strict=True):
            assert same_bits(a, b)
    found = library(*[(made | {name: strange}).get(n) for n in names])
    if CONTRACTS[op].in_place:
        found = tuple(made[buffer] for buffer in CONTRACTS[op].buffers)
    for a, b in zip(found if isinstance(found, tuple) else (found,), want, strict=True):
        assert same_bits(a, b)


def test_a_provider_gets_vectors_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    made = arguments("mqa_logits")
    given: list[Any] = []
    check = checked_function(
        CONTRACTS["mqa_logits"],
        (),
        ("return save(k_scale, row_starts, row_ends)",),
        {"save": lambda *vectors: given.extend(vectors)},
    )
    scale = torch.tensor(1.0).expand(made["k_scale"].shape)
    for _ in range(3):
        check(**(made | {"k_scale": scale}))
    assert [vector.is_contiguous() for vector in given] == [True] * 9
    assert given[1] is made["row_starts"]  # what is contiguous is not copied


def test_lengths_of_one_request_for_all_its_tokens() -> None:
    made = arguments("paged_mqa_logits", "two tokens")
    lens = made["context_lens"][:, 1:]
    (want,) = results("paged_mqa_logits", made | {"context_lens": lens.flatten().contiguous()})
    for _ in range(3):
        assert torch.equal(results("paged_mqa_logits", made | {"context_lens": lens.expand(-1, 2)})[0], want)


def test_a_result_vector_is_not_copied() -> None:
    made = arguments("hc_prenorm_gemm")
    made["out"] = torch.empty(3, 24)
    refused("hc_prenorm_gemm", "sqr_sum", "with strides [2]", made | {"sqr_sum": torch.empty(3, 2)[:, 0]})


# --------------------------------------------------------------------------------------------------------- tensors


@pytest.mark.filterwarnings("ignore")  # sparse CSR and nested tensors are prototypes
@pytest.mark.parametrize("op", OPS)
def test_other_layouts_are_refused(op: str) -> None:
    contract, made = CONTRACTS[op], arguments(op)
    made |= buffers(op, made)
    for _ in range(3):
        getattr(ops, op)(**made)
    for name, arg in contract.args.items():
        if not isinstance(arg, TensorArg) or name not in made:
            continue
        value = made[name]
        layouts: list[tuple[str, Callable[[], torch.Tensor]]] = [("sparse_coo", value.to_sparse)]
        if value.dim() == 2 and value.element_size() > 1:
            layouts += [("sparse_csr", value.to_sparse_csr), ("sparse_csc", value.to_sparse_csc)]
        if value.dtype in (torch.float32, torch.bfloat16):
            layouts.append(("mkldnn", value.to_mkldnn))
        for kind, make in layouts:
            try:
                strange = make()
            except (RuntimeError, NotImplementedError):  # torch has no such tensor of this dtype
                continue
            refused(op, name, f"got a {kind} one", made | {name: strange})
        if value.dim() > 1:
            jagged = torch.nested.nested_tensor([value[0], value[0]], layout=torch.jagged)
            refused(op, name, "got a nested one", made | {name: jagged})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", OPS)
def test_nested_tensors_are_refused(op: str) -> None:
    """Known calls too: a guard of PyTorch's would end the process over a nested tensor."""
    contract, made = CONTRACTS[op], arguments(op)
    for _ in range(3):
        results(op, made)
    for name, arg in contract.args.items():
        if isinstance(arg, TensorArg) and name in made:
            try:
                nested = torch.nested.nested_tensor([made[name]])
            except NotImplementedError:  # torch has none of this dtype
                continue
            refused(op, name, "a nested one", made | {name: nested})


def test_quantized_and_mixed_devices_are_refused() -> None:
    made = arguments("hc_prenorm_gemm")
    results("hc_prenorm_gemm", made)
    refused("hc_prenorm_gemm", "fn", "on cpu", made | {"fn": made["fn"].to("meta")})
    refused("hc_prenorm_gemm", "fn", "on meta", made | {"x": made["x"].to("meta")})
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(made["fn"])
    refused("hc_prenorm_gemm", "x", "expected a FakeTensor", made | {"fn": fake})
    refused("hc_prenorm_gemm", "fn", "expected a FakeTensor", made | {"x": mode.from_tensor(made["x"])})


@pytest.mark.parametrize("op", ["sparse_mla_decode", "paged_mqa_logits"])
def test_pages_hold_something(op: str) -> None:
    made = arguments(op)
    for _ in range(3):
        results(op, made)
    empty = made["k_cache"][:, :0]
    refused(op, "k_cache", "at least one token in a page, got page_size 0", made | {"k_cache": empty})
    if op == "sparse_mla_decode":
        refused(op, "extra_k_cache", "got extra_page_size 0", made | {"extra_k_cache": empty})


@pytest.mark.parametrize("op", [op for op in OPS if "out" in CONTRACTS[op].buffers])
def test_buffers_have_memory_of_their_own(op: str) -> None:
    made = arguments(op)
    made |= buffers(op, made)
    for _ in range(3):
        getattr(ops, op)(**made)
    out = made["out"]
    rows = out.as_strided(out.shape, (1, *out.stride()[1:]))
    refused(op, "out", "expected rows that do not overlap", made | {"out": rows})
    refused(op, "out", "expected rows that do not overlap", made | {"out": out[:1].expand(out.shape)})
    if op.startswith("sparse"):
        refused(op, "out", "shares that of q", made | {"out": made["q"]})
        fresh = torch.zeros(out.numel() + 512, dtype=out.dtype)
        q, shifted = (fresh[start:][: out.numel()].view(out.shape) for start in (0, 512))
        with pytest.raises(ContractError, match=r"argument out: .* shares that of q"):
            CONTRACTS[op].check(**(made | {"q": q, "out": shifted}))
        # Side by side is not shared.
        wide = torch.zeros(*out.shape[:-1], 1024, dtype=out.dtype)
        getattr(ops, op)(**(made | {"q": wide[..., :512], "out": wide[..., 512:]}))
    if op == "hc_prenorm_gemm":
        with pytest.raises(ContractError, match=r"argument out: .* shares that of sqr_sum"):
            CONTRACTS[op].check(**(made | {"sqr_sum": out.view(-1)[:3]}))


@pytest.mark.parametrize(
    "op", [op for op, contract in CONTRACTS.items() if contract.in_place and "state" in contract.args]
)
def test_caches_of_several_kinds_share_a_pool(op: str) -> None:
    """Engines keep the state and the keys in one tensor, each in pages of its own; nothing else may lie there."""
    made = arguments(op)
    state, cache = made["state"], made["k_cache"]
    pages, page_size, entry = len(state), cache.shape[1], cache.shape[-1]
    stride = max(state[0].nbytes, page_size * entry) + -max(state[0].nbytes, page_size * entry) % 576
    pool = torch.zeros(pages, stride, dtype=torch.uint8)
    in_pool = pool.view(torch.float32).as_strided(state.shape, (stride // 4, state.stride(1), 1))
    keys = pool.as_strided((pages, page_size, entry), (stride, entry, 1))
    assert in_pool.data_ptr() == keys.data_ptr()
    CONTRACTS[op].check(**made | {"state": in_pool, "k_cache": keys})
    function = getattr(ops, op)
    assert function(**made | {"state": in_pool, "k_cache": keys}) is keys
    with pytest.raises(ContractError, match=r"argument k_cache: expected memory of its own, shares that of slots"):
        function(**made | {"k_cache": keys, "slots": pool.view(torch.int64)[0, : len(made["slots"])]})


def test_overlaps_itself() -> None:
    x = torch.zeros(100)
    for shape, stride, overlaps in (
        ((3, 4), (4, 1), False),
        ((3, 4), (3, 1), True),
        ((3, 4), (0, 1), True),
        ((1, 4), (0, 1), False),
        ((0, 4), (0, 1), False),
        ((2, 2, 3), (5, 3, 1), True),
        ((2, 3, 2), (1, 2, 10), False),
    ):
        assert overlaps_itself(x.as_strided(shape, stride)) is overlaps, (shape, stride)


# ------------------------------------------------------------------------------------------------- anything at all


DTYPES = [torch.float32, torch.bfloat16, torch.int32, torch.int64, torch.uint8, torch.bool, torch.float64]
DTYPES += [torch.float16, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.uint32]
WRONG_KINDS: list[Any] = [None, 1, 0, -1, 1.5, True, "text", b"x", [], [1.0], (), {}, object(), np.zeros(3)]
WRONG_KINDS += [torch.float32, torch.Size([3]), np.float32(2), 2**63, float("nan"), torch.nn.Linear(1, 1), type]


def _changed(data: st.DataObject, value: torch.Tensor) -> Any:
    """A tensor like this one but for its dtype, shape, strides or class."""
    kind = data.draw(st.sampled_from(["dtype", "shape", "stride", "view", "device", "grad", "class", "same"]))
    if kind == "dtype":
        return torch.zeros(value.shape, dtype=data.draw(st.sampled_from(DTYPES)))
    if kind == "shape":
        sizes = list(value.shape)
        if sizes and data.draw(st.booleans()):
            sizes[data.draw(st.integers(0, len(sizes) - 1))] = data.draw(st.sampled_from([0, 1, 2, 3, 129, 512, 584]))
        else:
            sizes = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 8]), max_size=5))
        return torch.zeros(sizes, dtype=value.dtype)
    if kind == "stride":
        strides = data.draw(st.lists(st.integers(0, 600), min_size=value.dim(), max_size=value.dim()))
        reach = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, strides, strict=True) if size)
        return torch.zeros(reach, dtype=value.dtype).as_strided(value.shape, strides)
    if kind == "view":
        dim = data.draw(st.integers(0, max(value.dim() - 1, 0)))
        views = [lambda: value.unsqueeze(dim), lambda: value.squeeze(), lambda: value.flatten(), lambda: value.mT]
        views += [lambda: value.transpose(0, -1), lambda: value[..., ::2], lambda: value[1:], lambda: value[:1]]
        views += [lambda: value[:1].expand(value.shape), lambda: value[..., :1].expand(value.shape)]
        try:
            return data.draw(st.sampled_from(views))()
        except (RuntimeError, IndexError, ValueError):
            return value
    if kind == "device":
        return value.to("meta")
    if kind == "grad":
        return value.detach().requires_grad_() if value.is_floating_point() else value
    if kind == "class":
        if value.is_floating_point() and data.draw(st.booleans()):
            return torch.nn.Parameter(value.detach(), requires_grad=data.draw(st.booleans()))
        return data.draw(st.sampled_from([torch.nn.Buffer, _Own]))(value.detach())
    return value


class _Own(torch.Tensor):
    """A subclass that changes nothing."""

    @staticmethod
    def __new__(cls, value: torch.Tensor) -> Any:
        return value.as_subclass(cls)


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_nothing_but_contract_errors(data: st.DataObject) -> None:
    """Any one or two arguments changed into anything: the call is served, or refused with a name. Buffers included."""
    op = data.draw(st.sampled_from(OPS))
    contract, made = CONTRACTS[op], arguments(op)
    if data.draw(st.booleans()):
        made |= buffers(op, made)
    for name in data.draw(st.lists(st.sampled_from(list(contract.args)), min_size=1, max_size=2, unique=True)):
        value = made.get(name)
        if isinstance(value, torch.Tensor) and data.draw(st.integers(0, 3)) > 0:
            made[name] = _changed(data, value)
        else:
            made[name] = data.draw(st.sampled_from(WRONG_KINDS))
    try:
        found = results(op, made)
    except (ContractError, NoProviderError) as error:
        said = str(error)
    else:
        assert not any(result.requires_grad for result in found)
        return
    named = re.match(rf"{op}: argument (\w+): ", said)
    # All tensors on the meta device break no contract, and nobody serves there.
    assert (named is not None and named[1] in contract.args) or f"no provider can serve {op} on meta" in said, said
