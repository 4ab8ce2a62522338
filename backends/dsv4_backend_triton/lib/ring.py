"""A ring of buffers in shared memory between roles: slots, phases, the barriers of each slot, and arrivals."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .gluon import barrier


@gluon.jit
def barriers(SLOTS: gl.constexpr, COUNTS: gl.constexpr):
    """Barriers of a ring, initialised: for each count an array of barriers that so many arrivals complete."""
    arrays = ()
    for _ in gl.static_range(len(COUNTS)):
        arrays += (gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout()),)  # type: ignore[assignment]
    for i in gl.static_range(SLOTS):
        for array in gl.static_range(len(COUNTS)):
            mbarrier.init(arrays[array].index(i), count=COUNTS[array])
    return arrays


@gluon.jit
def full_slot(full, step, SLOTS: gl.constexpr):
    """The slot of a reader's step, ``step % SLOTS``, once it is full."""
    slot = step % SLOTS
    mbarrier.wait(full.index(slot), (step // SLOTS) & 1)
    return slot


@gluon.jit
def empty_slot(empty, step, SLOTS: gl.constexpr):
    """The slot of a writer's step, once it is empty."""
    slot = step % SLOTS
    mbarrier.wait(empty.index(slot), (step // SLOTS) & 1 ^ 1)
    return slot


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
