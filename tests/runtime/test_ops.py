"""The public functions: binding, falling back, counting, compiling."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from installed import provider

import dsv4_backends
from dsv4_backends import CONTRACTS, OPS, NoProviderError, PolicyError, ops, use_providers
from dsv4_backends.runtime import bind
from dsv4_backends.testing import numerics, oracle


def arguments(op: str, name: str = "small") -> dict[str, Any]:
    contract = CONTRACTS[op]
    return contract.inputs(next(case for case in contract.cases if case.name == name), "cpu")


def as_tuple(results: Any) -> tuple[torch.Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


FORMS = [(op, with_buffers) for op, contract in CONTRACTS.items() for with_buffers in contract.forms]
"""The ``torch.library`` forms."""
KERNELS = """
def mqa_logits(q, k, k_scale, weights, row_starts, row_ends, *, max_seqlen_k=None, out=None):
    import torch
    return torch.full((q.shape[0], k.shape[0]), 7.0)
def refuses(q, k, k_scale, weights, row_starts, row_ends, *, max_seqlen_k=None, out=None):
    if q.shape[1] != 32:
        return d.Reason("heads", f"needs 32 heads, the query has {q.shape[1]}")
def never(q, k, k_scale, weights, row_starts, row_ends, *, max_seqlen_k=None, out=None):
    return d.Reason("shape", "never")
def raises(q, k, k_scale, weights, row_starts, row_ends, *, max_seqlen_k=None, out=None):
    raise RuntimeError("the kernel broke")
def wrong(q, k):
    pass
"""


def plugin(target: str, refuses: str | None = None, name: str = "acme") -> str:
    """Of tier native, with one of these kernels."""
    of_op = {"target": f"{name}_plugin:{target}", "refuses": refuses and f"{name}_plugin:{refuses}"}
    return provider({"mqa_logits": {"devices": ("cpu", "cuda"), **of_op}}, name=name, code=KERNELS)


def test_stats_count_calls() -> None:
    bind.reset()
    assert dsv4_backends.stats() == {}
    for _ in range(3):
        ops.mqa_logits(**arguments("mqa_logits"))
    ops.hc_prenorm_gemm(**arguments("hc_prenorm_gemm"))
    assert dsv4_backends.stats() == {"mqa_logits": {"torch": 3}, "hc_prenorm_gemm": {"torch": 1}}
    with use_providers("torch"):
        ops.mqa_logits(**arguments("mqa_logits"))
    assert dsv4_backends.stats()["mqa_logits"] == {"torch": 4}


def test_a_better_provider_serves(fake_plugin: Callable[..., None]) -> None:
    fake_plugin("acme", plugin("mqa_logits"))
    assert (ops.mqa_logits(**arguments("mqa_logits")) == 7).all()
    assert dsv4_backends.stats() == {"mqa_logits": {"acme": 1}}
    with use_providers({"mqa_logits": "torch"}):
        assert not (ops.mqa_logits(**arguments("mqa_logits")) == 7).any()
    assert (ops.mqa_logits(**arguments("mqa_logits")) == 7).all()
    name, function = bind.implementation("mqa_logits", "cpu")
    assert (name, function.__name__) == ("acme", "mqa_logits")


def test_order_allow_and_deny_reach_the_call(fake_plugin: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    fake_plugin("acme", plugin("mqa_logits"))
    for variable in ("ORDER", "ALLOW"):
        monkeypatch.setenv(f"DSV4_BACKENDS_{variable}", "torch")
        bind.reset()
        ops.mqa_logits(**arguments("mqa_logits"))
        assert dsv4_backends.stats() == {"mqa_logits": {"torch": 1}}, variable
        monkeypatch.delenv(f"DSV4_BACKENDS_{variable}")
    bind.reset()
    with use_providers(deny=["acme"]):
        ops.mqa_logits(**arguments("mqa_logits"))
    assert dsv4_backends.stats() == {"mqa_logits": {"torch": 1}}


def test_refusal_by_shape_goes_to_the_next_and_is_logged_once(
    fake_plugin: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    fake_plugin("acme", plugin("mqa_logits", "refuses"))
    with caplog.at_level(logging.WARNING, "dsv4_backends"):
        for _ in range(2):
            ops.mqa_logits(**arguments("mqa_logits"))
        ops.mqa_logits(**arguments("mqa_logits", "32 heads"))
    assert dsv4_backends.stats() == {"mqa_logits": {"acme": 1, "torch": 2}}
    assert [r.getMessage() for r in caplog.records] == ["mqa_logits: acme: needs 32 heads, the query has 8 [heads]"]


def test_refusal_of_a_pinned_provider_raises(fake_plugin: Callable[..., None]) -> None:
    fake_plugin("acme", plugin("mqa_logits", "refuses"))
    with (
        use_providers({"mqa_logits": "acme"}),
        pytest.raises(NoProviderError, match="needs 32 heads, the query has 8"),
    ):
        ops.mqa_logits(**arguments("mqa_logits"))


# Counts the questions, and takes neither strided keys nor a scale of 3.
ASKED = provider(
    {"sparse_mla_prefill": {"target": "acme_plugin:run", "devices": ("cpu",), "refuses": "acme_plugin:refuses"}},
    code="""
asked = []
def run(q, kv, indices, sm_scale, *, attn_sink=None, topk_length=None, out=None):
    return q.new_full((1, 1, 1), 7.0).expand(q.shape), None, None
def refuses(q, kv, indices, sm_scale, *, attn_sink=None, topk_length=None, out=None):
    asked.append((q.shape[0], kv.stride(0), sm_scale, attn_sink is None))
    if kv.stride(0) != 512 or sm_scale == 3:
        return d.Reason("keys", "wants other keys")
""",
)


def prefill(rows: int) -> dict[str, Any]:
    """Each test has its own number of rows, since a contract keeps its guards from test to test."""
    q, kv = torch.zeros(rows, 1, 512).bfloat16(), torch.zeros(9, 512).bfloat16()
    return {"q": q, "kv": kv, "indices": torch.zeros(rows, 5, dtype=torch.int32), "sm_scale": 1.0}


@pytest.fixture
def asking(fake_plugin: Callable[..., None]) -> Callable[[dict[str, Any]], tuple[bool, int]]:
    """Makes a call, and says whether acme served it and how often acme was asked about it."""
    fake_plugin("acme", ASKED)

    def call(made: dict[str, Any]) -> tuple[bool, int]:
        asked = sys.modules["acme_plugin"].asked if "acme_plugin" in sys.modules else []
        before = len(asked)
        out, *_ = ops.sparse_mla_prefill(**made)
        return bool(out[0, 0, 0] == 7), len(sys.modules["acme_plugin"].asked) - before

    return call


def test_a_known_call_does_not_ask_again(asking: Callable[[dict[str, Any]], tuple[bool, int]]) -> None:
    """A guard compares what `refuses` may read: everything but the values and addresses of tensors."""
    made = prefill(11)
    strided = {**made, "kv": torch.zeros(9, 1024).bfloat16()[:, :512]}
    changes = ({**made, "sm_scale": 3.0}, strided, {**made, "attn_sink": torch.zeros(1)}, prefill(12))
    # The contract has a name for calls like this one from the second on.
    assert [asking(made) for _ in range(4)] == [(True, 1), (True, 1), (True, 0), (True, 0)]
    assert asking(prefill(11)) == (True, 0)
    for change, served in zip(changes, (False, False, True, True), strict=True):
        assert asking(change) == (served, 1)
        assert asking(made) == (True, 0)
    assert [asking(strided) for _ in range(3)] == [(False, 1), (False, 1), (False, 0)]
    assert dsv4_backends.stats() == {"sparse_mla_prefill": {"acme": 11, "torch": 5}}


def test_no_answer_outlives_its_settings(asking: Callable[[dict[str, Any]], tuple[bool, int]]) -> None:
    made = prefill(13)
    for _ in range(3):
        asking(made)
    assert asking(made) == (True, 0)
    with use_providers(deny=["acme"]):
        assert [asking(made) for _ in range(2)] == [(False, 0)] * 2
    with use_providers({"sparse_mla_prefill": "acme"}):
        # A chain of its own, which is asked once: a guard matches the call already.
        assert [asking(made) for _ in range(2)] == [(True, 1), (True, 0)]
        with use_providers({"sparse_mla_prefill": "torch"}):
            assert asking(made) == (False, 0)
        assert asking(made) == (True, 0)
        with pytest.raises(NoProviderError, match="wants other keys"):
            asking({**made, "sm_scale": 3.0})
        bind.reset()
        assert [asking(made) for _ in range(2)] == [(True, 1), (True, 0)]
    with use_providers({"sparse_mla_prefill": "acme"}):  # equal to a policy before, and another object
        assert asking(made) == (True, 0)
    assert [asking(made) for _ in range(2)] == [(True, 1), (True, 0)]
    bind.reset()
    assert [asking(made) for _ in range(2)] == [(True, 1), (True, 0)]


def test_no_answer_outlives_a_reset_that_came_while_it_was_made(
    asking: Callable[[dict[str, Any]], tuple[bool, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = prefill(14)
    for _ in range(3):
        asking(made)
    first = bind.Chain.first

    def interrupted(self: Any, *args: Any) -> Any:
        bound = first(self, *args)
        bind.reset()
        return bound

    bind.reset()
    with monkeypatch.context() as patch:
        patch.setattr(bind.Chain, "first", interrupted)
        assert asking(made) == (True, 1)
    assert dsv4_backends.stats() == {}
    assert asking(made) == (True, 1)
    assert dsv4_backends.stats() == {"sparse_mla_prefill": {"acme": 1}}


def test_memory_of_known_calls_is_bounded(asking: Callable[[dict[str, Any]], tuple[bool, int]]) -> None:
    for rows in range(101, 401):
        made = prefill(rows)
        asking(made)
        assert asking(made) == (True, 1)
    (chain,) = bind.current().chains.values()
    for kept in (chain.by_guard, bind.fast_path["sparse_mla_prefill"]):
        assert 0 < len(kept) <= 256
    assert asking(prefill(400)) == (True, 0)


def test_an_import_that_fails_is_not_tried_again(
    fake_plugin: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first refuses every call, the second does not import, and the reference serves."""
    fake_plugin("acme", plugin("mqa_logits", "never"))
    fake_plugin("other", plugin("absent", name="other"))
    asked: list[str] = []
    real = bind.bind_candidate

    def counted(contract: Any, candidate: Any, *more: Any) -> Any:
        asked.append(candidate.name)
        return real(contract, candidate, *more)

    monkeypatch.setattr(bind, "bind_candidate", counted)
    made = arguments("mqa_logits")
    for rows in range(1, len(made["q"])):
        few = {name: made[name][:rows] for name in ("q", "weights", "row_starts", "row_ends")}
        ops.mqa_logits(**(made | few))
    assert dsv4_backends.stats()["mqa_logits"]["torch"] > 1
    assert asked == ["acme", "other", "torch"]


def test_import_that_fails_goes_to_the_next(fake_plugin: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    fake_plugin("acme", plugin("absent"))
    with caplog.at_level(logging.WARNING, "dsv4_backends"):
        ops.mqa_logits(**arguments("mqa_logits"))
    assert dsv4_backends.stats() == {"mqa_logits": {"torch": 1}}
    assert "has no attribute 'absent'" in caplog.text
    acme = bind.resolution("mqa_logits", "cpu").passed_over[0]
    assert [r.code for r in acme.reasons] == ["import-failed"]


def test_import_that_fails_under_a_pin_raises(fake_plugin: Callable[..., None]) -> None:
    fake_plugin("acme", plugin("absent"))
    with use_providers("acme"), pytest.raises(NoProviderError, match="has no attribute 'absent'"):
        ops.mqa_logits(**arguments("mqa_logits"))
    with use_providers("acme"), pytest.raises(NoProviderError, match="pinned to acme"):
        ops.fp8_einsum(**arguments("fp8_einsum"))


def test_wrong_signature_is_a_reason(fake_plugin: Callable[..., None]) -> None:
    fake_plugin("acme", plugin("wrong"))
    ops.mqa_logits(**arguments("mqa_logits"))
    acme = bind.resolution("mqa_logits", "cpu").passed_over[0]
    assert [r.code for r in acme.reasons] == ["signature"]
    assert "acme_plugin:wrong has (q, k), the contract of mqa_logits is (q, k, k_scale" in acme.reasons[0].message


def test_a_provider_that_fails_during_a_call_raises(fake_plugin: Callable[..., None]) -> None:
    """No other provider is tried."""
    fake_plugin("acme", plugin("raises"))
    with pytest.raises(RuntimeError, match="the kernel broke"):
        ops.mqa_logits(**arguments("mqa_logits"))


def test_unknown_op_and_bad_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PolicyError, match="unknown op 'nothing'"):
        bind.resolution("nothing")
    monkeypatch.setenv("DSV4_BACKENDS_ORDER", "nobody")
    bind.reset()
    with pytest.raises(PolicyError, match="unknown provider 'nobody'"):
        ops.mqa_logits(**arguments("mqa_logits"))
    monkeypatch.delenv("DSV4_BACKENDS_ORDER")
    bind.reset()


def test_threads_bind_once() -> None:
    bind.reset()
    made = arguments("mqa_logits")
    threads = [threading.Thread(target=lambda: ops.mqa_logits(**made)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([chain for chain in bind.current().chains if chain[0] == "mqa_logits"]) == 1


@pytest.mark.parametrize("op", OPS)
def test_positional_and_keyword_calls_agree(op: str) -> None:
    contract, made = CONTRACTS[op], arguments(op)
    positional = [made[name] for name in contract.args if not contract.is_keyword(name)]
    rest = {name: value for name, value in made.items() if contract.is_keyword(name)}
    for a, b in zip(as_tuple(getattr(ops, op)(**made)), as_tuple(getattr(ops, op)(*positional, **rest)), strict=True):
        assert numerics.same_bits(a, b)


def buffers(op: str, made: dict[str, Any]) -> dict[str, torch.Tensor]:
    if CONTRACTS[op].in_place:
        return {name: made[name] for name in CONTRACTS[op].buffers}
    fakes = dict(zip(CONTRACTS[op].returns, as_tuple(CONTRACTS[op].function(**made)), strict=True))
    return {name: fakes[name] for name in CONTRACTS[op].buffers}


@pytest.mark.parametrize(("op", "with_buffers"), FORMS)
def test_torch_compile_is_one_op(op: str, with_buffers: bool) -> None:
    """The graph holds one library op, and the compiled call gives the eager call's bits in the caller's buffers."""
    made = arguments(op)
    eager = as_tuple(getattr(ops, op)(**made))
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=backend)
    def run(made: dict[str, Any]) -> Any:
        return getattr(ops, op)(**made)

    given = buffers(op, made) if with_buffers else {}
    results = as_tuple(run(made | given))
    (graph,) = graphs
    called = [node.target for node in graph.graph.nodes if node.op == "call_function" and "dsv4" in str(node.target)]
    assert [str(target) for target in called] == [
        f"dsv4_backends.{CONTRACTS[op].library_name(with_buffers=with_buffers)}"
    ]
    for name, a, b in zip(CONTRACTS[op].returns, eager, results, strict=True):
        assert numerics.same_bits(a, b)
        if with_buffers and name in given:
            assert b.data_ptr() == given[name].data_ptr()
    torch.compiler.reset()


def test_first_call_ever_may_be_compiled() -> None:
    """Schema and fake exist from the import on: no eager call has to come first."""
    code = """
import torch
from dsv4_backends import CONTRACTS, ops
contract = CONTRACTS["hc_prenorm_gemm"]
made = contract.inputs(contract.cases[0], "cpu")
run = torch.compile(lambda x, fn: ops.hc_prenorm_gemm(x, fn), fullgraph=True, backend="aot_eager")
mixes, _ = run(made["x"], made["fn"])
assert torch.allclose(mixes, made["x"].float() @ made["fn"].T, atol=1e-5)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.parametrize(("op", "with_buffers"), FORMS)
def test_opcheck(op: str, with_buffers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    contract = CONTRACTS[op]
    made = arguments(op)
    if with_buffers:
        made |= buffers(op, made)
    plain = torch.allclose

    def allclose(a: torch.Tensor, b: torch.Tensor, *args: Any, **kwargs: Any) -> bool:
        # opcheck compares the inputs before and after with allclose, which fp8 lacks, and NaN padding breaks.
        a, b = (x.contiguous().view(torch.uint8) if x.element_size() == 1 else x for x in (a, b))
        return plain(a, b, *args, **(kwargs | {"equal_nan": True}))

    monkeypatch.setattr(torch, "allclose", allclose)
    target = getattr(torch.ops.dsv4_backends, contract.library_name(with_buffers=with_buffers))
    values = [made.get(name) for name in contract.library_names(with_buffers=with_buffers)]
    torch.library.opcheck(target, tuple(values))


def test_dynamic_shapes_compile_once() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def run(x: torch.Tensor, fn: torch.Tensor) -> Any:
        return ops.hc_prenorm_gemm(x, fn)

    fn = torch.randn(24, 256)
    for m in (3, 5, 17):
        x = torch.randn(m, 256).bfloat16()
        mixes, squares = run(x, fn)
        assert mixes.shape == (m, 24)
        assert squares.shape == (m,)
    assert len(graphs) == 1
    torch.compiler.reset()


@pytest.mark.parametrize("m", [0, 2])
@pytest.mark.parametrize("k", [0, 8, 200])
def test_the_reference_does_no_work_for_splits_without_k(monkeypatch: pytest.MonkeyPatch, m: int, k: int) -> None:
    from dsv4_backend_torch import hyper_connection as home

    shares: list[int] = []
    matmul = home.matmul

    def counted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        shares.append(a.shape[1])
        assert len(shares) < 10
        return matmul(a, b)

    x, fn = torch.randn(m, k).bfloat16(), torch.randn(3, k)
    splits = 2**20 if m else 2**31 - 1
    monkeypatch.setattr(home, "matmul", counted)
    # Where there are no rows there is no product to be counted.
    monkeypatch.setattr(home, "row_chunks", lambda rows, size: pytest.fail("a loop") if rows == 0 else [slice(rows)])
    mixes, squares = home.hc_prenorm_gemm(x, fn, num_splits=splits)
    assert (mixes.shape, squares.shape) == ((splits, m, 3), (splits, m))
    if m:
        torch.testing.assert_close(mixes.sum(0), x.float() @ fn.T)
        torch.testing.assert_close(squares.sum(0), x.float().square().sum(1))


def test_parameters_and_fake_tensors_work() -> None:
    x, fn = torch.randn(3, 64).bfloat16(), torch.randn(8, 64)
    plain, _ = ops.hc_prenorm_gemm(x, fn)
    as_parameter, _ = ops.hc_prenorm_gemm(torch.nn.Parameter(x, requires_grad=False), fn)
    assert torch.equal(plain, as_parameter)
    with torch._subclasses.FakeTensorMode() as mode:
        fake, squares = ops.hc_prenorm_gemm(mode.from_tensor(x), mode.from_tensor(fn))
    assert isinstance(fake, torch._subclasses.FakeTensor)
    assert (fake.shape, squares.shape) == ((3, 8), (3,))


@pytest.mark.parametrize("op", OPS)
def test_default_level_on_the_cpu(op: str) -> None:
    """The reference against the oracle at the model's real dimensions."""
    contract = CONTRACTS[op]
    for case in contract.at_level("default"):
        made = contract.inputs(case, "cpu")
        results = oracle.finished(op, made, as_tuple(getattr(ops, op)(**made)))
        for name, result, want in zip(contract.returns, results, oracle.expected(op, made), strict=True):
            error = numerics.compare(result, want, contract.tolerances[name])
            assert error.ok, (case.name, name, error)


@pytest.mark.filterwarnings("ignore")  # of PyTorch's own, at the import of Inductor
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_einsum_with_e8m0_scales_and_a_buffer(backend: str) -> None:
    """Inductor cannot take an op apart that mutates one tensor and is given another as E8M0."""
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("Inductor needs a C++ compiler on the CPU")
    made = arguments("fp8_einsum", "e8m0")
    eager = ops.fp8_einsum(**made)
    torch.compiler.reset()
    out = torch.empty_like(eager)
    compiled = torch.compile(lambda out, **made: ops.fp8_einsum(**made, out=out), fullgraph=True, backend=backend)
    result = compiled(out, **made)
    assert torch.equal(result, eager)
    assert torch.equal(out, eager)
    torch.compiler.reset()
