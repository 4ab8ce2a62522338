"""The checks of the conformance suite: one function each, for one implementation and one case.

A check returns None, or raises ``CheckFailed`` with its name. They run in the order of ``CHECKS``.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..contract import CONTRACTS, Case, OpContract
from ..contract.arguments import TensorArg
from ..contract.checker import overlaps_itself
from ..errors import NoProviderError
from ..runtime.bind import load_implementation, signature_mismatch
from ..selection import builds, machine, plugins, policy
from ..selection.foreign import contained
from ..selection.machine import Installed
from ..selection.provider import Implementation, Reason
from ..selection.survey import choose
from . import numerics, oracle


class CheckFailed(AssertionError):
    """A provider breaks its contract. ``check`` is the name of the check that found it."""

    def __init__(self, check: str, message: str) -> None:
        super().__init__(f"[{check}] {message}")
        self.check = check


@dataclass(frozen=True)
class Subject:
    """One implementation under test on one device."""

    provider: str
    contract: OpContract
    implementation: Implementation
    function: Callable[..., Any]
    refuses: Callable[..., Any] | None
    device: torch.device

    def run(self, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        """The results of one call.

        Raises:
            CheckFailed: not as many tensors as the contract has results.
        """
        returned = contained(self.function, **arguments)
        results = returned if isinstance(returned, tuple) else (returned,)
        names = self.contract.returns
        if len(results) != len(names):
            what = f"{len(results)} results, expected {len(names)}: {', '.join(names)}"
            raise CheckFailed("fake", f"{self.name}: {what}")
        for name, result in zip(names, results, strict=True):
            if not isinstance(result, Tensor):
                raise CheckFailed("fake", f"{self.name}: {name} is a {type(result).__name__}, no tensor")
        return results

    def refusal(self, arguments: dict[str, Any]) -> Any:
        return None if self.refuses is None else contained(self.refuses, **arguments)

    @property
    def name(self) -> str:
        return f"{self.provider}: {self.contract.name}"


def subject(provider: str, op: str, device: torch.device | str, *, batch_invariant: bool | None = None) -> Subject:
    """The implementation with which ``provider`` would serve ``op`` on ``device``.

    Args:
        batch_invariant: Whether in the batch-invariant mode; None: by the environment.

    Raises:
        PolicyError: an unknown op or provider, or no such device.
        NoProviderError: it would not serve; has all reasons.
    """
    op, exact = policy.known_op(op), machine.torch_device(device)
    settings = policy.from_environment()
    loaded = plugins.load(settings.deny)
    mode = settings.batch_invariant if batch_invariant is None else batch_invariant
    user_policy = policy.Policy(pins={op: provider}, batch_invariant=mode).validate(loaded.names)
    where = machine.device_of(exact)
    resolution = choose(op, where, Installed(), loaded.providers, user_policy, builds.load, loaded.absent)
    served = resolution.serves().candidate
    if served is None:
        raise NoProviderError(resolution.explain(), resolution)
    chosen = served.implementation
    function = load_implementation(op, chosen.target)
    refuses = None if chosen.refuses is None else load_implementation(op, chosen.refuses)
    return Subject(provider, CONTRACTS[op], chosen, function, refuses, exact)


def default_device() -> torch.device:
    """The device in ``DSV4_BACKENDS_TORCH_DEVICE``; without it the first GPU, or the CPU."""
    if named := os.environ.get("DSV4_BACKENDS_TORCH_DEVICE", "").strip():
        exact: torch.device = machine.torch_device(named, "DSV4_BACKENDS_TORCH_DEVICE")
        return exact
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@functools.lru_cache(maxsize=4)
def drawn(op: str, case_name: str, device: torch.device, variant: int) -> dict[str, Any]:
    """A case's arguments, cached, so read-only: a large case takes seconds to draw, and a dozen checks use it."""
    contract = CONTRACTS[op]
    return contract.inputs(next(case for case in contract.cases if case.name == case_name), device, variant)


def _inputs(target: Subject, case: Case, variant: int = 0) -> dict[str, Any]:
    """A copy of a case's arguments, gaps between rows included."""
    found = drawn(target.contract.name, case.name, target.device, variant)
    own: dict[str, Any] = dict(found)
    for name, value in _tensors(found):
        copy = torch.empty(0, dtype=value.dtype, device=value.device)
        storage = _storage(value).clone().untyped_storage()
        own[name] = copy.set_(storage, value.storage_offset(), value.shape, value.stride())
    return own


@functools.lru_cache(maxsize=4)
def _expected(op: str, case_name: str, device: torch.device, variant: int) -> tuple[Tensor, ...]:
    # Several checks of one case need it, and it is the slowest step.
    return oracle.expected(op, drawn(op, case_name, device, variant))


def errors(
    target: Subject, case: Case, arguments: dict[str, Any], results: tuple[Tensor, ...], variant: int = 0
) -> dict[str, numerics.Error]:
    """Each result against the oracle, by name."""
    contract = target.contract
    references = _expected(contract.name, case.name, target.device, variant)
    finished = oracle.finished(contract.name, arguments, results)
    return {
        name: numerics.compare(result, reference, contract.tolerances[name])
        for name, result, reference in zip(contract.returns, finished, references, strict=True)
    }


def _judge(
    check: str,
    target: Subject,
    case: Case,
    arguments: dict[str, Any],
    results: tuple[Tensor, ...],
    variant: int = 0,
    what: str = "",
) -> None:
    for name, error in errors(target, case, arguments, results, variant).items():
        if not error.ok:
            detail = error.note or (
                f"error {error.ratio:.3g} times what is allowed (largest {error.worst:.3g}, "
                f"calc_diff {error.calc_diff:.3g})"
            )
            raise CheckFailed(check, f"{target.name}: {case.name}: {name}{what}: {detail}")


def _tensors(arguments: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    return ((name, value) for name, value in arguments.items() if isinstance(value, Tensor))


def _storage(x: Tensor) -> Tensor:
    """All bytes of the memory behind x, gaps between rows included."""
    flat = torch.empty(0, dtype=torch.uint8, device=x.device)
    return flat.set_(x.untyped_storage())


def _outside(x: Tensor) -> Tensor:
    """Which bytes of the memory behind x are none of its elements: the gaps between rows, and what is around them."""
    free = torch.full_like(_storage(x), 255)
    of_x = torch.empty(0, dtype=numerics.INTEGERS[x.element_size()], device=x.device)
    of_x.set_(free.untyped_storage(), x.storage_offset(), x.shape, x.stride()).zero_()
    return free.bool()


_AROUND = 16
"""Elements before and after each row of a buffer in a larger tensor: rows are as aligned as those of a packed one."""


def _buffers(target: Subject, case: Case, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Result buffers, named as the contract's arguments: filled with NaN (integers: their largest), or what an op in
    place changes. In every other case they are parts of larger tensors, unless ``refuses`` refuses these."""
    if target.contract.in_place:
        return {name: arguments[name] for name in target.contract.buffers}
    fake = target.contract.function(**arguments)
    results = dict(zip(target.contract.returns, fake if isinstance(fake, tuple) else (fake,), strict=True))
    packed = {name: spoilt(results[name]) for name in target.contract.buffers}
    if target.contract.cases.index(case) % 2:
        return packed
    parts = {}
    for name, x in packed.items():
        larger = spoilt(x.new_empty(*x.shape[:-1], x.shape[-1] + 2 * _AROUND))
        parts[name] = larger[..., _AROUND : _AROUND + x.shape[-1]]
    return packed if isinstance(target.refusal(arguments | parts), Reason) else parts


def spoilt(x: Tensor) -> Tensor:
    """x, filled with NaN or the largest integer."""
    return x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max)


def _overwrite(arguments: dict[str, Any], other: dict[str, Any]) -> None:
    for name, value in _tensors(arguments):
        _storage(value).copy_(_storage(other[name]))


@contextmanager
def _poisoned_allocations() -> Iterator[None]:
    """A block in which torch.empty gives NaN (or the largest integer), so that unwritten elements are found."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_before = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about kernels without a deterministic form, which is not tested here
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_before)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------------------------------- checks


def check_signature(target: Subject) -> None:
    """The function and its ``refuses`` have the contract's parameters."""
    for function in filter(None, (target.function, target.refuses)):
        if (mismatch := signature_mismatch(target.contract, function)) is not None:
            raise CheckFailed("signature", str(mismatch))


def check_coverage(target: Subject, cases: tuple[Case, ...]) -> None:
    """``refuses`` accepts at least one case with work in it."""
    if target.refuses is None:
        return
    for case in cases:
        arguments = _inputs(target, case)
        if all(value.numel() for _, value in _tensors(arguments)) and not isinstance(target.refusal(arguments), Reason):
            return
    raise CheckFailed("coverage", f"{target.name}: refuses every one of {len(cases)} cases")


def check_refusal(target: Subject, case: Case) -> None:
    """``refuses`` returns a Reason or None from shapes alone, and a call that it accepts runs."""
    arguments = _inputs(target, case)
    answer = target.refusal(arguments)
    if answer is not None and not isinstance(answer, Reason):
        raise CheckFailed("refusal", f"{target.name}: {case.name}: refuses() gave {answer!r}, expected Reason or None")
    # Tensor.to would close the gaps between rows.
    without_values = {
        k: torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="meta") if isinstance(v, Tensor) else v
        for k, v in arguments.items()
    }
    try:
        again = target.refusal(without_values)
    except Exception as error:
        message = f"refuses() looks at more than shapes, dtypes and strides: {type(error).__name__}: {error}"
        raise CheckFailed("refusal", f"{target.name}: {case.name}: {message}") from error
    if (answer is None) != (again is None):
        message = "refuses() answers differently without values"
        raise CheckFailed("refusal", f"{target.name}: {case.name}: {message}")
    if answer is None:
        try:
            target.run(arguments)
        except CheckFailed:
            raise
        except Exception as error:
            message = f"accepted, then raised {type(error).__name__}: {error}"
            raise CheckFailed("refusal", f"{target.name}: {case.name}: {message}") from error


def check_fake(target: Subject, case: Case) -> None:
    """Shape, dtype and device of every result are those of the contract's fake."""
    arguments = _inputs(target, case)
    fake = target.contract.function(**arguments)
    fakes = fake if isinstance(fake, tuple) else (fake,)
    for name, result, want in zip(target.contract.returns, target.run(arguments), fakes, strict=True):
        have_all = (result.dtype, list(result.shape), result.device)
        want_all = (want.dtype, list(want.shape), want.device)
        if have_all != want_all:
            raise CheckFailed("fake", f"{target.name}: {case.name}: {name} is {have_all}, expected {want_all}")


def check_stride(target: Subject, case: Case) -> None:
    """Every result has a contiguous last dimension, or the contract's strides, and no two elements share an address."""
    arguments = _inputs(target, case)
    fake = target.contract.function(**arguments)
    fakes = fake if isinstance(fake, tuple) else (fake,)
    results = target.run(arguments)
    for name, result, want in zip(target.contract.returns, results, fakes, strict=True):
        if result.numel() == 0:
            continue
        if name in target.contract.strided:
            if result.stride() != want.stride():
                message = f"{name} has strides {result.stride()}, expected {want.stride()}"
                raise CheckFailed("stride", f"{target.name}: {case.name}: {message}")
            continue
        if overlaps_itself(result):
            raise CheckFailed("stride", f"{target.name}: {case.name}: {name} overlaps itself: {result.stride()}")
        if result.shape[-1] > 1 and result.stride(-1) != 1:
            raise CheckFailed("stride", f"{target.name}: {case.name}: {name} has strides {result.stride()}")


def check_inputs(target: Subject, case: Case) -> None:
    """No byte of an argument changes. In place, a byte keeps its value or gets one that does not depend on it."""
    arguments = _inputs(target, case)
    before = {name: _storage(value).clone() for name, value in _tensors(arguments)}
    target.run(arguments)
    buffers = target.contract.buffers if target.contract.in_place else ()
    for name, value in _tensors(arguments):
        if name not in buffers and not torch.equal(_storage(value), before[name]):
            raise CheckFailed("inputs", f"{target.name}: {case.name}: the call changed its argument {name}")
    first = {name: _storage(arguments[name]).clone() for name in buffers}
    for name in buffers:  # a second run, over the complement of every byte
        _storage(arguments[name]).copy_(before[name].bitwise_not())
    if buffers:
        target.run(arguments)
    for name, once in first.items():
        again = _storage(arguments[name])
        kept = (once == before[name]) & (again == before[name].bitwise_not())
        if not bool((kept | (once == again)).all()):
            raise CheckFailed("inputs", f"{target.name}: {case.name}: a byte of {name} was written from what it was")


def check_numerics(target: Subject, case: Case) -> None:
    """Every result is within the contract's tolerance of the oracle."""
    arguments = _inputs(target, case)
    _judge("numerics", target, case, arguments, target.run(arguments))


def check_written(target: Subject, case: Case) -> None:
    """With NaN in new memory and in the caller's buffers, packed or not, results are right, there and nowhere else."""
    arguments = _inputs(target, case)
    buffers = _buffers(target, case, arguments)
    before = {name: _storage(buffer).clone() for name, buffer in buffers.items()}
    with _poisoned_allocations():
        results = target.run(arguments | buffers)
    for name, buffer in buffers.items():
        result = results[target.contract.returns.index(name)]
        if result.data_ptr() != buffer.data_ptr() or result.shape != buffer.shape:
            raise CheckFailed("written", f"{target.name}: {case.name}: the result is not the buffer given as {name}")
        if bool(((_storage(buffer) != before[name]) & _outside(buffer)).any()):
            message = f"bytes between or around the rows of {name} (strides {buffer.stride()}) were written"
            raise CheckFailed("written", f"{target.name}: {case.name}: {message}")
    _judge("written", target, case, arguments, results, what=" (NaN-filled buffers)")


def check_fresh(target: Subject, case: Case) -> None:
    """New values in the same tensors give new results, and do not change the results of the call before."""
    arguments = _inputs(target, case)
    first = target.run(arguments)
    kept = [result.clone() for result in first]
    _overwrite(arguments, _inputs(target, case, 1))
    second = target.run(arguments)
    _judge("fresh", target, case, arguments, second, variant=1, what=" (second call, same tensors)")
    for name, result, copy in zip(target.contract.returns, first, kept, strict=True):
        if not target.contract.in_place and not numerics.same_bits(result, copy):
            raise CheckFailed("fresh", f"{target.name}: {case.name}: a second call changed the first call's {name}")


def check_deterministic(target: Subject, case: Case) -> None:
    """If claimed: three calls give the same bits."""
    if not target.implementation.deterministic:
        return
    first = target.run(_inputs(target, case))
    for _ in range(2):
        for name, a, b in zip(target.contract.returns, first, target.run(_inputs(target, case)), strict=True):
            if not numerics.same_bits(a, b):
                raise CheckFailed("deterministic", f"{target.name}: {case.name}: {name} differs between two calls")


def select_rows(contract: OpContract, arguments: dict[str, Any], rows: slice | Tensor) -> dict[str, Any]:
    """A call's arguments for some rows of its batch, selected by slice or by index."""
    whole = contract.args[contract.batch]
    assert isinstance(whole, TensorArg)
    batch = whole.forms[0].dims[0]
    cut = dict(arguments)
    count = len(arguments[contract.batch])
    for name, value in _tensors(arguments):
        arg = contract.args[name]
        assert isinstance(arg, TensorArg)
        lead = arg.forms[0].dims[0]
        if lead == batch:
            cut[name] = value[rows]
        elif lead.startswith(f"{batch} * "):
            cut[name] = value.unflatten(0, (count, -1))[rows].flatten(0, 1)
    return cut


def check_batch_invariant(target: Subject, case: Case) -> None:
    """If claimed: a row alone has the same bits as in the batch."""
    contract = target.contract
    if not target.implementation.batch_invariant:
        return
    arguments = _inputs(target, case)
    count = len(arguments[contract.batch])
    if count == 0:
        return
    whole = target.run(arguments)
    partials = int(arguments.get(contract.partials) is not None)
    for row in {0, count // 2, count - 1}:
        before = _inputs(target, case)
        cut = select_rows(contract, _inputs(target, case), slice(row, row + 1))
        for name, a, b in zip(contract.returns, whole, target.run(cut), strict=True):
            if contract.in_place and len(a) == len(b):  # the elements that the row alone changed
                old, once, alone = _storage(before[name]), _storage(a), _storage(b)
                same = bool(((alone == old) | (alone == once)).all())
            else:
                per_row = a.shape[partials] // count
                same = numerics.same_bits(a.narrow(partials, row * per_row, per_row), b)
            if not same:
                raise CheckFailed("batch_invariant", f"{target.name}: {case.name}: {name} of row {row} differs alone")


def check_sync(target: Subject, case: Case) -> None:
    """On a GPU: the call does not wait for the device."""
    if target.device.type != "cuda":
        return
    arguments = _inputs(target, case)
    target.run(arguments)  # compiles before the check
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warning that the mode is a prototype
        try:
            torch.cuda.set_sync_debug_mode("error")
            target.run(arguments)
        except RuntimeError as error:
            raise CheckFailed("sync", f"{target.name}: {case.name}: {error}") from error
        finally:
            torch.cuda.set_sync_debug_mode(mode)


def check_graph(target: Subject, case: Case) -> None:
    """On a GPU: the call can be captured, and a replay with changed inputs gives the new results."""
    if target.device.type != "cuda":
        return
    arguments = _inputs(target, case)
    stream = torch.cuda.Stream(target.device)
    stream.wait_stream(torch.cuda.current_stream(target.device))
    with torch.cuda.stream(stream):
        target.run(arguments)
    torch.cuda.current_stream(target.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The CUDA Graph is empty")  # a graph without rows is empty
            with torch.cuda.graph(graph, stream=stream):  # the default stream would be that of the current device
                results = target.run(arguments)
    except RuntimeError as error:
        raise CheckFailed("graph", f"{target.name}: {case.name}: cannot be captured: {error}") from error
    for result in results if not target.contract.in_place else ():
        spoilt(result)
    _overwrite(arguments, _inputs(target, case, 1))
    graph.replay()  # on the current stream of the captured device
    torch.cuda.synchronize(target.device)
    _judge("graph", target, case, arguments, results, variant=1, what=" (replay with new inputs)")


CHECKS: dict[str, Callable[[Subject, Case], None]] = {
    "refusal": check_refusal,
    "fake": check_fake,
    "stride": check_stride,
    "inputs": check_inputs,
    "numerics": check_numerics,
    "written": check_written,
    "fresh": check_fresh,
    "deterministic": check_deterministic,
    "batch_invariant": check_batch_invariant,
    "sync": check_sync,
    "graph": check_graph,
}
"""The checks of one case, in the order in which they run. ``signature`` and ``coverage`` run before them."""

NEEDS_GPU = frozenset({"sync", "graph"})


def claimed(check: str, implementation: Implementation) -> bool:
    """Whether the implementation claims what the check tests."""
    if check in ("deterministic", "batch_invariant"):
        return bool(getattr(implementation, check))
    return True
