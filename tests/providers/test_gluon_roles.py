"""The warp-specialised kernels of the Triton provider, without a GPU: their sources, run by ``gluon_roles``.

In these calls every ring wraps several times, ends are odd, and some rows are empty. The launches are those that the
op's own function makes for compute capability 9.0, with few stages. Two kernels on mma.sync for 8.0 are here too.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from dsv4_backend_triton import variants
from dsv4_backend_triton.arch import arch_from_capability
from dsv4_backend_triton.launch import recording
from forcing import forced
from gluon_roles import Deadlock, Emulation, Fault, NotEmulated
from packaging.version import Version

from dsv4_backends.contract import CONTRACTS
from dsv4_backends.testing import numerics, oracle


@dataclass(frozen=True)
class Call:
    """A call, on a GPU with so many multiprocessors.

    Attributes:
        config: Of the variant, in the order of its ``Config``; empty: as it plans.
        params: Of the contract's cases.
        early: In the source, (what stands there, what releases a slot before its product is waited for).
    """

    op: str
    variant: str
    config: tuple[int, ...]
    sms: int
    params: dict[str, Any]
    early: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        return inspect.getsource(variants.load(self.op, self.variant))

    def __str__(self) -> str:
        given = (f"{name}={value}" for name, value in self.params.items())
        return " ".join((self.op, self.variant, *map(str, self.config), *given))


def mqa(stages: int, sms: int, *early: str, **params: Any) -> Call:
    return Call("mqa_logits", "wgmma", (stages, 232) if stages else (), sms, params, early)


def paged(rows: int, stages: int, visit: int, sms: int, *early: str, **params: Any) -> Call:
    return Call("paged_mqa_logits", "wgmma", (rows, stages, 240, visit), sms, params, early)


def einsum(block_d: int, halves: int, group: int, stages: int, *early: str, turns: bool = False, **params: Any) -> Call:
    config = (block_d, halves, group, stages, 232, turns)
    return Call("fp8_einsum", "wgmma", config, 2, params, early)


def few(block_b: int, group: int, stages: int, *early: str, **params: Any) -> Call:
    return Call("fp8_einsum", "wgmma_few", (block_b, group, stages, 128), 132, params, early)


def prenorm(variant: str, config: tuple[int, ...], sms: int, *early: str, **params: Any) -> Call:
    return Call("hc_prenorm_gemm", variant, config, sms, params, early)


def prefill(sms: int, *early: str, **params: Any) -> Call:
    return Call("sparse_mla_prefill", "wgmma", (), sms, params, early)


def decode(variant: str, sms: int, *early: str, **params: Any) -> Call:
    return Call("sparse_mla_decode", variant, (), sms, params, early)


MQA_EARLY = "(step + STAGES - 2) % STAGES), pred=j > lo)", "(step + STAGES - 1) % STAGES), pred=more)"
PAGED_EARLY = "(step + STAGES - 4) % STAGES), pred=j > mine)", "(step + STAGES - 2) % STAGES), pred=more)"
GROUP_EARLY = "if g == GROUP - 1", "if g == 0"
HALVES_EARLY = (
    "part = warpgroup_mma_wait(0, deps=[part])\n                mbarrier.arrive(empty.index(slot))",
    "mbarrier.arrive(empty.index(slot))\n                part = warpgroup_mma_wait(0, deps=[part])",
)
PRENORM_EARLY = (
    "acc = warpgroup_mma_wait(0, deps=(acc,))\n        ring.arrive(x_empty.index(stage))",
    "ring.arrive(x_empty.index(stage))\n        acc = warpgroup_mma_wait(0, deps=(acc,))",
)
PREFILL_EARLY = (
    "acc = warpgroup_mma_wait(0, deps=(tok,))\n            ring.arrive(k_empty.index(slot))",
    "ring.arrive(k_empty.index(slot))\n            acc = warpgroup_mma_wait(0, deps=(tok,))",
)
DECODE_EARLY = (
    """\
            acc, m_i, l_parts = _attend(
                queries, k_smem.index(slot), b_smem.index(slot), p_smem, acc, m_i, l_parts, scale_log2, s_mma, False
            )
            ring.arrive(k_empty.index(slot))
""",
    """\
            ring.arrive(k_empty.index(slot))
            acc, m_i, l_parts = _attend(
                queries, k_smem.index(slot), b_smem.index(slot), p_smem, acc, m_i, l_parts, scale_log2, s_mma, False
            )
""",
)
DECODE_LONG_EARLY = (
    "acc = warpgroup_mma_wait(0, deps=(token,))\n        ring.arrive(k_empty.index(slot))",
    "ring.arrive(k_empty.index(slot))\n        acc = warpgroup_mma_wait(0, deps=(token,))",
)
ALL_THREADS_EARLY = "warpgroup_mma_wait(0, deps=(acc,))", "warpgroup_mma_wait(1, deps=(acc,))"


def einsum_sync(tokens: int, step: int, **params: Any) -> Call:
    return Call("fp8_einsum", "mma_sync", (tokens, step), 2, params)


def mqa_sync(stages: int, blocks: int, **params: Any) -> Call:
    return Call("mqa_logits", "mma_sync", (stages, blocks, 255, stages == 1), 2, params)


# One of each kernel and role; these are also run with faults.
MAIN = [
    mqa(2, 2, *MQA_EARLY, m=21, n=1100, ranges="causal"),
    mqa(3, 2, *MQA_EARLY, m=21, n=900, ranges="random", compressed=700),
    paged(2, 4, 2, 2, *PAGED_EARLY, b=9, context=900, next_n=2, columns=1001),
    paged(3, 4, 2, 2, *PAGED_EARLY, b=9, context=500, next_n=3, columns=555),
    einsum(64, 1, 2, 2, *GROUP_EARLY, b=131, h=2, r=768, d=200),
    einsum(128, 1, 2, 2, *GROUP_EARLY, turns=True, b=131, h=2, r=768, d=200, layout="contiguous"),
    einsum(128, 2, 1, 2, *HALVES_EARLY, b=131, h=2, r=640, d=256),
    few(32, 2, 2, *GROUP_EARLY, b=39, h=2, r=1024, d=136),
    prenorm("wgmma", (128, 64, 2, 2, 1), 2, *PRENORM_EARLY, m=150, k=448),
    prenorm("wgmma_tf32", (64, 64, 2, 1), 4, *ALL_THREADS_EARLY, m=70, k=640),
    decode("wgmma", 2, *DECODE_EARLY, b=2, s_q=1, h_q=70, topk=250, invalid="mixed"),
    decode("wgmma_long", 2, *DECODE_LONG_EARLY, b=2, s_q=1, h_q=70, topk=420, invalid="mixed"),
    prefill(2, *PREFILL_EARLY, s_q=5, h_q=70, s_kv=300, topk=300),
]
OTHERS = [
    mqa(4, 5, m=13, n=1000, ranges="any"),
    mqa(4, 3, m=12, n=1500, ranges="batch"),
    mqa(2, 1, m=10, n=500, ranges="empty"),
    mqa(3, 3, m=8, n=1000, ranges="beyond"),
    mqa(4, 3, m=13, n=1000, ranges="any", compressed=300),
    mqa(8, 132, m=9, n=1000, ranges="random", compressed=1500),
    paged(4, 4, 1, 4, b=6, context=600, next_n=4, columns=800),
    paged(4, 5, 2, 2, b=5, context=400, next_n=7),
    paged(3, 5, 1, 2, b=5, context=400, next_n=5, columns=460),
    paged(3, 4, 2, 3, b=4, context=300, next_n=6, lens="any"),
    paged(2, 8, 2, 132, b=5, context=777, next_n=2, flat_lens=True),
    paged(2, 4, 4, 3, b=9, context=300, next_n=2, lens="any", columns=400),
    paged(3, 4, 2, 5, b=9, context=300, next_n=3, lens="any", columns=401),
    paged(4, 4, 2, 3, b=4, context=300, next_n=4, lens="zero"),
    paged(2, 4, 2, 3, b=40, context=200, next_n=2),
    einsum(64, 1, 2, 3, b=131, h=1, r=384, d=72, scales="any fp32"),
    einsum(128, 2, 1, 3, b=70, h=3, r=256, d=512, layout="contiguous"),
    einsum(128, 2, 1, 3, turns=True, b=131, h=2, r=640, d=256),
    few(16, 4, 2, b=17, h=2, r=1536, d=72),
    few(64, 2, 3, b=70, h=1, r=1024, d=64, layout="contiguous"),
    prenorm("wgmma", (64, 64, 3, 2, 1), 8, m=70, k=1024, n=32),
    prenorm("wgmma_tf32", (64, 128, 3, 1), 1, m=70, k=1024, n=5),
    prenorm("wgmma_tf32", (64, 64, 7, 2), 4, m=65, k=1280, num_splits=2),
    prefill(3, s_q=7, h_q=8, s_kv=161, topk=231, invalid="extreme", length="any", layout="strided"),
    prefill(1, s_q=3, h_q=8, s_kv=80, topk=48, length="zero"),
    prefill(2, s_q=4, h_q=64, s_kv=130, topk=65, sink="none"),
    decode("wgmma", 132, b=2, s_q=1, h_q=64, topk=150, extra_topk=47, extra_page_size=2),
    decode("wgmma", 3, b=3, s_q=2, h_q=64, topk=150, length="random", extra_topk=70, extra_length="zero", sink="mixed"),
    decode("wgmma_long", 3, b=3, s_q=2, h_q=70, topk=250, extra_topk=130, extra_length="random", sink="none"),
    decode("wgmma_long", 4, b=2, s_q=1, h_q=64, topk=700, invalid="extreme", length="any"),
    # The rows' splits follow from the lengths, with 1, 2 and 3 for rows that are equally long.
    decode("wgmma_long", 5, b=5, s_q=1, h_q=8, topk=150, length="any", extra_topk=1100, extra_length="random"),
    decode("wgmma_long", 12, b=3, s_q=2, h_q=64, topk=65, extra_topk=1030, extra_length="random", sink="mixed"),
    decode("wgmma_long", 18, b=3, s_q=1, h_q=70, topk=250, extra_topk=1100, extra_length="any", invalid="extreme"),
    decode("wgmma_long", 10, b=5, s_q=1, h_q=8, topk=150, length="zero", extra_topk=1100, extra_length="zero"),
    decode("wgmma_long", 5, b=5, s_q=1, h_q=8, topk=65, extra_topk=1024, extra_page_size=2, extra_length="random"),
    # As planned, with the rings of a real launch.
    mqa(0, 132, m=21, n=1000, ranges="causal"),
]
SYNC = [
    einsum_sync(256, 128, b=300, h=1, r=512, d=256),
    einsum_sync(256, 128, b=300, h=1, r=384, d=256),  # with half of the step
    einsum_sync(256, 128, b=131, h=1, r=768, d=72, scales="any fp32"),
    einsum_sync(128, 32, b=131, h=2, r=128, d=72, layout="contiguous"),
    einsum_sync(128, 64, b=131, h=1, r=384, d=136, scales="any fp32"),
    mqa_sync(2, 1, m=21, n=1100, ranges="causal"),
    mqa_sync(3, 32, m=13, n=1000, ranges="any"),
    mqa_sync(1, 1, m=10, n=500, ranges="empty"),
    mqa_sync(1, 1, m=21, n=1100, ranges="causal"),
    mqa_sync(4, 1, m=13, n=1000, ranges="any", compressed=300),
    mqa_sync(2, 32, m=9, n=1000, ranges="random", compressed=1500),
    mqa_sync(1, 1, m=3, n=3700, ranges="causal"),  # two waves
    mqa_sync(1, 3, m=5, n=4000, ranges="random", compressed=3700),
]


@pytest.fixture(autouse=True)
def one_thread_and_poison() -> Iterator[None]:
    """Roles are many threads, and their products are small. What ``torch.empty`` makes is NaN."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[Call, Emulation], str]:
    """Runs a call; returns what is wrong with its results, if anything is."""

    def made(call: Call, emulation: Emulation, change: Callable[..., None] = lambda **_: None) -> str:
        contract = CONTRACTS[call.op]
        arguments = contract.make(torch.device("cpu"), torch.Generator().manual_seed(0), **call.params)
        change(**arguments)
        home = importlib.import_module(f"dsv4_backend_triton.{variants.OPS[call.op].folder}.op")
        arch = arch_from_capability(Version("8.0" if call.variant == "mma_sync" else "9.0"), call.sms)
        monkeypatch.setattr(home, "arch_of", lambda _: arch)
        config = variants.load(call.op, call.variant).Config(*call.config) if call.config else None
        with forced(call.op, call.variant, config), recording(emulation, arch):
            results = getattr(home, call.op)(**arguments)
        results = results if isinstance(results, tuple) else (results,)
        finished = oracle.finished(call.op, arguments, results)
        for name, result, found, want in zip(
            contract.returns, results, finished, oracle.expected(call.op, arguments), strict=True
        ):
            error = numerics.compare(found, want, contract.tolerances[name])
            if not error.ok:
                return f"{name}: {error}"
            if (times := emulation.written(result)).ne(1).any():
                return f"{name}: elements are written {times.unique().tolist()} times"
        return ""

    return made


def test_every_warp_specialised_kernel_is_here() -> None:
    in_gluon = [(op, one) for op, listed in variants.OPS.items() for one in listed.variants if one.gluon]
    sources = {(op, one.name): inspect.getsource(variants.load(op, one.name)) for op, one in in_gluon}
    specialised = {kernel for kernel, source in sources.items() if "warp_specialize" in source}
    assert len(specialised) >= 8
    assert specialised <= {(call.op, call.variant) for call in MAIN}


@pytest.mark.parametrize("call", MAIN + OTHERS + SYNC, ids=str)
def test_results(call: Call, run: Callable[[Call, Emulation], str]) -> None:
    """They are the oracle's, and every element is written once."""
    emulation = Emulation()
    assert run(call, emulation) == ""
    assert emulation.launched[0] == call.variant


def _nan_codes(x: torch.Tensor, w: torch.Tensor, **_: Any) -> None:
    x.view(torch.uint8)[7, 0, 5] = 0x7F
    w.view(torch.uint8)[0, 9, 200] = 0xFF


def _signs(x_scale: torch.Tensor, **_: Any) -> None:
    x_scale[..., ::2] *= -1


def _wide(x_scale: torch.Tensor, **_: Any) -> None:
    x_scale[3, 0, ::2] = 2.0**-20


def _irregular(x_scale: torch.Tensor, **_: Any) -> None:
    x_scale[3, 0, 1], x_scale[5, 0, 0], x_scale[6] = 0.0, 2.0**100, 1.25


@pytest.mark.parametrize("change", [_nan_codes, _signs, _wide, _irregular])
@pytest.mark.parametrize("scales", ["fp32", "any fp32"])
def test_every_kind_of_scale(change: Callable[..., None], scales: str, run: Callable[..., str]) -> None:
    """Of ``fp8_einsum`` on mma.sync: in the operands, with the accumulator to another unit, or with two."""
    call = einsum_sync(128, 64, b=131, h=1, r=384, d=72, scales=scales)
    assert run(call, Emulation(), change) == ""


def _overflowing(x_scale: torch.Tensor, **_: Any) -> None:
    x_scale[3, 0, 1] = 2.0**127


@pytest.mark.parametrize("scales", ["fp32", "any fp32"])
def test_a_result_beyond_bf16_is_infinite(scales: str, run: Callable[..., str]) -> None:
    """And not NaN. The oracle's is finite: it is not rounded to bf16."""
    call = einsum_sync(128, 64, b=131, h=1, r=384, d=72, scales=scales)
    assert "inf instead of" in run(call, Emulation(), _overflowing)


def test_a_copy_that_is_not_waited_for_is_found(run: Callable[..., str]) -> None:
    """In a kernel without roles, whose threads wait for their own copies."""
    call = mqa_sync(3, 1, m=21, n=1100, ranges="causal")
    waits = "wait_group(AHEAD - 1)"
    assert waits in call.source
    assert run(call, Emulation(edit=lambda source: source.replace(waits, "wait_group(AHEAD)")))


ARRIVALS = "mbarrier.arrive(", "async_copy.mbarrier_arrive(", "ring.arrive(", "ring.publish("


def arrivals(source: str) -> list[str]:
    """The statements of a file by which roles arrive at barriers."""
    statements = [
        ast.get_source_segment(source, n) or "" for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Expr)
    ]
    return sorted({s for s in statements if s.startswith(ARRIVALS)})


def without(statement: str, source: str) -> str:
    return source.replace(statement, "pass")


@pytest.mark.parametrize(
    "kernel", sorted({(call.op, call.variant) for call in MAIN if arrivals(call.source)}), ids=" ".join
)
def test_a_missing_arrival_is_found(kernel: tuple[str, str], run: Callable[[Call, Emulation], str]) -> None:
    """Each in turn is left out. Every call but those that do not reach it comes to a deadlock."""
    calls = [call for call in MAIN + OTHERS if (call.op, call.variant) == kernel]

    def waits(call: Call, statement: str) -> str:
        try:
            run(call, Emulation(edit=partial(without, statement)))
        except Deadlock as deadlock:
            return str(deadlock)
        return ""

    for statement in arrivals(calls[0].source):
        found = next(filter(None, (waits(call, statement) for call in calls)), "")
        assert re.search(rf"program .*: _\w+ \d at {kernel[1]}\.py:\d", found), statement


@pytest.mark.parametrize("call", MAIN, ids=str)
def test_a_slot_released_early_is_found(call: Call, run: Callable[[Call, Emulation], str]) -> None:
    before, after = call.early
    assert before in call.source
    try:
        wrong = run(call, Emulation(edit=lambda source: source.replace(before, after)))
    except Fault as fault:
        wrong = str(fault)
    assert wrong


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("mbarrier.wait(full.index(slot), phase)", "pass", "nan instead of"),
        ("GROUP * ((2 * TOKENS", "2 * GROUP * ((2 * TOKENS", "program .*_producer 2 at wgmma.py"),
        ("(token < B))[:, None] & (col < N)[None, :]", "(token < B))[:, None]", "written|elements"),
        ("x_smem.index(2 * block + 1)", "x_smem.index(2 * block + 200)", "buffer 2.. of 8 in shared memory"),
        ("gl.convert_layout(", "gl.gather(", "triton.language.core.gather"),
    ],
)
def test_other_faults_are_found(before: str, after: str, said: str, run: Callable[[Call, Emulation], str]) -> None:
    """Nobody waits for a slot to be full, more bytes are expected than come, too much is stored, there is no such slot,
    and what the emulator does not know is named."""
    call = einsum(64, 1, 2, 2, b=131, h=2, r=768, d=200)
    assert before in call.source
    try:
        wrong = run(call, Emulation(edit=lambda source: source.replace(before, after)))
    except (Deadlock, Fault, NotEmulated) as error:
        wrong = str(error)
    assert re.search(said, wrong)
