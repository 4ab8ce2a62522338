#!/usr/bin/env bash
# Bring what tests/engines/vllm_suite.py needs into a folder, as wheels for Python 3.12 and a machine without a network: vLLM's
# Python files without its compiled parts, and the imports that an image with torch and transformers usually lacks.
# Usage: tools/vllm_bundle.sh FOLDER [VLLM_VERSION]
set -euo pipefail
out=$(realpath -m "${1:?usage: tools/vllm_bundle.sh FOLDER [VLLM_VERSION]}")
version=${2:-0.33.0}
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"

# What such an image has keeps its own versions.
theirs='torch|numpy|transformers|pluggy|pytest|packaging|einops|pillow|prometheus_client|psutil|py-cpuinfo|regex|requests'
theirs+='|urllib3|uvloop|aiohttp|cloudpickle|aiohappyeyeballs|aiosignal|annotated_doc|anyio|attrs|certifi|frozenlist|idna'
theirs+='|charset_normalizer|h11|multidict|propcache|tqdm|typing_extensions|yarl|iniconfig|pygments|click'

platforms=()
for tag in manylinux_2_34 manylinux_2_31 manylinux_2_28 manylinux_2_27 manylinux_2_26 manylinux_2_24 manylinux_2_17 manylinux2014; do
  platforms+=(--platform "${tag}_x86_64")
done
fetch() {
  python3 -m pip download -q --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" -d "$work" "$@" \
    2> >(grep -v '^WARNING' >&2)
}
grep -E '^[a-z]' tests/engines/vllm_requirements.txt | grep -Ev "^($theirs)==" > "$work/wanted"
fetch -r "$work/wanted"
fetch --no-deps "vllm==$version" xgrammar==0.2.8

for wheel in "$work"/*.whl; do
  if [[ $(basename "$wheel") =~ ^($theirs)- ]]; then continue; fi
  case $(basename "$wheel") in
    vllm-*) python3 tools/part_of_wheel.py "$wheel" '*.py' --into "$out" ;;
    *) cp "$wheel" "$out" ;;
  esac
done
du -sh "$out"
