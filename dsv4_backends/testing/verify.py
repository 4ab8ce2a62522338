"""Run the contract's cases on this machine and compare with the oracle in fp64."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..contract import CONTRACTS, LEVELS
from ..errors import NoProviderError, PolicyError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Worst:
    """The largest error of a result: its share of the tolerance and its case, and the worst ``calc_diff``."""

    share: float
    calc_diff: float
    case: str


@dataclass(frozen=True)
class Row:
    """The results of one provider for one op.

    Attributes:
        op, provider: Their names.
        cases, refused: How many cases ran, and how many the provider refused by shape.
        failures: One line for each case that failed.
        errors: The worst over the cases, by result.
        seconds: The duration, oracle included.
    """

    op: str
    provider: str
    cases: int
    refused: int
    failures: tuple[str, ...]
    errors: dict[str, Worst]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether at least one case ran and none failed."""
        return not self.failures and self.cases > 0


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while cases ran. ``rows`` has the results so far; the last row may lack cases."""

    def __init__(self, rows: Sequence[Row]) -> None:
        super().__init__("interrupted")
        self.rows = list(rows)


def verify(
    ops: Iterable[str] = tuple(CONTRACTS),
    *,
    providers: Iterable[str] = (),
    level: str = "smoke",
    device: torch.device | str | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Row]:
    """Run the contracts' cases here and compare every result with the definition in fp64.

    Args:
        ops: Only these.
        providers: Only these; empty: the selected one for each op.
        level: ``"smoke"``, ``"default"`` or ``"full"``.
        device: A torch device; default: the current GPU, or the CPU.
        progress: Gets a line of text before each case.

    Returns:
        A row for each op and provider; ``Row.ok`` is its verdict.

    Raises:
        PolicyError: an unknown op, provider or level, or no such device.
        Interrupted: Ctrl-C; a ``KeyboardInterrupt`` with the rows so far.
        NoProviderError: a provider was named and cannot run an op that it implements, or implements none of ``ops``.
    """
    from ..runtime import bind
    from ..selection import machine, plugins, policy
    from . import checks

    ops = [policy.known_op(op) for op in policy.names("ops", ops)]
    providers = policy.names("providers", providers)
    if level not in LEVELS:
        raise PolicyError(f"level: expected one of {', '.join(LEVELS)}, got {level!r}")
    loaded = plugins.load(policy.from_environment().deny)
    implemented = {spec.name: {i.op for i in spec.implementations} for spec in loaded.providers}
    policy.known_providers("providers", providers, implemented)
    where = machine.torch_device(device)
    for name in providers:
        if not implemented[name] & set(ops):
            raise NoProviderError(f"nothing to verify: {name} implements none of {', '.join(ops)}")
    rows: list[Row] = []
    for op in ops:
        names = [name for name in providers if op in implemented[name]]
        if not providers:
            names = [bind.implementation(op, where)[0]]
        for name in names:
            try:
                rows.append(_one(checks.subject(name, op, where), level, progress or (lambda line: None)))
            except Interrupted as error:
                raise Interrupted([*rows, *error.rows]) from None
            except KeyboardInterrupt:
                raise Interrupted(rows) from None
    return rows


def _one(subject: Any, level: str, progress: Callable[[str], None]) -> Row:
    from . import checks

    contract = CONTRACTS[subject.contract.name]
    cases = contract.at_level(level)
    failures: list[str] = []
    worst: dict[str, Worst] = {}
    ran = refused = 0
    start = time.perf_counter()

    def row() -> Row:
        seconds = time.perf_counter() - start
        return Row(contract.name, subject.provider, ran, refused, tuple(failures), worst, seconds)

    try:
        for index, case in enumerate(cases, 1):
            progress(f"{contract.name} {subject.provider} {index}/{len(cases)} {case.name}")
            arguments = contract.inputs(case, subject.device)
            if subject.refusal(arguments) is not None:
                refused += 1
                continue
            try:
                found = checks.errors(subject, case, arguments, subject.run(arguments))
            except Exception as raised:  # an error on one case must not hide the other cases
                ran += 1
                failures.append(f"{case.name}: {type(raised).__name__}: {raised}")
                continue
            ran += 1
            for result, error in found.items():
                if not error.ok:
                    failures.append(
                        f"{case.name}: {result}: {error.note or f'{error.ratio:.3g} times what is allowed'}"
                    )
                if error.ratio >= (worst[result].share if result in worst else -math.inf):
                    worst[result] = Worst(error.ratio, error.calc_diff, case.name)
    except KeyboardInterrupt:
        raise Interrupted([row()] if ran or refused else []) from None
    return row()


def passed(rows: Sequence[Row]) -> bool:
    return all(row.ok for row in rows)
