"""Run the contract's cases on this machine and compare with the oracle in fp64."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..contract import CONTRACTS
from ..errors import NoProviderError


@dataclass(frozen=True)
class Row:
    """What one provider did on one op.

    Attributes:
        op, provider: Who.
        cases, refused: How many cases ran, and how many the provider refused by shape.
        failures: One line for each case that failed.
        errors: By result: the worst share of what is allowed, the worst ``calc_diff``, the case of the former.
        seconds: For all of it, the oracle included.
    """

    op: str
    provider: str
    cases: int
    refused: int
    failures: tuple[str, ...]
    errors: dict[str, dict[str, Any]]
    seconds: float


def verify(
    ops: Sequence[str],
    providers: Sequence[str],
    level: str,
    device: str | None,
    progress: Callable[[str], None],
) -> list[Row]:
    """Run every case of ``level`` for each op and provider.

    Args:
        ops: Op names.
        providers: Provider names; empty: whichever is selected for each op.
        level: ``"smoke"``, ``"default"`` or ``"full"``.
        device: A torch device; None: the first GPU, or the CPU.
        progress: Gets a line of text now and then.

    Raises:
        NoProviderError: a provider was named and cannot run an op that it implements, or implements none of ``ops``.
    """
    import torch

    from ..runtime import bind
    from ..selection import plugins, policy
    from . import checks

    where = torch.device(device) if device else checks.default_device()
    implemented = {
        spec.name: {i.op for i in spec.implementations}
        for spec in plugins.load(policy.from_environment().deny).providers
    }
    for name in providers:
        if not implemented[name] & set(ops):
            raise NoProviderError(f"nothing to verify: {name} implements none of {', '.join(ops)}")
    rows = []
    for op in ops:
        names = [name for name in providers if op in implemented[name]]
        if not providers:
            names = [bind.implementation(op, where)[0]]
        for name in names:
            rows.append(_one(checks.subject(name, op, where), level, progress))
    return rows


def _one(subject: Any, level: str, progress: Callable[[str], None]) -> Row:
    from . import checks

    contract = CONTRACTS[subject.contract.name]
    cases = contract.at_level(level)
    failures: list[str] = []
    worst: dict[str, dict[str, Any]] = {}
    refused = 0
    start = time.perf_counter()
    for index, case in enumerate(cases, 1):
        progress(f"{contract.name} {subject.provider} {index}/{len(cases)} {case.name}")
        arguments = contract.inputs(case, subject.device)
        if subject.refusal(arguments) is not None:
            refused += 1
            continue
        try:
            found = checks.errors(subject, case, arguments, subject.run(arguments))
        except Exception as raised:  # a provider's failure on one case must not hide the other cases
            failures.append(f"{case.name}: {type(raised).__name__}: {raised}")
            continue
        for result, error in found.items():
            if not error.ok:
                failures.append(f"{case.name}: {result}: {error.note or f'{error.ratio:.3g} times what is allowed'}")
            if error.ratio >= worst.get(result, {}).get("share", -math.inf):
                worst[result] = {"share": error.ratio, "calc_diff": error.calc_diff, "case": case.name}
    return Row(
        op=contract.name,
        provider=subject.provider,
        cases=len(cases) - refused,
        refused=refused,
        failures=tuple(failures),
        errors=worst,
        seconds=time.perf_counter() - start,
    )


def passed(rows: Sequence[Row]) -> bool:
    return all(not row.failures and row.cases for row in rows)
