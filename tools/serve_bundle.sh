#!/usr/bin/env bash
# The real vLLM for tools/serve_on_gpu.sh, in one archive of about 55 MB: for a machine with torch for CUDA 13, Triton,
# transformers, Python 3.12 and no network. vLLM's compiled libraries lose the device code of other architectures.
# Usage: tools/serve_bundle.sh OUT.tar.xz [ARCH]    ARCH: of the GPU, such as 90 (default)
# Needs pip, strip and readelf, and 3 GB of scratch space.
set -euo pipefail
out=$(realpath -m "${1:?usage: tools/serve_bundle.sh OUT.tar.xz [ARCH]}") arch=${2:-90}
tools=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

platforms=()
for tag in manylinux_2_39 manylinux_2_35 manylinux_2_34 manylinux_2_31 manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux1 manylinux2014; do
  platforms+=(--platform "${tag}_x86_64")
done
get() { # FOLDER REQUIREMENT...
  python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
    -d "$1" "${@:2}" 2> >(grep -v '^WARNING' >&2)
}

get wheel vllm==0.33.0
mkdir -p tree/vllm tree/deps
python3 -m zipfile -e wheel/vllm-*.whl tree/vllm
vllm=tree/vllm/vllm
# Other models' kernels, the Rust front, FlashAttention's kernels (a stub keeps its import): DeepSeek V4 calls none.
rm -rf "$vllm"/_{deepselect,flashkda,qutlass}_C.abi3.so "$vllm"/models/kimi_k3 "$vllm"/third_party/fmha_sm100 "$vllm"/vllm-rs \
  "$vllm"/vllm_flash_attn/*_fa3_C.abi3.so "$vllm"/vllm_flash_attn/_vllm_fa2_C.abi3.so \
  "$vllm"/model_executor/layers/fused_moe/configs
echo "# In place of the compiled FlashAttention 2." > "$vllm/vllm_flash_attn/_vllm_fa2_C.py"
for library in "$vllm"/*.abi3.so "$vllm"/third_party/deep_gemm/*.so; do
  strip --strip-unneeded "$library"
  if readelf -SW "$library" | grep -q nv_fatbin; then
    python3 "$tools/cut_device_code.py" "$library" "$library.cut" --keep "$arch"
    mv "$library.cut" "$library"
  fi
done
# What an image with torch and transformers usually lacks.
get deps annotated_types==0.8.0 apache_tvm_ffi==0.1.11 cachetools==8.0.1 cbor2==6.3.0 compressed_tensors==0.17.0 \
  fastapi==0.136.3 httpcore2==2.16.2 httpx2==2.16.2 jiter==0.19.0 llguidance==1.7.6 loguru==0.7.3 msgspec==0.22.0 \
  openai==3.54.0 orjson==3.13.0 oss_harmony==0.0.11 partial_json_parser==0.2.1.1.post7 pybase64==1.5.1 pydantic==2.14.4 \
  pydantic_core==2.50.5 pyzmq==27.3.0 sniffio==1.3.1 starlette==1.10.0 truststore==0.10.5 typing_inspection==0.4.5 \
  uvicorn==0.54.0 watchfiles==1.3.0 xgrammar==0.2.8
for wheel in deps/*.whl; do python3 -m zipfile -e "$wheel" tree/deps; done
tar cf - -C tree vllm deps | xz -T0 -2 > "$out"
du -h "$out"
