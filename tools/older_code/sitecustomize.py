"""Run the code that Triton makes for an older architecture on the GPU that is there.

With this folder in PYTHONPATH and TRITON_OVERRIDE_ARCH=sm80, kernels become the PTX that they would be on an A100
(mma.sync, cp.async), and that is assembled for this GPU: PTX of an older architecture runs on a newer one. Without it,
Triton would write this GPU's own instructions, or a program that this GPU cannot load. Together with
DSV4_BACKENDS_DEVICE=sm_80, which chooses the provider's kernels and launch configurations:

    export PYTHONPATH=tools/older_code TRITON_OVERRIDE_ARCH=sm80 DSV4_BACKENDS_DEVICE=sm_80
    python tools/conformance.py --only triton
"""

import os

if os.environ.get("TRITON_OVERRIDE_ARCH"):
    import torch
    from triton.backends.nvidia.compiler import CUDABackend

    _make_cubin = CUDABackend.make_cubin

    def _for_this_gpu(self, src, metadata, opt, capability):  # type: ignore[no-untyped-def]
        major, minor = torch.cuda.get_device_capability()
        return _make_cubin(self, src, metadata, opt, 10 * major + minor)

    CUDABackend.make_cubin = _for_this_gpu
