"""Names that differ between the Triton releases supported (3.6 to 3.9), for the Gluon kernels."""

from __future__ import annotations

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# one tensor-map box to shared memory; renamed in Triton 3.9
load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
# all threads of a role; renamed in Triton 3.9
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
