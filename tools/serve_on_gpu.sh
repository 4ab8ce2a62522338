#!/usr/bin/env bash
# Serve DeepSeek V4 Flash's dimensions with random weights by the real vLLM, with and without our ops.
# Usage: tools/serve_on_gpu.sh BUNDLE OUT STEP...
#   BUNDLE  what tools/serve_bundle.sh made, or the folder that it was unpacked to; its folder deps takes more packages,
#           such as TileLang and z3-solver
#   OUT     folder for the results
#   STEP    WHAT:RUN; WHAT is logprobs, speed, mtp or long, and RUN is native, chunks (native, with prefill chunks of
#           64 tokens), triton, torch (the reference), auto, sm_80, sm_86 or sm_89. Of logprobs RUN-steps, such as
#           native-steps, takes one token of each prompt in a step. Several steps that are joined by commas run at a
#           time, on one GPU.
# Environment: LOGPROBS, SPEED, MTP and LONG, more arguments of tools/serve/serve.py; STEP_S, seconds for a step (420: a
# run of speed with cold caches takes more than 5 minutes).
# An architecture's run pins Triton, and vLLM sees its compute capability; Triton compiles its instructions.
set -uo pipefail
out=$(realpath -m "$2")
bundle=$(realpath "$1")
shift 2
cd "$(dirname "$0")/.."
mkdir -p "$out"
export GIT_COMMIT=${GIT_COMMIT:-$(python3 -c 'from dsv4_backends.bench.provenance import commit; print(commit())')}
site=${SERVE_SITE:-/tmp/dsv4-serve}
mkdir -p "$site"
if [ -f "$bundle" ]; then
  [ -d "$site/vllm" ] || tar xf "$bundle" -C "$site"
  bundle=$site
fi
rm -rf "$site/self"
for project in . tools/serve; do
  python3 -m pip install -q --no-deps --no-index --no-build-isolation --target "$site/self" "$project" || exit 2
done
export PYTHONPATH="$site/self:$bundle/vllm:$bundle/deps${PYTHONPATH:+:$PYTHONPATH}"
export VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 DO_NOT_TRACK=1 VLLM_HOST_IP=127.0.0.1
export VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_DEEP_GEMM_WARMUP=skip
export DG_JIT_CACHE_DIR=${DG_JIT_CACHE_DIR:-/tmp/deep_gemm}
export CUDA_HOME=${CUDA_HOME:-$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")}

step() { # WHAT RUN
  local settings=() run=${2%-steps}
  case $run in
    native | chunks) ;;
    auto) settings=(DSV4_BACKENDS_ENGINE=vllm) ;;
    triton | torch) settings=(DSV4_BACKENDS_ENGINE=vllm DSV4_BACKENDS_PIN="*=$run") ;;
    sm_*)
      sm=${run#sm_}
      settings=(DSV4_BACKENDS_ENGINE=vllm DSV4_BACKENDS_PIN='*=triton' "DSV4_BACKENDS_DEVICE=$run")
      settings+=("SERVE_CAPABILITY=${sm%?}.${sm#"${sm%?}"}" "TRITON_OVERRIDE_ARCH=sm$sm" "TRITON_CACHE_DIR=/tmp/triton-$run")
      ;;
    *) echo "unknown run $2" >&2 && return 2 ;;
  esac
  local name=${1^^}
  local more=${!name:-}
  if [ "$1" != speed ]; then settings+=(VLLM_ENABLE_V1_MULTIPROCESSING=0); fi
  if [ "$2" = chunks ]; then more="$more --chunk 64"; fi
  if [ "$2" != "$run" ]; then more="$more --steps"; fi
  # shellcheck disable=SC2086
  setsid timeout -k 10 "${STEP_S:-420}" env "${settings[@]}" python3 tools/serve/serve.py "$1" "$out/$1-$2.json" $more > "$out/$1-$2.log" 2>&1 &
  local session=$!
  wait $session
  echo "$1 $2: exit $? at $(date +%T)"
  # What vLLM's own processes leave behind holds the GPU's memory.
  pkill -KILL -s $session || true
}

for steps in "$@"; do
  for each in ${steps//,/ }; do
    step "${each%%:*}" "${each#*:}" &
  done
  wait
done
