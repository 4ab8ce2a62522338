"""The real vLLM engine with our plugin, in one process without a GPU: ``FAKE_SM=8.0 python run.py EXPERTS OUT.json``.

vLLM's Python is as installed, and so are its compiled libraries and their schemas. What they would compute is not:
memory holds zeros. What is seen is which code runs: that the engine starts and generates, which kernels are compiled
for the capability and whether all do, and which ops are called. ``--without ATTRIBUTE`` leaves a target out, to see
what breaks then; ``--warm-up`` lets vLLM compile ahead, as it does when it serves.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import importlib.util
import json
import os
import sys
import tempfile
import traceback
import types
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PROMPTS = (20, 700, 3000)
"""Tokens of each prompt: the longest has more compressed keys than the indexer picks, so its kernels run."""
TOKENS = 4

parser = argparse.ArgumentParser()
parser.add_argument("experts", choices=("bf16", "fp8", "fp4"))
parser.add_argument("out", type=Path)
parser.add_argument("--without", action="append", default=[])
parser.add_argument("--warm-up", action="store_true")
parser.add_argument("--backend", default="")
options = parser.parse_args()
faulthandler.enable()

SM = os.environ["FAKE_SM"]
os.environ |= {
    "DSV4_BACKENDS_ENGINE": "1",
    "DSV4_BACKENDS_DEVICE": f"sm_{SM.replace('.', '')}",
    "DSV4_BACKENDS_DENY": "deep_gemm,flash_mla",  # what they would compile or launch needs a GPU
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_DEEP_GEMM_WARMUP": "skip",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # what vLLM compiles for loading weights runs as it is
}
sys.path.insert(0, str(HERE))

import libraries  # noqa: E402

found = importlib.util.find_spec("vllm")
assert found is not None
assert found.submodule_search_locations
libraries.load(Path(next(iter(found.submodule_search_locations))))

import compiled_ops  # noqa: E402
import gpu  # noqa: E402
import model  # noqa: E402

gpu.pretend()
compiled_ops.count_pythons_own()
importlib.import_module("vllm._moe_C_stable_libtorch")
import vllm.platforms.cuda as platform  # noqa: E402
import vllm.utils.torch_utils as utils  # noqa: E402
import vllm.v1.worker.gpu.buffer_utils as buffers  # noqa: E402

compiled_ops.on_cpu()
for kind in (platform.CudaPlatformBase, platform.NvmlCudaPlatform):
    kind.dispatch_key, kind.dist_backend = "CPU", "gloo"
utils.get_accelerator_view_from_cpu_tensor = buffers.get_accelerator_view_from_cpu_tensor = lambda tensor: tensor
# Other models' warm-ups, whose imports want torchvision.
for name in ("minimax_m3_msa_warmup", "qwen_vl_triton_warmup", "step5_dsa_warmup"):
    module: Any = types.ModuleType(f"vllm.model_executor.warmup.{name}")
    setattr(module, name, lambda *args: None)
    sys.modules[module.__name__] = module

from dsv4_backends.engines import vllm as engine  # noqa: E402
from dsv4_backends.runtime import bind  # noqa: E402

engine.ENGINE.targets = tuple(t for t in engine.TARGETS if t.attribute not in options.without)
stopped = ""
generated: list[int] = []
mode = gpu.OnCpu()
mode.__enter__()
try:
    from vllm import LLM, SamplingParams
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    compiled_ops.deep_gemm_of_its_own()
    gpu.router_in_cute_dsl()

    folder = Path(tempfile.mkdtemp())
    model.write(folder, options.experts)
    settings: dict[str, Any] = {"attention_backend": options.backend} if options.backend else {}
    llm = LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        load_format="dummy",
        enforce_eager=not options.warm_up,
        compilation_config={"mode": 0, "cudagraph_mode": "NONE"},
        max_model_len=4096,
        max_num_seqs=8,
        max_num_batched_tokens=2048,
        num_gpu_blocks_override=3000,
        **settings,
    )
    gpu.serving = True
    prompts = [{"prompt_token_ids": [3 + i % 500 for i in range(n)]} for n in PROMPTS]
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True, detokenize=False)
    generated = [len(request.outputs[0].token_ids) for request in llm.generate(prompts, sampling, use_tqdm=False)]
except Exception as error:
    traceback.print_exc()
    stopped = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"

rows = [
    {
        "attribute": row.target.attribute,
        "op": row.target.op,
        "state": row.state,
        "reasons": [str(reason) for reason in row.reasons],
        "calls": row.calls,
        "passed_on": row.passed_on,
    }
    for row in engine.plan().rows
]
record = {
    "stopped": stopped,
    "generated": generated,
    "failed": gpu.failed,
    "late": dict(gpu.late),
    "kernels": dict(gpu.compiled),
    "calls": dict(compiled_ops.calls),
    "rows": rows,
    "served": bind.stats(),
}
options.out.write_text(json.dumps(record, indent=1))
print(stopped or f"generated {generated}", f"{len(gpu.compiled)} kernels, {len(gpu.failed)} of them fail")
