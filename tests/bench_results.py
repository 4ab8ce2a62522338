"""Results of a benchmark that nobody measured, to test what is made of them."""

from __future__ import annotations

from typing import Any


def row_of(op: str, name: str, auto: str | None = "a", **us: float | None) -> dict[str, Any]:
    results = [
        {"provider": p, "us": t, "q1": t and t * 0.99, "q3": t and t * 1.01, "error": "" if t else "wrong"}
        for p, t in us.items()
    ]
    work = {"flops": 1e9, "bytes": 1e6, "math": "bf16", "floor_us": 5.0}
    return {"op": op, "row": name, "params": {}, "auto": auto, "results": results, **work}


def result_of(*rows: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "command": "dsv4-backends bench --json result.json",
        "date": "2026-01-01",
        "commit": "0123456789ab",
        "machine": {"python": "3.12", "packages": {"torch": "2.11.0"}, "devices": [{"name": "GPU X"}]},
        "device": {"name": "GPU X", "type": "cuda", "capability": "9.0"},
        "rates": {"copy_gbps": 1000.0, "read_gbps": 900.0, "bf16_tflops": 200.0, "launch_us": 2.0},
        "absent": {"mqa_logits": {"c": "not installed"}},
        "order": {"mqa_logits": ["a", "b"]},
        "providers": {"a": {"a-kernels": "1"}, "b": {}},
        "seconds": 3.0,
        "rows": list(rows),
    }
