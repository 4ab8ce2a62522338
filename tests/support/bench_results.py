"""Made-up results of a benchmark, to test what is computed from them."""

from __future__ import annotations

from typing import Any

from packaging.version import Version

from dsv4_backends.bench.provenance import Host
from dsv4_backends.bench.results import SCHEMA_VERSION, Rates, Result, Row, Timing
from dsv4_backends.selection.machine import Device

GPU = Device("cuda", 0, "GPU X", Version("9.0"))
RATES = Rates(copy_gbps=1000.0, read_gbps=900.0, bf16_tflops=200.0, launch_us=2.0)


def timing_of(label: str, us: float | None) -> Timing:
    provider, _, simulated = label.partition(" as ")
    if us is None:
        return Timing(provider, error="wrong", simulated=simulated)
    return Timing(provider, us, us * 0.99, us * 1.01, simulated=simulated)


def row_of(op: str, name: str, auto: str | None = "a", params: Any = None, **us: float | None) -> Row:
    timings = tuple(timing_of(label, time) for label, time in us.items())
    return Row(op, name, params or {}, flops=1e9, bytes=1e6, math="bf16", auto=auto, timings=timings)


def result_of(*rows: Row, **changes: Any) -> Result:
    fields: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "command": "dsv4-backends bench --json result.json",
        "date": "2026-01-01",
        "commit": "0123456789ab",
        "machine": Host("3.12", {"torch": "2.11.0"}, (GPU,)),
        "device": GPU,
        "rates": RATES,
        "absent": {"mqa_logits": {"c": "not installed"}},
        "order": {"mqa_logits": ("a", "b")},
        "providers": {"a": {"a-kernels": "1"}, "b": {}},
        "samples": 50,
        "seconds": 3.0,
        "rows": rows,
    }
    return Result(**fields | changes)
