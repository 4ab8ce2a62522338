"""A ring of buffers in shared memory between roles: slots, phases, the barriers of each slot, and arrivals."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .gluon import barrier


@gluon.jit
def barriers(SLOTS: gl.constexpr, FULL: gl.constexpr, EMPTY: gl.constexpr, DONE: gl.constexpr = 0):
    """Barriers of a ring, initialised: ``full`` completes after FULL arrivals, ``empty`` after EMPTY; with DONE there
    is a third."""
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    if DONE:
        done = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=FULL)
        mbarrier.init(empty.index(i), count=EMPTY)
        if DONE:
            mbarrier.init(done.index(i), count=DONE)
    if DONE:
        return full, empty, done
    else:
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


@gluon.jit
def sync():
    """Wait for all threads of the role, and make what they stored in shared memory visible to wgmma."""
    fence_async_shared()
    barrier()


@gluon.jit
def arrive(bar):
    """One arrival for all threads of the role."""
    barrier()
    mbarrier.arrive(bar, count=1)


@gluon.jit
def publish(bar):
    """One arrival for all threads of the role, with what they stored visible to wgmma."""
    sync()
    mbarrier.arrive(bar, count=1)
