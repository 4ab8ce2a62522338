#!/usr/bin/env bash
# tests/engines/vllm_suite.py on a GPU, with what tools/vllm_bundle.sh has brought: over Triton, and over the native libraries.
# Usage: tools/vllm_on_gpu.sh WHEELS OUT [RUN...]
#   WHEELS  folder with the bundle; for the native run also the wheels of DeepGEMM and FlashMLA
#   OUT     folder for the results: RUN.txt, RUN.xml, and vllm.json with the numbers of all
#   RUN     triton native (default: both, side by side), or torch
# Needs torch, transformers and pytest in the python3 on PATH; for the native run nvcc. A run that fails does not stop the other.
set -uo pipefail
wheels=$(realpath "$1") out=$(realpath -m "$2")
shift 2
runs=${*:-triton native}
cd "$(dirname "$0")/.."
mkdir -p "$out"
# An installed copy does not know its commit; a copy of this tree without .git does not either: then set it.
export GIT_COMMIT=${GIT_COMMIT:-$(python3 -c 'from dsv4_backends.bench.provenance import commit; print(commit())')}
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
install() { python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$@"; }

bundle=() native=()
for wheel in "$wheels"/*.whl; do
  case $(basename "$wheel") in
    dsv4_backends-* | execnet-* | pytest_xdist-*) ;;
    *deep_gemm-* | *deepgemm-* | *flash_mla-* | *flashmla-*) native+=("$wheel") ;;
    *) bundle+=("$wheel") ;;
  esac
done
install "$here/vllm" "${bundle[@]}" || exit 2
if [ ${#native[@]} -gt 0 ]; then install "$here/native" "${native[@]}" || exit 2; fi
# This tree's entry points, whatever is installed.
python3 -m pip install -q --no-index --no-deps --no-build-isolation --target "$here/self" . || exit 2

FAKE_SM=${FAKE_SM:-$(python3 -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')} || exit 2
export FAKE_SM VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 DG_JIT_CACHE_DIR=${DG_JIT_CACHE_DIR:-$here/jit}
suite() { # NAME PATH VARIABLE=VALUE
  env "$3" PYTHONPATH="$2:$here/self:$here/vllm${PYTHONPATH:+:$PYTHONPATH}" python3 -m pytest tests/engines/vllm_suite.py -q -p no:cacheprovider \
    -o junit_family=xunit1 --junitxml="$out/$1.xml" > "$out/$1.txt" 2>&1
}
for run in $runs; do
  case $run in
    native) suite native "$here/native" TEST_ORDER=flash_mla,deep_gemm & ;;
    *) suite "$run" "" "TEST_PIN=*=$run" & ;;
  esac
done
wait
PYTHONPATH="$here/self:$here/vllm${PYTHONPATH:+:$PYTHONPATH}" python3 - "$out" $runs << 'PYTHON'
import json, sys
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, "tools")
from kept import VllmRun, VllmRuns

from dsv4_backends import records
from dsv4_backends.bench.provenance import provenance

out, failed = Path(sys.argv[1]), False
results = {}
for run in sys.argv[2:]:
    try:
        (suite,) = ElementTree.parse(out / f"{run}.xml").getroot().iter("testsuite")
    except (OSError, ElementTree.ParseError) as error:
        print((out / f"{run}.txt").read_text()[-3000:])
        results[run] = VllmRun(error=f"{type(error).__name__}: {error}")
        failed = True
        continue
    results[run] = row = VllmRun(
        **{key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")},
        served=next((json.loads(p.get("value")) for p in suite.iter("property") if p.get("name") == "served"), {}),
        failed=tuple(case.get("name") for case in suite.iter("testcase") if {child.tag for child in case} & {"failure", "error"}),
    )
    failed = failed or bool(row.failed) or not row.tests
made = VllmRuns(**provenance("tools/vllm_on_gpu.sh WHEELS OUT"), vllm=version("vllm"), runs=results)
records.write(made, out / "vllm.json")
print(records.text(made))
sys.exit(failed)
PYTHON
