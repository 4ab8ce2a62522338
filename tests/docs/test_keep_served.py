"""tools/keep_served.py: results of serve.py and compare.py become the files that the page is made from."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import keep_served
import kept
import pytest
from paths import ROOT

import docs
from dsv4_backends import records

GIVEN = {
    "layers": 6,
    "experts": 16,
    "weights": "fp8",
    "tp": 2,
    "input": 1024,
    "output": 64,
    "passes": 3,
    "lengths": [2000, 3000],
}
ROWS = [{"requests": 1, "tokens_a_second": 50.0, "first_token_ms": 80.0, "token_ms": 9.5, "seconds": [1.3, 1.28]}]
PROFILE = {"decode": {"steps": 8, "kernels": [["b", 2.0, 8], ["void ns::a<int>(float...", 14.0, 16]]}}
RAW: dict[str, dict[str, Any]] = {
    "speed-auto": {
        "start_s": 65.2,
        "rows": ROWS,
        "odd": {"3": [[1]], "7": [[1]]},
        "compiled_while_serving": [],
        "profile": PROFILE,
    },
    "speed-native": {"start_s": 60.0, "rows": ROWS, "compiled_while_serving": ["a.py", "b.py"]},
    "logprobs-native": {"usual": []},
    "mtp-triton": {"seconds": 1.25, "tokens": [[5] * 16] * 5},
    "long-auto": {"prompt": 200000, "first_token_s": 12.0, "seconds": 13.0, "peak_mib": 1800},
}
COMPARED = {
    "noise": [{"composition": "chunks", "mean": 0.02, "max": 1.5, "top1": 0.96}],
    "rows": [{"run": "triton", "composition": "usual", "mean": 0.02, "max": 1.0, "top1": 0.97}],
    "reference": [{"run": "native", "mean": 0.0312}, {"run": "triton", "mean": 0.0301}],
}
LOG = """compiled during inference: before the monitor
Kernel JIT monitor activated; monitored JIT compilations during inference will use mode=warn.
Triton kernel JIT compilation during inference: a. This causes a latency spike
warm 70.1
Triton kernel JIT compilation during inference: b. This causes a latency spike
"""


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of results; the kept files' folder is beside it."""
    (tmp_path / "out").mkdir()
    (tmp_path / "docs" / "results").mkdir(parents=True)
    machine = str(ROOT / "docs" / "results" / docs.BENCH)
    arguments = ["keep_served.py", str(tmp_path / "out"), str(tmp_path / "docs" / "results"), "--machine", machine]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    return tmp_path / "out"


def test_files_and_page(out: Path) -> None:
    for name, content in RAW.items():
        (out / f"{name}.json").write_text(json.dumps(content | {"arguments": GIVEN}))
    (out / "compare.json").write_text(json.dumps(COMPARED))
    (out / "speed-auto.log").write_text(LOG)
    assert keep_served.main() == 0
    speed = records.read(kept.ServedSpeed, docs.ROOT / "docs" / "results" / docs.SERVED_SPEED)
    assert speed.command == "tools/serve_on_gpu.sh BUNDLE OUT speed:native speed:auto"
    assert speed.machine.devices[0].name == "NVIDIA H200"
    assert [(run.run, run.compiled_while_serving, run.reported, run.odd) for run in speed.runs] == [
        ("native", ("a.py", "b.py"), None, ()),
        ("auto", (), 1, (3, 7)),
    ]
    assert "| 1 | 50.0, 80 ms, 9.50 ms | 50.0 (1.00), 80 ms, 9.50 ms | 52 |" in docs.served_speed()
    assert docs.served_speed().count("Slowest pass / best, by row: 1.02.") == 2
    assert "| decode | `auto` | 2.00 ms | `a` 1.75, `b` 0.25 |" in docs.served_speed()
    assert "prompts of 2000, 3000 tokens" in docs.served_logprobs()
    assert "| `triton` | usual | 0.0200 | 1.00 | 97.00% | 1.00 |" in docs.served_logprobs()
    assert "from `torch`, the reference: `native` 0.031, `triton` 0.030." in docs.served_logprobs()
    once = docs.served_once()
    assert "`tools/serve_on_gpu.sh BUNDLE OUT mtp:triton long:auto`" in once
    assert "`triton`: 5 requests, 16 tokens each" in once
    assert "200,000 tokens, `auto`" in once


@pytest.fixture
def serve() -> ModuleType:
    spec = importlib.util.spec_from_file_location("serve", ROOT / "tools" / "serve" / "serve.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_kernels_of_a_profile(serve: ModuleType) -> None:
    zero = ("0.00%", "0.000us", "0.00%", "0.000us", "0.000us")
    lines = [
        ("Name", "Self CPU %", "Self CPU", "CPU total %", "CPU total", "CPU time avg", "Self CUDA", "Self CUDA %"),
        ("void a<1, 2>(int...", *zero, "37.443ms", "33.75%", "37.443ms", "54.423us", "688"),
        ("b", *zero, "512.000us", "0.47%", "512.000us", "1.500us", "344"),
        ("cudaLaunchKernel", *zero, "0.000us", "0.00%", "0.000us", "0.000us", "9"),
        ("Self CUDA time total: 37.955ms",),
    ]
    table = "\n".join("  ".join(f"{cell:>20}" for cell in line) for line in lines)
    assert serve.kernels(table) == [("void a<1, 2>(int...", 37.443, 688), ("b", 0.512, 344)]


def test_the_file_of_a_compiled_kernel(serve: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    (tmp_path / "k.source").write_text(f'#loc = loc("{tmp_path}/site/vllm/cache.py":7:0)\n#loc1 = loc("x"(#loc))\n')
    assert serve.source(tmp_path / "k.cubin") == "vllm/cache.py"
    assert serve.source(tmp_path / "other.cubin") == "other", "a cache without sources"


def test_nothing_to_keep(out: Path) -> None:
    assert keep_served.main() == 1
    assert docs.served_speed() == docs.served_logprobs() == docs.served_once() == "Not measured."
