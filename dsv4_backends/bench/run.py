"""Measure providers on rows: judge the result on the same shape, then time."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..contract import CONTRACTS, OPS
from ..contract.models import MODELS
from ..errors import NoProviderError
from ..runtime import bind
from ..selection import builds, machine, plugins, policy
from ..selection import capability as cc
from ..selection.foreign import words
from ..selection.provider import ProviderSpec, Tier
from . import inputs, shapes
from .provenance import provenance
from .results import SCHEMA_VERSION, Result, Row, Timing, label

if TYPE_CHECKING:
    import torch

    from .timing import Time

CHECKED_ROWS = 256
"""The number of rows of a result that are compared with the oracle, spread evenly."""


class DeviceLost(Exception):
    """The CUDA context is broken, for example by an illegal access. Nothing more can be measured in this process."""


def bench(
    wanted_ops: Sequence[str],
    providers: Sequence[str],
    models: Sequence[str],
    tp: int,
    device: torch.device | str | None,
    progress: Callable[[str], None],
    save: Callable[[Result], None] = lambda result: None,
    also_as: Sequence[str] = (),
    scales: str = shapes.SCALES[0],
) -> Result:
    """Measure, and return the result that ``--json`` writes.

    Args:
        wanted_ops: Op names.
        providers: Provider names; empty: all that can run here except the slow reference; on a CPU all.
        models: See ``shapes.rows``.
        tp: Tensor parallel size.
        device: A torch device; None: the current GPU, or the CPU.
        progress: Gets a line of text for each row.
        save: Gets the result so far after each row, so that an interrupted run keeps it.
        also_as: Architectures such as ``sm_80``: providers are measured again for each, with the code that they
            would run there.
        scales: See ``shapes.rows``.

    Raises:
        PolicyError: not an architecture, or no such device.
        NoProviderError: a provider was named and cannot run any of the ops here.
        ValueError: not a model, or its heads do not divide by ``tp``.
    """
    import torch

    from .timing import Timer, rates

    where = machine.torch_device(device)
    on_gpu = where.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(where)
    architectures = [cc.sm(cc.parse_capability(text, "also_as")) for text in also_as]
    subjects, absent = _subjects(wanted_ops, providers, where, architectures)
    rows = shapes.rows(models, tp, wanted_ops, scales)
    rows = rows if on_gpu else shapes.tiny(wanted_ops, scales)
    started = time.perf_counter()
    progress("measuring the machine's own rates")
    timer = Timer(where)
    measured = rates(timer)
    names = {entry.subject.provider for found in subjects.values() for entry in found}
    result = Result(
        **provenance(_command(wanted_ops, providers, models, tp, also_as, scales)),
        schema_version=SCHEMA_VERSION,
        device=machine.device_of(where),
        providers={spec.name: _versions(spec) for spec in _specs() if spec.name in names},
        absent=absent,
        order={op: _order(op, where) for op in wanted_ops},
        rates=measured,
        samples=timer.samples,
        rows=(),
    )
    lost = ""
    for index, row in enumerate(rows, 1):
        progress(f"{index}/{len(rows)} {row.op} {row.name}")
        try:
            if lost:
                raise DeviceLost(lost)
            done = _row(row, subjects[row.op], timer)
        except DeviceLost as error:
            done = _unmeasured(row, f"not measured, the device was lost: {error}")
            lost = str(error)
        except Exception as error:  # an error on one row must not lose the others
            done = _unmeasured(row, words(error))
        seconds = round(time.perf_counter() - started, 1)
        result = dataclasses.replace(result, rows=(*result.rows, done), seconds=seconds)
        save(result)
        gc.collect()
        if on_gpu and not lost:
            torch.cuda.empty_cache()
    return result


def _command(
    wanted_ops: Sequence[str],
    providers: Sequence[str],
    models: Sequence[str],
    tp: int,
    also_as: Sequence[str],
    scales: str,
) -> str:
    """The command that measures the same again, without output files."""
    ours = (name for name in sorted(os.environ) if name.startswith((policy.PREFIX, "TRITON_OVERRIDE_ARCH")))
    settings = [f"{name}={os.environ[name]}" for name in ours]
    words = [f"--op {op}" for op in wanted_ops] if tuple(wanted_ops) != OPS else []
    words += [f"--provider {name}" for name in providers]
    words += [f"--model {model if model in MODELS else Path(model).name}" for model in models]
    words += [f"--tp {tp}"] if tp != 1 else []
    words += [f"--also-as {text}" for text in also_as]
    words += [f"--scales {scales}"] if scales != shapes.SCALES[0] else []
    return " ".join([*settings, "dsv4-backends bench", *words])


def _specs() -> tuple[ProviderSpec, ...]:
    return plugins.load(policy.from_environment().deny).providers


def _versions(spec: ProviderSpec) -> dict[str, str]:
    """The versions of a provider's packages."""
    from packaging.requirements import Requirement

    installed = machine.Installed()
    needed = [Requirement(text).name for text in spec.requires]
    adapted = {build.name for build in builds.load(spec).values() if build.name}
    return {name: installed[name] for name in needed if name in installed} | {
        name: version for name, _, version in (text.partition(" ") for text in sorted(adapted))
    }


def _order(op: str, where: Any) -> tuple[str, ...]:
    """The providers that can serve ``op`` here, in the order of the automatic choice without measurements."""
    found = bind.resolution_under(policy.Policy(experimental=True), op, where)
    return tuple(dict.fromkeys(candidate.name for candidate in found.accepted))


@dataclass(frozen=True)
class _Entry:
    """A provider to measure, with its code for this GPU or for another architecture."""

    subject: Any
    simulated: str = ""

    @property
    def label(self) -> str:
        return label(self.subject.provider, self.simulated)

    def failed(self, error: str) -> Timing:
        return Timing(self.subject.provider, error=error, simulated=self.simulated)

    def timed(self, taken: Time) -> Timing:
        return Timing(self.subject.provider, taken.us, taken.q1, taken.q3, simulated=self.simulated)

    def refusal(self, arguments: dict[str, Any]) -> Any:
        with _as(self.simulated):
            return self.subject.refusal(arguments)

    def run(self, arguments: dict[str, Any]) -> Any:
        with _as(self.simulated):
            return self.subject.run(arguments)


@contextlib.contextmanager
def _as(simulated: str) -> Iterator[None]:
    """A block in which this machine's GPUs count as another architecture; None: as their own."""
    if not simulated:
        yield
        return
    name = f"{policy.PREFIX}DEVICE"
    before = os.environ.get(name)
    os.environ[name] = simulated
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _subjects(
    wanted_ops: Sequence[str], providers: Sequence[str], where: Any, also_as: Sequence[str]
) -> tuple[dict[str, list[_Entry]], dict[str, dict[str, str]]]:
    """The providers to measure for each op, and the reason for each one that is not measured."""
    from ..testing import checks

    subjects: dict[str, list[_Entry]] = {op: [] for op in wanted_ops}
    absent: dict[str, dict[str, str]] = {}
    for spec in _specs():
        served = {implementation.op for implementation in spec.implementations}
        for op in wanted_ops:
            if op not in served or (providers and spec.name not in providers):
                continue
            if not providers and where.type == "cuda" and spec.tier is Tier.REFERENCE:
                absent.setdefault(op, {})[spec.name] = f"the reference is slow; --provider {spec.name} measures it"
                continue
            for simulated in ("", *also_as):
                try:
                    with _as(simulated):
                        subjects[op].append(_Entry(checks.subject(spec.name, op, where), simulated))
                except NoProviderError as error:
                    reasons = error.resolution.candidates if error.resolution is not None else ()
                    own = [c for c in reasons if c.name == spec.name]
                    refused = [str(r) for c in own for r in c.reasons if r.code != "not-pinned"]
                    absent.setdefault(op, {})[label(spec.name, simulated)] = "; ".join(refused) or str(error)
    if not any(subjects.values()):
        why = "\n".join(f"  {op}: {name}: {text}" for op, all_ in absent.items() for name, text in all_.items())
        raise NoProviderError(f"nothing to measure on {where}:\n{why}" if why else f"nothing to measure on {where}")
    return subjects, absent


def _unmeasured(row: shapes.Row, error: str) -> Row:
    return Row(row.op, row.name, dict(row.params), error=error)


def _row(row: shapes.Row, entries: Sequence[_Entry], timer: Any) -> Row:
    from .timing import Captured

    contract = CONTRACTS[row.op]
    arguments = inputs.draw(row, timer.device)
    contract.check(**arguments)
    cost = contract.cost(**arguments)
    judge = Judge(row.op, arguments)
    calls: dict[str, Captured] = {}
    errors: dict[str, str] = {}
    for entry in entries:
        try:
            if (refusal := entry.refusal(arguments)) is not None:
                errors[entry.label] = f"refused: {refusal}"
                continue
            call = Captured(functools.partial(entry.run, arguments), timer.device)
            if wrong := judge(call):
                errors[entry.label] = wrong
            else:
                calls[entry.label] = call
        except Exception as error:
            errors[entry.label] = words(error)
            _require_alive(timer, errors[entry.label])
    try:
        taken = timer.interleaved(calls) if calls else {}
    except Exception as error:
        _require_alive(timer, words(error))
        raise
    return Row(
        op=row.op,
        name=row.name,
        params=dict(row.params),
        flops=cost.flops,
        bytes=cost.bytes,
        math=cost.math,
        auto=_auto(row.op, arguments),
        timings=tuple(
            entry.failed(errors[entry.label]) if entry.label in errors else entry.timed(taken[entry.label])
            for entry in entries
        ),
    )


def _auto(op: str, arguments: dict[str, Any]) -> str | None:
    """The provider that the automatic choice gives for this call."""
    try:
        return bind.who_serves(op, arguments)
    except NoProviderError:
        return None


def _require_alive(timer: Any, after: str) -> None:
    if timer.on_gpu:
        import torch

        try:
            torch.cuda.synchronize(timer.device)
        except Exception:
            raise DeviceLost(after) from None


class Judge:
    """Compares the results of a replay with the oracle in fp64, on rows spread evenly over the batch."""

    def __init__(self, op: str, arguments: dict[str, Any]) -> None:
        from ..testing import checks

        self.op, self.contract, self.arguments = op, CONTRACTS[op], arguments
        self.batch = len(arguments[self.contract.batch])
        # An odd step reaches every position within a tile. The last row is always included.
        step = -(-self.batch // CHECKED_ROWS) | 1
        self.rows = slice((self.batch - 1) % step, self.batch, step)
        # The buffers of an op in place, as before any call.
        self.before = {name: arguments[name].clone() for name in self.contract.buffers if self.contract.in_place}
        self.sample = checks.select_rows(self.contract, arguments | self.before, self.rows)
        self.expected: tuple[Any, ...] | None = None

    def __call__(self, call: Any) -> str:
        """The error in the results of ``call``; empty if they are right."""
        from ..testing import checks, numerics, oracle

        if self.expected is None:  # once for all providers
            self.expected = oracle.expected(self.op, self.sample)
        if call.results is not None:  # the graph's own buffers: elements that it does not write stay NaN
            for name, result in zip(self.contract.returns, call.results, strict=True):
                if name in self.before:
                    result.copy_(self.before[name])
                else:
                    checks.spoilt(result)
        call.replay()
        sampled = zip(self.contract.returns, call.results, strict=True)
        cut = tuple(result if name in self.before else self._cut(result) for name, result in sampled)
        finished = oracle.finished(self.op, self.sample, cut)
        for name, result, reference in zip(self.contract.returns, finished, self.expected, strict=True):
            if name in self.before:  # only elements that some of the rows write
                (initial,) = oracle.finished(self.op, self.sample, (self.before[name],))
                written = (reference != initial) & ~(reference.isnan() & initial.isnan())
                result, reference = result[written], reference[written]
            error = numerics.compare(result, reference, self.contract.tolerances[name])
            if not error.ok:
                return f"wrong: {name}: {error.note or f'error {error.ratio:.3g} times what is allowed'}"
        return ""

    def _cut(self, result: Any) -> Any:
        """The compared rows of a result."""
        dim = int(self.arguments.get(self.contract.partials) is not None)
        at = (slice(None),) * dim + (self.rows,)
        if result.shape[dim] == self.batch:
            return result[at]
        # several rows of the result for each row of the batch
        return result.unflatten(dim, (self.batch, -1))[at].flatten(dim, dim + 1)
