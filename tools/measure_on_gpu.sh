#!/usr/bin/env bash
# Most measurements that the docs show, made again on this GPU; then `python tools/docs.py` writes the pages. The pages
# name the commands of the others.
# Usage: tools/measure_on_gpu.sh WHEELS OUT [STEP...]
#   WHEELS  folder with a folder of wheels for each release line: tokenspeed, sgl, vllm (see tools/native_on_gpu.sh).
#           bench and transformers are run with the first of them that is there.
#   OUT     folder for the results, named as docs/results keeps them; docs/results itself will do
#   STEP    overhead verify bench floors conformance transformers native (default: all, about 20 minutes on an H200).
#           bench also makes the table of the measured choice, in dsv4_backends/selection/tables.
# Environment: JOBS, the processes of the suites (8; each needs about 13 GB of the GPU).
# Needs a python3 with torch for CUDA 13, Triton, pytest, pytest-xdist and transformers, and nvcc. A step that fails does
# not stop the others. What the tests over the real vLLM say is tools/vllm_on_gpu.sh's.
set -uo pipefail
wheels=$(realpath "$1") out=$(realpath -m "$2")
shift 2
steps=${*:-overhead verify bench floors conformance transformers native}
cd "$(dirname "$0")/.."
mkdir -p "$out"
# An installed copy does not know its commit; a copy of this tree without .git does not either: then set it.
export GIT_COMMIT=${GIT_COMMIT:-$(python3 -c 'from dsv4_backends.bench.provenance import commit; print(commit())')}
export JOBS=${JOBS:-8}
lines=()
for line in tokenspeed sgl vllm; do if [ -d "$wheels/$line" ]; then lines+=("$line"); fi; done
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
pip=(python3 -m pip install -q --no-deps --no-index --target "$site")
if [ ${#lines[@]} -gt 0 ]; then "${pip[@]}" "$wheels/${lines[0]}"/*.whl || exit 1; fi
"${pip[@]}" --no-build-isolation . || exit 1
before=${PYTHONPATH:-}
export PYTHONPATH="$site${before:+:$before}"
read -r card capability < <(python3 -c '
import torch
name, (major, minor) = torch.cuda.get_device_name().lower().split(), torch.cuda.get_device_capability()
print(name[1] if name[0] == "nvidia" else name[0], f"{major}{minor}")')
[ -n "$card" ] || exit 1
ours=(python3 -m dsv4_backends)
suite() { # LEVEL ARCHITECTURE NAME
  DSV4_BACKENDS_DEVICE=$2 OMP_NUM_THREADS=1 python3 tools/conformance.py --only triton --level "$1" --jobs "$JOBS" \
    --json "$out/$card-triton-conformance-$3.json" | tail -1
}
for step in $steps; do
  echo "== $step: $(date +%T)"
  case $step in
    overhead) python3 tools/overhead.py --json "$out/$card-overhead.json" ;;
    verify) "${ours[@]}" verify --level default --json > "$out/$card-verify-torch.json" ;;
    bench)
      results=("$out/$card-bench.json")
      heads=(--op sparse_mla_prefill --op sparse_mla_decode --op fp8_einsum)
      contested=("${heads[@]}" --op mqa_logits --op paged_mqa_logits --op hc_prenorm_gemm)
      "${ours[@]}" bench "${contested[@]}" --json "${results[0]}" | tail -2
      for ranks in 2 4 8; do
        results+=("$out/$card-bench-tp$ranks.json")
        "${ours[@]}" bench "${heads[@]}" --tp "$ranks" --json "${results[-1]}" | tail -2
      done
      "${ours[@]}" tune "${results[@]}" --output "dsv4_backends/selection/tables/sm_$capability.json"
      "${ours[@]}" bench --op fp8_einsum --scales token-major --json "$out/$card-bench-token-major.json" | tail -2
      TRITON_OVERRIDE_ARCH=sm80 DSV4_BACKENDS_DEVICE=sm_80 \
        "${ours[@]}" bench "${contested[@]}" --provider triton --json "$out/$card-bench-code-sm_80.json" | tail -2
      TRITON_OVERRIDE_ARCH=sm80 DSV4_BACKENDS_DEVICE=sm_80 \
        python3 tools/plain_gemm.py --json "$out/$card-plain-gemm-code-sm_80.json" ;;
    floors)
      small=(--op compress_norm_rope_insert --op indexer_compress_insert --op indexer_q_rope_quant)
      small+=(--op gather_dequant_kv --op inverse_rope_quant --op inverse_rope)
      python3 tools/launch_floor.py "${small[@]}" --json "$out/$card-launch-floor.json" | tail -2
      python3 tools/launch_floor.py --op paged_mqa_logits --json "$out/$card-access-floor.json" | tail -2 ;;
    conformance)
      suite full "" full
      suite full sm_80 sm_80
      TRITON_OVERRIDE_ARCH=sm80 suite full sm_80 sm_80-code
      suite full sm_86 sm_86
      suite smoke sm_120 sm_120 ;;
    transformers) python3 tools/transformers_bench.py --json "$out/$card-transformers.json" | tail -20 ;;
    native)
      for line in "${lines[@]}"; do
        made=$(mktemp -d)
        PYTHONPATH=$before tools/native_on_gpu.sh "$wheels/$line" "$line" "$made" | tail -3
        mv "$made/conformance-$line.json" "$out/$card-native-conformance-$line.json"
        mv "$made/overhead-$line.json" "$out/$card-native-overhead-$line.json"
        rm -rf "$made"
      done ;;
    *) echo "unknown step $step" >&2 ;;
  esac
done
echo "== done: $(date +%T)"
