"""What the Gluon kernels share: names that differ between Triton 3.6 and 3.9, and words of PTX."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from .bits import E4M3X4_TIMES_144, E4M3X4_TIMES_144_AND
from .names import either

# Renamed in Triton 3.9. If both names are missing, the kernels that use it are left out: see variants.py.
# one tensor-map box to shared memory
load_box = either(either(hopper, "tma"), "async_load", "async_copy_global_to_shared")
# cp.async
async_load = either(either(hopper, "async_copy"), "async_load", "async_copy_global_to_shared")
# all threads of a role
barrier = either(gl, "barrier", "thread_barrier")
# shared memory as another type, shape and layout
reinterpret = either(either(gl, "shared_memory_descriptor"), "_reinterpret", "reinterpret")
FROM_3_9 = gl.constexpr(hasattr(gl, "barrier"))
_TIMES_144 = gl.constexpr(E4M3X4_TIMES_144)
_TIMES_144_AND = gl.constexpr(E4M3X4_TIMES_144_AND)


@gluon.jit
def launch_dependents():
    """Let the next kernel start. It waits by itself for what this one writes."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def times_144(raw):
    """e4m3 bytes to fp16, each times 144; a NaN becomes infinite."""
    return gl.inline_asm_elementwise(_TIMES_144, "=&r,=&r,r", [raw], dtype=gl.float16, is_pure=True, pack=4)


@gluon.jit
def times_144_and(raw, factor):
    """The same, each also times an fp16 factor."""
    return gl.inline_asm_elementwise(
        _TIMES_144_AND, "=&r,=&r,r,r,r", [raw, factor], dtype=gl.float16, is_pure=True, pack=4
    )


@gluon.jit
def reordered(x):
    """Of each 16 of K the pairs 0, 2, 4, 6 and then 1, 3, 5, 7: a thread that loads four bytes has what one instruction
    multiplies. Both operands alike, and the sum is the same."""
    rows: gl.constexpr = x.shape[0]
    pairs = gl.reshape(x, [rows, x.shape[1] // 16, 4, 2, 2])
    return gl.reshape(gl.permute(pairs, (0, 1, 3, 2, 4)), [rows, x.shape[1]])


@gluon.jit
def block_index(AXIS: gl.constexpr):
    """The block's place in the grid ("x" or "y"), by PTX that is opaque to the compiler: with ``gl.program_id`` it
    keeps the index and all that is derived from it in registers across a loop, which spills."""
    return gl.inline_asm_elementwise(
        "mov.u32 $0, %ctaid." + AXIS + ";", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
