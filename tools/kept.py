"""A dataclass for each kind of file in docs/results, apart from the results of ``bench``.

``dsv4_backends.records`` writes and reads them. A file has the data of a page, and how it was made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from packaging.version import Version

from dsv4_backends import records
from dsv4_backends.bench.provenance import Made, Measured
from dsv4_backends.bench.results import Verdict

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "results"


# ---------------------------------------------------------------------------------------------- compile matrices


class Cell(NamedTuple):
    """What a compiled kernel takes of an architecture, in registers a thread, bytes a thread and bytes a block.

    With an ``error``, which says why the kernel is bad there, the numbers may be missing.
    """

    registers: int = 0
    stack: int = 0
    shared: int = 0
    error: str = ""


class Total(NamedTuple):
    """Of all kernels for an architecture: how many, and the most registers a thread and bytes a block of any."""

    kernels: int
    registers: int
    shared: int


@dataclass(frozen=True, kw_only=True)
class Matrix(Made):
    """What the kernels take, compiled by one release of Triton. No machine: every one compiles the same.

    Attributes:
        shared_limit: Bytes of shared memory that a block may have, by compute capability.
        totals: By compute capability.
        kernels: Those with stack or an error, by kernel and its constants, then by compute capability.
    """

    triton: str
    shared_limit: dict[str, int] = field(default_factory=dict)
    totals: dict[str, Total] = field(default_factory=dict)
    kernels: dict[str, dict[str, Cell]] = field(default_factory=dict)

    @property
    def release(self) -> tuple[int, ...]:
        return Version(self.triton).release[:2]


def matrices(folder: Path = FOLDER) -> list[Matrix]:
    """The matrices that the docs show, oldest release first."""
    found = [records.read(Matrix, path) for path in folder.glob("compile-matrix-*.json")]
    return sorted(found, key=lambda matrix: matrix.release)


def matrix_of(triton: str, folder: Path = FOLDER) -> Matrix | None:
    """The one of a release, whatever its patch level."""
    return next((m for m in matrices(folder) if m.release == Version(triton).release[:2]), None)


# -------------------------------------------------------------------------------------------------- what calls cost


@dataclass(frozen=True)
class OverheadRow:
    """Microseconds of a call of an op whose implementation returns at once.

    Attributes:
        op, tensors: The op, and how many tensors the call has.
        direct_us, call_us: Of the implementation itself, and through ``dsv4_backends.ops``.
        check_us: The time of the whole check, for a call that matches no guard.
    """

    op: str
    tensors: int
    direct_us: float
    call_us: float
    check_us: float

    @property
    def added_us(self) -> float:
        return self.call_us - self.direct_us


@dataclass(frozen=True, kw_only=True)
class Overhead(Measured):
    """Of tools/overhead.py."""

    rows: tuple[OverheadRow, ...]


@dataclass(frozen=True)
class NativeRow:
    """Microseconds of a call of a native library, directly and through the adapter; on the GPU, and on the host.

    Attributes:
        op, case, mode: What is called, on which sizes, and in which way: ``step`` or ``call``.
        error: Why there are no times.
    """

    op: str
    case: str
    mode: str
    gpu_direct_us: float = 0.0
    gpu_adapter_us: float = 0.0
    host_direct_us: float = 0.0
    host_adapter_us: float = 0.0
    error: str = ""

    @property
    def gpu_added_percent(self) -> float:
        return 100 * (self.gpu_adapter_us / self.gpu_direct_us - 1)

    @property
    def host_added_us(self) -> float:
        return self.host_adapter_us - self.host_direct_us


@dataclass(frozen=True, kw_only=True)
class NativeOverhead(Measured):
    """Of tools/native_overhead.py."""

    rows: tuple[NativeRow, ...]


@dataclass(frozen=True)
class FloorRow:
    """Microseconds of a call of ``launches`` kernels, of empty ones of the same grids, and of such with two or three
    dependent reads.

    Attributes:
        floor: Of the least arithmetic and the least traffic, at the rates of the same run.
        stream: Of a kernel that reads and writes as many bytes as that traffic, in a row.
        access: Of one that makes the call's loads and stores, without its products.
    """

    op: str
    name: str
    call: float
    empty: float
    two: float
    three: float
    launches: int = 1
    floor: float | None = None
    stream: float | None = None
    access: float | None = None


@dataclass(frozen=True, kw_only=True)
class Floor(Measured):
    """Of tools/launch_floor.py."""

    rows: tuple[FloorRow, ...]


@dataclass(frozen=True)
class TimeMove:
    """Median microseconds of one provider on one row of ``bench``."""

    op: str
    row: str
    provider: str
    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class TritonTimes(Measured):
    """Of tools/compare_tritons.py.

    Attributes:
        before: The release of Triton that came first; the machine has the other.
        choice: How good the shipped table's choice is with the other.
    """

    before: str
    choice: Verdict
    rows: tuple[TimeMove, ...]


@dataclass(frozen=True)
class TopkRow:
    """Microseconds of a top-k op, and of the logits followed by ``torch.topk``."""

    op: str
    name: str
    us: float
    two_calls_us: float


@dataclass(frozen=True, kw_only=True)
class Topk(Measured):
    """Of tools/topk_baseline.py."""

    rows: tuple[TopkRow, ...]


@dataclass(frozen=True)
class PlainGemmRow:
    """Microseconds and TFLOP/s of an op, and the TFLOP/s of a plain bf16 GEMM."""

    op: str
    name: str
    us: float
    tflops: float
    plain: float


@dataclass(frozen=True, kw_only=True)
class PlainGemm(Measured):
    """Of tools/plain_gemm.py."""

    rows: tuple[PlainGemmRow, ...]


@dataclass(frozen=True)
class SameBytesRow:
    """Of ``result``, over so many calls: bytes that were written, and those that vLLM's kernel writes otherwise."""

    op: str
    result: str
    calls: int
    written: int
    differ: int


@dataclass(frozen=True, kw_only=True)
class SameBytes(Measured):
    """Of tools/vllm_kernels/compare_bytes.py."""

    rows: tuple[SameBytesRow, ...]


# -------------------------------------------------------------------------------------------------- suites


@dataclass(frozen=True)
class Failure:
    """A test that failed."""

    test: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Conformance(Measured):
    """Of tools/conformance.py.

    Attributes:
        libraries: The build of each native library.
        level: How many cases.
        complete: Whether all tests ran.
        counts: Of the tests that passed, failed and were skipped.
        skips: How many were skipped for each reason.
        failures: The tests that failed.
    """

    libraries: dict[str, str] = field(default_factory=dict)
    level: str
    complete: bool
    counts: dict[str, int]
    skips: dict[str, int] = field(default_factory=dict)
    failures: tuple[Failure, ...] = ()

    @property
    def refused(self) -> int:
        """How many were skipped since the provider refuses the shape."""
        return sum(count for reason, count in self.skips.items() if reason.startswith("refused"))


@dataclass(frozen=True)
class VllmRun:
    """The tests over the real vLLM with one choice of providers.

    Attributes:
        tests, failures, errors, skipped: How many.
        served: For each op how many calls each provider served.
        failed: The names of those that failed.
        error: Why nothing ran.
    """

    tests: int = 0
    failures: int = 0
    errors: int = 0
    skipped: int = 0
    served: dict[str, dict[str, int]] = field(default_factory=dict)
    failed: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class VllmRuns(Measured):
    """Of tools/vllm_on_gpu.sh: a run for each choice of providers, and vLLM's version."""

    vllm: str
    runs: dict[str, VllmRun]


# -------------------------------------------------------------------------------------------------- served by vLLM


@dataclass(frozen=True)
class Distance:
    """Of two runs over the same tokens.

    Attributes:
        mean, max: Of the absolute differences of the tokens' logprobs.
        top1: At which share of the tokens both find the same one likeliest.
    """

    mean: float
    max: float
    top1: float


@dataclass(frozen=True, kw_only=True)
class ServedNoise(Distance):
    """Of native from itself, with the batches composed in another way (``composition``)."""

    composition: str


@dataclass(frozen=True, kw_only=True)
class ServedDistance(Distance):
    """Of a run from native's, in the same composition of its batches."""

    run: str
    composition: str


@dataclass(frozen=True)
class ReferenceDistance:
    """The mean distance of a run from the run ``torch``, the reference, over the compositions."""

    run: str
    mean: float


@dataclass(frozen=True, kw_only=True)
class Served(Measured):
    """What tools/serve/serve.py served: Flash's dimensions, but for these, with random weights.

    Attributes:
        layers, experts, weights: How many, and the experts' format.
        vllm: Its version.
    """

    layers: int
    experts: int
    weights: str
    vllm: str = "0.33.0"


@dataclass(frozen=True, kw_only=True)
class ServedLogprobs(Served):
    """Of ``serve.py logprobs`` and tools/serve/compare.py.

    Attributes:
        lengths: Of the prompts.
        noise: The distance of native from itself, where its batches are composed otherwise: means over all pairs.
        pairs: Of every other run from native's.
        reference: Of every other run from that of the reference.
    """

    lengths: tuple[int, ...]
    noise: tuple[ServedNoise, ...]
    pairs: tuple[ServedDistance, ...]
    reference: tuple[ReferenceDistance, ...] = ()


@dataclass(frozen=True)
class SpeedRow:
    """So many requests at a time, sent at once; the best pass. The times are medians over the requests.

    Attributes:
        tokens_a_second: Output tokens of all requests.
        first_token_ms: Time to the first token.
        token_ms: Time per output token after the first; None: not recorded.
        seconds: Of each pass, in order; empty: not recorded.
    """

    requests: int
    tokens_a_second: float
    first_token_ms: float
    token_ms: float | None = None
    seconds: tuple[float, ...] = ()


@dataclass(frozen=True)
class KernelTime:
    """GPU time of all calls of one kernel."""

    name: str
    ms: float
    calls: int


@dataclass(frozen=True)
class StepProfile:
    """GPU time of so many steps, by kernel, the longest first. Kernels may overlap.

    Attributes:
        what: ``prefill``, 8 prompts of 1024 tokens; or ``decode``, 8 requests.
        total_ms: Of all kernels, also those that are not listed.
    """

    what: str
    steps: int
    total_ms: float
    kernels: tuple[KernelTime, ...]


@dataclass(frozen=True, kw_only=True)
class SpeedRun:
    """One choice of providers.

    Attributes:
        run: ``native``, ``triton`` or ``auto``.
        start_s: Until the engine was up.
        compiled_while_serving: Of every kernel that Triton compiled after the warm-up, the file it is written in.
        reported: Compilations that vLLM's own monitor reported while serving; None: it was not on.
        odd: Numbers of requests that fill no CUDA graph, served besides.
        profile: Of the first GPU.
    """

    run: str
    start_s: float
    compiled_while_serving: tuple[str, ...]
    rows: tuple[SpeedRow, ...]
    reported: int | None = None
    odd: tuple[int, ...] = ()
    profile: tuple[StepProfile, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ServedSpeed(Served):
    """Of ``serve.py speed``: ``input`` tokens in and ``output`` out, on ``tp`` GPUs.

    Attributes:
        passes: How often each number of requests was served.
        note: What sets this file apart from one of the usual name.
    """

    note: str = ""
    tp: int
    input: int
    output: int
    passes: int
    runs: tuple[SpeedRun, ...]


@dataclass(frozen=True)
class MtpRun:
    """Requests with one speculative token each; ``tokens``: how many each got."""

    run: str
    requests: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class LongRun:
    """One prompt of so many tokens; ``peak_mib``: allocated at most beyond weights and caches."""

    run: str
    prompt: int
    first_token_s: float
    peak_mib: float


@dataclass(frozen=True, kw_only=True)
class ServedOnce(Served):
    """Of ``serve.py mtp`` and ``serve.py long``."""

    mtp: tuple[MtpRun, ...] = ()
    long: tuple[LongRun, ...] = ()


# -------------------------------------------------------------------------------------------------- transformers


@dataclass(frozen=True)
class ModelRow:
    """One call of a model.

    Attributes:
        side, row: How, and what; see tools/transformers_bench.py.
        outcome: ``ran``, or what stopped it; ``message``: its text.
        seconds: Of a prefill, or of a step of decoding.
        peak_extra_bytes: The most memory beyond what was held before.
        host_waits_per_step: How often the host waits for the GPU.
        launches: How many kernels run.
        worst_relative_error: Of an attention block, against eager's.
        served: For each op how many calls each provider served.
    """

    side: str
    row: str
    outcome: str
    message: str = ""
    seconds: float | None = None
    peak_extra_bytes: int | None = None
    host_waits_per_step: int | None = None
    launches: int | None = None
    worst_relative_error: float | None = None
    served: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModelRuns(Measured):
    """Of tools/transformers_bench.py.

    Attributes:
        transformers: Its version.
        model: The model, in words.
        complete: Whether all rows were tried.
        rows: One for each call and side.
    """

    transformers: str
    model: str
    complete: bool
    rows: tuple[ModelRow, ...]

    @property
    def figures(self) -> dict[str, float]:
        """What the rows give together; a figure without both of its rows is missing."""
        ran = {(row.side, row.row): row for row in self.rows if row.outcome == "ran"}
        found: dict[str, float] = {}

        def compare(name: str, row: str, key: str, side: str, *, share: bool = False) -> None:
            eager, ours = (getattr(ran.get((which, row)), key, None) for which in ("eager", side))
            if eager and ours:
                found[name] = ours / eager if share else eager / ours

        row = "prefill 8192"
        compare(f"{row}: times as fast as eager", row, "seconds", "dsv4_backends")
        compare(f"{row}: share of eager's extra memory", row, "peak_extra_bytes", "dsv4_backends", share=True)
        for side in ("dsv4_backends", "packed"):
            for row in ("decode b=1", "decode b=32"):
                compare(f"{row}, {side}: times as fast as eager", row, "seconds", side)
            launches = f"decode b=1, {side}: share of eager's kernels"
            compare(launches, "kernels of decode b=1", "launches", side, share=True)
        check = ran.get(("dsv4_backends", "check 1024"))
        if check is not None and check.worst_relative_error is not None:
            found["worst relative error of an attention block"] = check.worst_relative_error
        return found
