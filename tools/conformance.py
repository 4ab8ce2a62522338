"""Run a provider's conformance suite on a GPU and write the results.

Usage: python tools/conformance.py [--level full] [--jobs 8] [--only PROVIDER] [--op OP] [--torch-device DEVICE]
       [--json FILE]

Needs a GPU and pytest; with --jobs also pytest-xdist. An interrupt (SIGINT) ends it early: the file then says that it
is not complete.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from kept import Conformance, Failure

from dsv4_backends import OPS, records
from dsv4_backends.bench.provenance import provenance
from dsv4_backends.selection import builds, plugins

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    "triton": "providers/triton_suite.py",
    "deep_gemm": "gpu/test_deep_gemm.py",
    "flash_mla": "gpu/test_flash_mla.py",
}
"""In tests/, by provider."""
EVERY = 100


class Kept:
    """Every report of pytest, counted; failures with their messages, skips with their reasons."""

    def __init__(self, result: Conformance, file: Path | None) -> None:
        self.result, self.file, self.seen = result, file, 0
        self.counts: collections.Counter[str] = collections.Counter(passed=0, failed=0, skipped=0)
        self.skips: collections.Counter[str] = collections.Counter()
        self.failures: list[Failure] = []
        self.slowest: list[tuple[float, str]] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call":
            self.slowest = sorted([*self.slowest, (round(report.duration, 1), report.nodeid)], reverse=True)[:10]
        if report.failed:
            self.failed(report)
        elif report.skipped:
            self.counts["skipped"] += 1
            said = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.skips[re.sub(r"\d+", "N", said.removeprefix("Skipped: "))] += 1
        elif report.when == "call":
            self.counts["passed"] += 1
        self.seen += 1
        if self.seen % EVERY == 0:
            self.write()

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed(report)

    def failed(self, report: Any) -> None:
        self.counts["failed"] += 1
        crash = getattr(report.longrepr, "reprcrash", None)
        message = " ".join(str(crash.message if crash else report.longrepr).split())
        self.failures.append(Failure(report.nodeid, message[:1000]))

    def write(self, complete: bool = False) -> None:
        self.result = dataclasses.replace(
            self.result,
            complete=complete,
            counts=dict(self.counts),
            skips=dict(self.skips.most_common()),
            failures=tuple(self.failures),
        )
        if self.file:
            records.write(self.result, self.file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", default="full")
    parser.add_argument("--jobs", type=int, default=0, help="processes; 0: this one")
    parser.add_argument("--only", choices=FILES, action="append", help="may be given twice; default: the native ones")
    parser.add_argument("--op", choices=OPS, action="append", default=[], help="only tests of this op; may be repeated")
    parser.add_argument("--torch-device", default="", help="such as cuda:1; cuda:0 stays current (default: the first)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    names = arguments.only or ["deep_gemm", "flash_mla"]
    found = {s.name: builds.look(s) for s in plugins.load().providers if s.name in names and s.probe}
    if missing := [name for name, by_op in found.items() if not next(iter(by_op.values())).name]:
        parser.error(f"not installed: {', '.join(missing)}")  # its tests would be a skip
    simulated = os.environ.get("DSV4_BACKENDS_DEVICE", "")
    words = [f"DSV4_BACKENDS_DEVICE={simulated}"] if simulated else []
    if code := os.environ.get("TRITON_OVERRIDE_ARCH"):  # Triton's: whose instructions it chooses
        words.append(f"TRITON_OVERRIDE_ARCH={code}")
    words += ["python tools/conformance.py", f"--level {arguments.level}", *(f"--only {n}" for n in names)]
    words += [f"--op {op}" for op in arguments.op]
    if arguments.torch_device:
        words.append(f"--torch-device {arguments.torch_device}")
        os.environ["DSV4_BACKENDS_TORCH_DEVICE"] = arguments.torch_device
    result = Conformance(
        **provenance(" ".join(words)),
        libraries={name: next(iter(by_op.values())).name for name, by_op in found.items()},
        level=arguments.level,
        complete=False,
        counts={},
    )
    os.environ["DSV4_BACKENDS_LEVEL"] = arguments.level
    options = ["-q", "-rfE", "-W", "default", "-p", "no:cacheprovider", "-p", "no:benchmark", "--tb=short"]
    if arguments.jobs:
        options += ["-n", str(arguments.jobs), "--dist", "worksteal"]
    if arguments.op:
        options += ["-k", " or ".join(arguments.op)]
    kept, start = Kept(result, arguments.json), time.monotonic()
    files = [FILES[name] for name in names]
    if arguments.torch_device:
        files.append("gpu/test_two_gpus.py")
    status = pytest.main([*(str(ROOT / "tests" / file) for file in files), *options], plugins=[kept])
    kept.write(complete=status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED))
    for seconds, test in kept.slowest:
        print(f"{seconds:6.1f} s  {test}")
    spent = time.monotonic() - start
    print(
        json.dumps({"libraries": result.libraries, **kept.counts, "complete": kept.result.complete}), f"{spent:.0f} s"
    )
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
