#!/usr/bin/env bash
# Pack what tests/vllm_suite.py needs into one file, for a GPU machine with Python 3.12 and no network, which has torch,
# triton, transformers, numpy and pytest: vLLM's Python files without its compiled parts, and its other imports.
# Usage: tools/vllm_bundle.sh OUT.tar.gz [VLLM_VERSION]
# There, in this repository's root:
#   mkdir -p BUNDLE && tar xzf OUT.tar.gz -C BUNDLE
#   PYTHONPATH=BUNDLE:$PWD:$PWD/backends FAKE_SM=9.0 TEST_PIN='*=triton' python -m pytest -q tests/vllm_suite.py
set -euo pipefail
out=$(realpath -m "${1:?usage: tools/vllm_bundle.sh OUT.tar.gz [VLLM_VERSION]}")
version=${2:-0.33.0}
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

platforms=()
for tag in manylinux_2_34 manylinux_2_31 manylinux_2_28 manylinux_2_27 manylinux_2_26 manylinux_2_24 manylinux_2_17 manylinux2014; do
  platforms+=(--platform "${tag}_x86_64")
done
fetch() {
  python3 -m pip download -q --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" -d "$work" "$@" \
    2> >(grep -v '^WARNING' >&2)
}

# The machine's own packages stay its own.
theirs='^(torch|numpy|transformers|pluggy|pytest|packaging)=='
grep -E '^[a-z]' tests/vllm_requirements.txt | grep -Ev "$theirs" > "$work/wanted"
fetch -r "$work/wanted"
fetch --no-deps "vllm==$version" xgrammar==0.2.8
python3 -m pip wheel -q --no-deps -w "$work" .

mkdir "$work/bundle"
for wheel in "$work"/*.whl; do
  case $(basename "$wheel") in
    vllm-*) python3 -m zipfile -e "$wheel" "$work/vllm"
      (cd "$work/vllm" && find . -name '*.py' -o -name '*.json' -path '*/vllm/*' -size -200k -o -path '*.dist-info/*') > "$work/names"
      tar cf - -C "$work/vllm" -T "$work/names" | tar xf - -C "$work/bundle" ;;
    # Only the metadata, in which vLLM finds the entry point; the code is the repository's.
    dsv4_backends-*) python3 -m zipfile -e "$wheel" "$work/self" && cp -r "$work"/self/*.dist-info "$work/bundle" ;;
    typing_extensions-* | tqdm-* | numpy-*) ;;
    *) python3 -m zipfile -e "$wheel" "$work/bundle" ;;
  esac
done
find "$work/bundle" -name __pycache__ -prune -exec rm -r {} +
tar czf "$out" -C "$work/bundle" .
du -h "$out"
