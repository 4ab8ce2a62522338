#!/usr/bin/env bash
# Everything that the native providers need a Hopper GPU for, with one installed release line.
# Usage: tools/native_on_gpu.sh WHEELS LINE OUT [STEP...]
#   WHEELS  folder with the wheels of the line, or deep_gemm-vllm-2.8.1.tar.gz
#   LINE    tokenspeed, sgl or vllm (DeepGEMM only): the name in the result files
#   OUT     folder for the results
#   STEP    list calls suite overhead (default: all of them)
# Needs torch with CUDA 13, nvcc, setuptools, pytest and pytest-xdist in the python on PATH. One failing step does not stop the others.
set -uo pipefail
wheels=$(realpath "$1") line=$2 out=$(realpath -m "$3")
shift 3
steps=${*:-list calls suite overhead}
cd "$(dirname "$0")/.."
mkdir -p "$out"
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
for archive in "$wheels"/*.whl; do
  if [ -e "$archive" ]; then python -m pip install -q --no-deps --target "$here" "$archive"; fi
done
for archive in "$wheels"/*.tar.gz; do if [ -e "$archive" ]; then tar xzf "$archive" -C "$here"; fi; done
# The entry points of this tree, in case an older copy is installed.
python -m pip install -q --no-deps --no-build-isolation -e . || echo "dsv4-backends could not be installed from $PWD" >&2
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
export DG_JIT_CACHE_DIR=${DG_JIT_CACHE_DIR:-$out/.deep_gemm_$line}
libraries="DeepGemm or deep_gemm or FlashMla or flash_mla"
if [ "$line" = vllm ]; then libraries="DeepGemm or deep_gemm"; fi
for step in $steps; do
  echo "== $line $step: $(date +%T)"
  case $step in
    list)
      python -m dsv4_backends list > "$out/list-$line.txt"
      python -m dsv4_backends list --json > "$out/list-$line.json"
      python -m dsv4_backends doctor > "$out/doctor-$line.txt"
      cat "$out/list-$line.txt" ;;
    calls) python tools/native_calls.py 2>&1 | tee "$out/calls-$line.txt" ;;
    suite)
      DSV4_BACKENDS_LEVEL=${LEVEL:-full} python -m pytest tests/native_suite.py -q -W default -n "${JOBS:-6}" \
        -p no:cacheprovider -k "$libraries" --junitxml="$out/suite-$line.xml" > "$out/suite-$line.txt" 2>&1
      tail -30 "$out/suite-$line.txt"
      for provider in deep_gemm flash_mla; do
        if [ "$line$provider" != vllmflash_mla ]; then
          python -m dsv4_backends verify --json --provider $provider --level "${LEVEL:-full}" > "$out/verify-$line-$provider.json"
        fi
      done ;;
    overhead) python tools/native_overhead.py --json "$out/overhead-$line.json" 2>&1 | tee "$out/overhead-$line.txt" ;;
    *) echo "unknown step $step" >&2 ;;
  esac
done
