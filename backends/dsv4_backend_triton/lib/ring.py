"""A ring of buffers in shared memory between roles: slots, phases, and the two barriers of each slot."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


@gluon.jit
def barriers(SLOTS: gl.constexpr, FULL: gl.constexpr, EMPTY: gl.constexpr):
    """Barriers of a ring, initialised: ``full`` completes after FULL arrivals, ``empty`` after EMPTY."""
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=FULL)
        mbarrier.init(empty.index(i), count=EMPTY)
    return full, empty


@gluon.jit
def phase(step, SLOTS: gl.constexpr):
    """What the reader of a step waits for; slot ``step % SLOTS``. The writer waits for the other phase."""
    return (step // SLOTS) & 1


@gluon.jit
def advance(slot, phase, SLOTS: gl.constexpr):
    """The next slot and its phase, without a division."""
    after = slot + 1
    wrap = after == SLOTS
    return gl.where(wrap, 0, after), gl.where(wrap, phase ^ 1, phase)
