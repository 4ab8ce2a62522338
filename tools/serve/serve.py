"""Serve a DeepSeek V4 with Flash's dimensions and random weights by the real vLLM; tools/serve_on_gpu.sh runs it.

    serve.py logprobs OUT.json --layers 12 --experts 16 --weights fp8     teacher-forced logprobs of four prompts
    serve.py speed OUT.json --layers 43 --weights fp4 --tp 2              output tokens a second, time to first token
    serve.py mtp OUT.json --layers 6 --experts 16                         with one speculative token
    serve.py long OUT.json --layers 6 --experts 16                        one prompt of 200,000 tokens

The weights are made by ``vllm_stand_ins``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

VOCABULARY = 129280


def config(layers: int, experts: int, weights: str, speculative: int = 0) -> dict[str, Any]:
    """Flash's ``config.json``, of fewer layers and experts where asked."""
    made: dict[str, Any] = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "torch_dtype": "bfloat16",
        "vocab_size": VOCABULARY,
        "hidden_size": 4096,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": layers,
        "num_attention_heads": 64,
        "num_key_value_heads": 1,
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "q_lora_rank": 1024,
        "o_lora_rank": 1024,
        "o_groups": 8,
        "num_experts_per_tok": 6,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "scoring_func": "sqrtsoftplus",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "topk_method": "noaux_tc",
        "max_position_embeddings": 1048576,
        "rope_theta": 10000.0,
        "compress_rope_theta": 160000.0,
        "compress_ratios": ([0, 0] + [4, 128] * 40)[:layers] + [0] * speculative,
        "rope_scaling": {
            "type": "yarn",
            "rope_type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "num_hash_layers": 3,
        "swiglu_limit": 10.0,
        "sliding_window": 128,
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": 512,
        "num_nextn_predict_layers": speculative,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "initializer_range": 0.02,
    }
    if weights != "bf16":
        made["expert_dtype"] = weights
        made["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        }
    return made


def prompts(count: int, lengths: list[int], seed: int = 1) -> list[dict[str, list[int]]]:
    draw = random.Random(seed)
    return [
        {"prompt_token_ids": [draw.randrange(2, VOCABULARY) for _ in range(lengths[i % len(lengths)])]}
        for i in range(count)
    ]


def engine(given: argparse.Namespace, **more: Any) -> Any:
    from vllm import LLM

    folder = tempfile.mkdtemp()
    made = config(given.layers, given.experts, given.weights, int("speculative_config" in more))
    Path(folder, "config.json").write_text(json.dumps(made))
    os.environ["SERVE_EXPERTS"] = str(given.experts)
    return LLM(
        model=folder,
        skip_tokenizer_init=True,
        load_format="dummy",
        tensor_parallel_size=given.tp,
        enable_prefix_caching=False,
        **more,
    )


def logprobs(given: argparse.Namespace) -> dict[str, Any]:
    """Of every token of four prompts, given the ones before it, under three compositions of the batches: the prompts in
    order, in reverse behind a short one, which moves the bounds of every chunk, and one at a time. With --steps under
    one: a step takes one token of each prompt, so decode's kernels compute everything, in CUDA graphs."""
    from vllm import SamplingParams

    llm = engine(
        given,
        max_model_len=8192,
        max_num_seqs=8,
        max_num_batched_tokens=8 if given.steps else given.chunk,
        gpu_memory_utilization=given.memory,
        kv_cache_memory_bytes=given.cache << 30,  # several engines share the GPU, which would spoil a profile
        enforce_eager=not given.steps,
        compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8]},
        long_prefill_token_threshold=int(given.steps),
    )
    asked = prompts(4, given.lengths)
    greedy = {"temperature": 0, "ignore_eos": True, "detokenize": False}
    sampling = SamplingParams(max_tokens=8, prompt_logprobs=1, logprobs=1, **greedy)

    def scored(given_prompts: Any) -> list[dict[str, Any]]:
        found = []
        for output in llm.generate(given_prompts, sampling, use_tqdm=False):
            ids = output.prompt_token_ids
            steps = list(zip(ids[1:], output.prompt_logprobs[1:], strict=True))
            found.append(
                {
                    "logprobs": [round(step[token].logprob, 5) for token, step in steps],
                    "best": [min(step, key=lambda t, s=step: s[t].rank) for _, step in steps],
                    "tokens": list(output.outputs[0].token_ids),
                }
            )
        return found

    if given.steps:
        # vLLM's bound of one token holds while there are two requests: another one lasts as long as the longest.
        return {"steps": scored([*asked, *prompts(1, [max(given.lengths)], seed=2)])[:-1]}
    return {
        "usual": scored(asked),
        "moved": scored([*prompts(1, [333], seed=2), *reversed(asked)])[:0:-1],
        "alone": [scored([prompt])[0] for prompt in asked],
    }


def cubins() -> set[Path]:
    """Compiled kernels in Triton's cache."""
    home = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache"))
    return set(home.rglob("*.cubin"))


def source(cubin: Path) -> str:
    """The file that a compiled kernel was written in, as it is imported."""
    made = cubin.with_suffix(".source")
    _, _, rest = made.read_text(encoding="utf-8").partition(' loc("') if made.exists() else ("", "", "")
    path = rest.partition('"')[0] or cubin.stem
    return min((path.removeprefix(f"{entry}/") for entry in sys.path if entry), key=len)


def serve(
    llm: Any, count: int, length: int, tokens: int, *, scored: bool = False
) -> tuple[list[tuple[float, float]], list[list[int]]]:
    """``count`` requests of one size, sent at once: the seconds to each one's first and last token, and the tokens.

    ``scored``: the tokens' logprobs are computed too, and have to be finite.
    """
    from vllm import SamplingParams

    more = {"logprobs": 1} if scored else {}
    sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False, **more)
    # The first step sees all requests: else how many had arrived by then would decide how many steps the prompts take.
    llm.sleep(level=0, mode="keep")
    for i, prompt in enumerate(prompts(count, [length], seed=count)):
        llm.llm_engine.add_request(f"{time.perf_counter()}-{i}", prompt, sampling)
    begun = time.perf_counter()
    llm.wake_up(tags=["scheduling"])
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    made: dict[str, list[int]] = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.outputs and output.outputs[0].token_ids:
                last[output.request_id] = time.perf_counter() - begun
                first.setdefault(output.request_id, last[output.request_id])
                made[output.request_id] = list(output.outputs[0].token_ids)
                for step in output.outputs[0].logprobs or ():
                    assert all(math.isfinite(one.logprob) for one in step.values()), output.request_id
    return [(first[name], last[name]) for name in made], list(made.values())


def finished(times: list[tuple[float, float]]) -> float:
    return max(last for _, last in times)


def kernels(table: str) -> list[tuple[str, float, int]]:
    """Name, GPU time in ms and calls of each kernel in a table of PyTorch's profiler."""
    found = []
    for line in table.splitlines():
        cells = re.split(r"  +", line.strip())
        if len(cells) == 11 and cells[-1].isdecimal() and not cells[-5].startswith("0.000"):
            value, unit = re.fullmatch(r"([\d.]+)(us|ms|s)", cells[-5]).groups()  # type: ignore[union-attr]
            found.append((cells[0], round(float(value) * {"us": 1e-3, "ms": 1, "s": 1e3}[unit], 4), int(cells[-1])))
    return found


def profiled(llm: Any, folder: Path) -> dict[str, Any]:
    """GPU time by kernel, on the first GPU: one step of 8 prompts of 1024 tokens, and 8 decode steps after them."""
    made = {}
    for name, ahead, steps in (("prefill", 0, 1), ("decode", 16, 8)):
        llm.start_profile(name, delay_iterations=ahead, max_iterations=steps)
        serve(llm, 8, 1024, 32)
        llm.stop_profile()
        table = next(folder.glob(f"{name}*rank0*.txt")).read_text(encoding="utf-8")
        made[name] = {"steps": steps, "kernels": kernels(table)}
    return made


def speed(given: argparse.Namespace) -> dict[str, Any]:
    """Requests of one size at each concurrency, all sent at once; greedy, ends ignored. The best pass counts."""
    traces = Path(tempfile.mkdtemp())
    profiler = {"profiler": "torch", "torch_profiler_dir": str(traces), "torch_profiler_activities": ["CUDA"]}
    start = time.perf_counter()
    llm = engine(
        given,
        max_model_len=8192,
        max_num_seqs=32,
        max_num_batched_tokens=8192,
        gpu_memory_utilization=given.memory,
        kv_cache_memory_bytes=given.cache << 30 or None,
        enforce_eager=given.eager,
        compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32]},
        kernel_config={"enable_jit_warmup": not given.lazy},
        **({"profiler_config": profiler} if given.profile else {}),
    )
    up = time.perf_counter() - start
    print("up", round(up, 1), flush=True)
    for count, length in ((1, 1024), (2, 1000), (4, 1024), (7, 300), (8, 1024), (16, 1024), (32, 1024)):
        serve(llm, count, length, 3)
    warm = time.perf_counter() - start
    print("warm", round(warm, 1), flush=True)
    before, rows = cubins(), []
    # Pass by pass: what else the host does for some seconds then meets one pass of several rows, not all of one.
    each = range(given.passes)
    passes = [[serve(llm, count, given.input, given.output)[0] for count in given.requests] for _ in each]
    for count, *taken in zip(given.requests, *passes, strict=True):
        best = min(taken, key=finished)
        rows.append(
            {
                "requests": count,
                "tokens_a_second": round(count * given.output / finished(best), 2),
                "first_token_ms": round(statistics.median(first for first, _ in best) * 1e3, 1),
                "token_ms": round(statistics.median(b - a for a, b in best) * 1e3 / (given.output - 1), 2),
                "seconds": [round(finished(one), 3) for one in taken],
            }
        )
        print(rows[-1], flush=True)
    # Batches that a graph of 4 or 8 rows is padded for: no request may see its neighbours, nor the padding.
    odd = {count: serve(llm, count, 200, 8, scored=True)[1] for count in (3, 7)}
    assert all(len(tokens) == 8 for made in odd.values() for tokens in made)
    return {
        "start_s": round(up, 1),
        "warm_s": round(warm, 1),
        "input": given.input,
        "output": given.output,
        "rows": rows,
        "odd": odd,
        "compiled_while_serving": sorted(map(source, cubins() - before)),
        "profile": profiled(llm, traces) if given.profile else {},
    }


def mtp(given: argparse.Namespace) -> dict[str, Any]:
    """One speculative token of a random draft layer: two tokens of each request in a decode step."""
    llm = engine(
        given,
        max_model_len=8192,
        max_num_seqs=8,
        max_num_batched_tokens=given.chunk,
        gpu_memory_utilization=given.memory,
        kv_cache_memory_bytes=given.cache << 30,
        enforce_eager=given.eager,
        compilation_config={"cudagraph_capture_sizes": [2, 4, 8, 16]},
        speculative_config={"method": "mtp", "num_speculative_tokens": 1},
    )
    times, made = serve(llm, 5, 700, 16)
    assert [len(tokens) for tokens in made] == [16] * 5
    return {"seconds": round(finished(times), 2), "tokens": made}


def long(given: argparse.Namespace) -> dict[str, Any]:
    """One long prompt, by chunks; the memory that PyTorch had allocated at most beyond the weights and caches."""
    import torch

    llm = engine(
        given,
        max_model_len=given.input + 64,
        max_num_seqs=2,
        max_num_batched_tokens=8192,
        gpu_memory_utilization=given.memory,
        kv_cache_memory_bytes=given.cache << 30,
        enforce_eager=True,
    )
    serve(llm, 1, 9000, 2)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ((first, last),), made = serve(llm, 1, given.input, 4)
    peak = torch.cuda.max_memory_allocated() - before
    assert len(made[0]) == 4
    return {"prompt": given.input, "first_token_s": round(first, 2), "seconds": round(last, 2),
            "peak_mib": round(peak / 2**20)}  # fmt: skip


RUNS = {"logprobs": logprobs, "speed": speed, "mtp": mtp, "long": long}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=RUNS)
    parser.add_argument("out")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--weights", choices=("bf16", "fp8", "fp4"), default="fp4")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--memory", type=float, default=0.85, help="share of the GPU's memory")
    parser.add_argument("--cache", type=int, help="GiB of caches (2; for speed what the GPU has left)")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of a prefill chunk")
    parser.add_argument("--steps", action="store_true", help="for logprobs: a step takes one token of each prompt")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2000, 3000, 4500, 6000])
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--lazy", action="store_true", help="no warm-up of vLLM's: kernels compile at warm requests")
    parser.add_argument("--profile", action="store_true", help="for speed: the GPU time of a step by kernel, too")
    parser.add_argument("--input", type=int, default=1024)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--passes", type=int, default=4, help="for speed: how often each number of requests is served")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    given = parser.parse_args()
    if given.cache is None:
        given.cache = 0 if given.what == "speed" else 2
    result = RUNS[given.what](given)
    try:
        from dsv4_backends.engines import vllm as hook

        result["plan"] = [[row.target.attribute, str(row.state), row.calls] for row in hook.plan().rows]
    except ImportError:
        pass
    result["arguments"] = vars(given)
    Path(given.out).write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # vLLM takes most of a minute to end its processes; tools/serve_on_gpu.sh ends what is left


if __name__ == "__main__":
    main()
