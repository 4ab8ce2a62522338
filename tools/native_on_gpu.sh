#!/usr/bin/env bash
# Everything that the native providers need a Hopper GPU for, with one release line of their libraries.
# Usage: tools/native_on_gpu.sh WHEELS LINE OUT [STEP...]
#   WHEELS  folder with the wheels of the line (tools/part_of_wheel.py cuts vLLM's down to its copy of DeepGEMM)
#   LINE    tokenspeed, sgl or vllm (DeepGEMM only): the name in the result files
#   OUT     folder for the results, list-LINE.txt, conformance-LINE.json, overhead-LINE.json; docs/results keeps the JSON with the prefix h200-native-
#   STEP    list suite overhead (default: all of them)
# Environment: JOBS (8), LEVEL (full), and seconds for each step: LIST_S (60), SUITE_S (280), OVERHEAD_S (200).
# Needs a python3 with torch for CUDA 13, pytest and pytest-xdist, and nvcc. A step that fails does not stop the others.
set -uo pipefail
wheels=$(realpath "$1") line=$2 out=$(realpath -m "$3")
shift 3
steps=${*:-list suite overhead}
cd "$(dirname "$0")/.."
mkdir -p "$out"
# An installed copy does not know its commit; a copy of this tree without .git does not either: then set it.
export GIT_COMMIT=${GIT_COMMIT:-$(python3 -c 'from dsv4_backends.bench.provenance import commit; print(commit())')}
jobs=${JOBS:-8}
site=/tmp/site-$line
rm -rf "$site"
python3 -m pip install -q --no-deps --no-index --target "$site" "$wheels"/*.whl || exit 1
# This tree comes the same way, with its entry points. Where it cannot be built, files do what pip would have done.
if ! python3 -m pip install -q --no-deps --no-index --no-build-isolation --target "$site" . > "$out/pip-$line.txt" 2>&1; then
  cp -r dsv4_backends backends/dsv4_backend_* "$site"
  python3 - "$site" << 'END'
import pathlib, sys, tomllib
project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
info = pathlib.Path(sys.argv[1], f"dsv4_backends-{project['version']}.dist-info")
info.mkdir(exist_ok=True)
(info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
points = "".join(f"{name} = {target}\n" for name, target in project["entry-points"]["dsv4_backends"].items())
(info / "entry_points.txt").write_text(f"[dsv4_backends]\n{points}")
END
fi
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
export DG_JIT_CACHE_DIR=${DG_JIT_CACHE_DIR:-/tmp/deep_gemm-$line}
only=(--only deep_gemm)
if [ "$line" != vllm ]; then only+=(--only flash_mla); fi
for step in $steps; do
  echo "== $line $step: $(date +%T)"
  case $step in
    list)
      timeout "${LIST_S:-60}" python3 -m dsv4_backends list > "$out/list-$line.txt"
      timeout "${LIST_S:-60}" python3 -m dsv4_backends list --json > "$out/list-$line.json"
      timeout "${LIST_S:-60}" python3 -m dsv4_backends doctor > "$out/doctor-$line.txt"
      cat "$out/list-$line.txt" ;;
    suite)
      timeout -s INT -k 20 "${SUITE_S:-280}" python3 tools/conformance.py --level "${LEVEL:-full}" --jobs "$jobs" \
        "${only[@]}" --json "$out/conformance-$line.json" > "$out/conformance-$line.txt" 2>&1
      tail -25 "$out/conformance-$line.txt" ;;
    overhead)
      timeout -k 5 "${OVERHEAD_S:-200}" python3 tools/native_overhead.py --jobs "$jobs" "${only[@]}" \
        --json "$out/overhead-$line.json" > "$out/overhead-$line.txt" 2>&1
      cat "$out/overhead-$line.txt" ;;
    *) echo "unknown step $step" >&2 ;;
  esac
done
echo "== $line done: $(date +%T)"
