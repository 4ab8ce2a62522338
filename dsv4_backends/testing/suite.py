"""The pytest class that a provider's author subclasses."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from ..contract import CONTRACTS, LEVELS
from ..errors import NoProviderError
from ..selection import plugins, policy
from ..selection.provider import ProviderSpec
from . import checks


class ProviderConformance:
    """Runs every check on every op that a provider claims, on the first GPU, or on the CPU::

        from dsv4_backends.testing import ProviderConformance

        class TestAcme(ProviderConformance):
            provider = "acme"

    The names and meanings of the attributes below are stable. A release may add checks and cases, so a provider that
    passed before may fail.

    Attributes:
        provider: The name in the provider's ``ProviderSpec``; its plugin must be installed.
        level: ``"smoke"``, ``"default"`` or ``"full"``; the environment variable ``DSV4_BACKENDS_LEVEL`` overrides it.
        device: Such as ``"cpu"`` or ``"cuda:1"``; empty: the device in the environment variable
            ``DSV4_BACKENDS_TORCH_DEVICE``, else the first GPU, or the CPU. The current device is not changed.
        batch_invariant: Test the implementations that serve with ``DSV4_BACKENDS_BATCH_INVARIANT=1``.
        must_serve: Whether the suite fails if the provider serves none of its ops here. If False, all tests are
            then skipped, which looks as if the provider had passed.
        known_failures: From patterns of test ids (``"numerics-mqa_logits-*"``) to reasons. A test that matches must
            fail, and a pattern that matches no test is a failure.

    Ops that the provider does not serve on this machine are skipped with its reasons.
    """

    provider: str = ""
    level: str = "smoke"
    device: str = ""
    batch_invariant: bool = False
    must_serve: bool = True
    known_failures: Mapping[str, str] = {}

    @classmethod
    def _spec(cls) -> ProviderSpec:
        loaded = plugins.load(policy.from_environment().deny)
        for spec in loaded.providers:
            if spec.name == cls.provider:
                return spec
        known = ", ".join(sorted(spec.name for spec in loaded.providers))
        raise pytest.UsageError(f"{cls.__name__}: no installed provider is named {cls.provider!r}. Known: {known}")

    @classmethod
    def _ops(cls) -> list[str]:
        served = {implementation.op for implementation in cls._spec().implementations}
        return [op for op in CONTRACTS if op in served]

    @classmethod
    def _level(cls) -> str:
        level = os.environ.get("DSV4_BACKENDS_LEVEL") or cls.level
        if level not in LEVELS:
            raise pytest.UsageError(f"level: expected one of {', '.join(LEVELS)}, got {level!r}")
        return level

    @classmethod
    def _all_tests(cls) -> list[tuple[str, str, str]]:
        """Check, op and case name of every test of a case."""
        level = cls._level()
        implementations = cls._spec().implementations
        return [
            (check, op, case.name)
            for op in cls._ops()
            for case in CONTRACTS[op].at_level(level)
            for check in checks.CHECKS
            if any(
                checks.claimed(check, i)
                for i in implementations
                if i.op == op and (cls.batch_invariant or not i.only_batch_invariant)
            )
        ]

    @classmethod
    def _param(cls, *values: str) -> Any:
        name = "-".join(values).replace(" ", "_")
        marks = [
            pytest.mark.xfail(reason=reason, strict=True, raises=checks.CheckFailed)
            for pattern, reason in cls.known_failures.items()
            if fnmatch.fnmatchcase(name, pattern)
        ]
        return pytest.param(*values, id=name, marks=marks)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        cls = type(self)
        if not cls.provider:
            raise pytest.UsageError(f"{cls.__name__}: set provider to the name of your provider")
        if {"check", "op", "case_name"} <= set(metafunc.fixturenames):
            metafunc.parametrize("check,op,case_name", [cls._param(*test) for test in cls._all_tests()])
        elif "op" in metafunc.fixturenames:
            prefix = metafunc.function.__name__.removeprefix("test_")
            metafunc.parametrize("op", [pytest.param(op, id=f"{prefix}-{op}") for op in cls._ops()])

    def _subject(self, op: str) -> checks.Subject:
        device = torch.device(self.device) if self.device else checks.default_device()
        try:
            return checks.subject(self.provider, op, device, batch_invariant=self.batch_invariant)
        except NoProviderError as error:
            if error.resolution is None:
                raise checks.CheckFailed("signature", str(error)) from error
            pytest.skip(str(error))

    def test_serves(self) -> None:
        """At least one op is served here: a suite that skips every test has tested nothing."""
        reasons = []
        for op in self._ops():
            try:
                self._subject(op)
            except pytest.skip.Exception as skipped:
                reasons.append(str(skipped))
            else:
                return
        why = "\n".join(reasons) or "it implements no op that this version has"
        message = f"{self.provider} serves none of its ops here (must_serve = False skips the suite then):\n{why}"
        if self.must_serve:
            raise checks.CheckFailed("serves", message)
        pytest.skip(message)

    def test_signature(self, op: str) -> None:
        checks.check_signature(self._subject(op))

    def test_coverage(self, op: str) -> None:
        checks.check_coverage(self._subject(op), CONTRACTS[op].at_level(self._level()))

    def test_case(self, check: str, op: str, case_name: str) -> None:
        subject = self._subject(op)
        if not checks.claimed(check, subject.implementation):
            pytest.skip(f"{self.provider} does not claim to be {check}")
        if check in checks.NEEDS_GPU and subject.device.type != "cuda":
            pytest.skip(f"{check} needs a GPU")
        case = next(case for case in CONTRACTS[op].cases if case.name == case_name)
        drawn = checks.drawn(op, case_name, subject.device, 0)
        if check != "refusal" and (reason := subject.refusal(drawn)) is not None:
            pytest.skip(f"refused: {reason}")
        checks.CHECKS[check](subject, case)

    def test_known_failures_match(self) -> None:
        ids = ["-".join(test).replace(" ", "_") for test in self._all_tests()]
        unmatched = [pattern for pattern in self.known_failures if not fnmatch.filter(ids, pattern)]
        assert not unmatched, f"known_failures that match no test: {unmatched}"
