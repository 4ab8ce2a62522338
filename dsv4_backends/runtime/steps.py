"""What may be computed once for all layers of a step: the schedule that a library makes from the lengths.

Only the caller knows that lengths keep their values from layer to layer, so only the caller can say so::

    with dsv4_backends.step():
        for layer in layers:
            ...  # the same context_lens, topk_length and extra_topk_length in every layer
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

_T = TypeVar("_T")


class _Step:
    """What was computed in one block, and whether the block began inside the capture of a CUDA graph."""

    __slots__ = ("capturing", "kept")

    def __init__(self) -> None:
        self.capturing = _capturing()
        self.kept: dict[Hashable, tuple[Any, Sequence[Tensor | None]]] = {}


_current: ContextVar[_Step | None] = ContextVar("dsv4_backends_step", default=None)


@functools.cache
def _cuda() -> tuple[Callable[[], bool], Callable[[], int], Callable[[int], int]] | None:
    """The functions for: whether the current stream is captured, the current device, a device's current stream.

    They are what functions of torch.cuda call: the Python around them takes longer than they do. None without CUDA.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    c = torch._C
    return c._cuda_isCurrentStreamCapturing, c._cuda_getDevice, c._cuda_getCurrentRawStream


def _capturing() -> bool:
    cuda = _cuda()
    return cuda is not None and cuda[0]()


@contextmanager
def step() -> Iterator[None]:
    """Promise that lengths tensors keep their values until the end of the block, on the current thread or task.

    Providers may then compute what depends on the lengths alone (a schedule) once instead of in every call. A length
    that is written to by PyTorch inside the block is noticed; one that is written to by other means is not. A block
    around calls that a CUDA graph captures belongs inside the capture: then each replay computes the schedule again.
    """
    token = _current.set(_Step())
    try:
        yield
    finally:
        _current.reset(token)


def once_a_step(key: Hashable, lengths: Sequence[Tensor | None], make: Callable[[], _T]) -> _T:
    """``make()``, or what it gave earlier in the caller's ``step()`` block; for authors of providers.

    Args:
        key: Everything that the result depends on, apart from ``lengths``, their device and its current stream.
        lengths: Tensors whose values it depends on, all on one device; without any, the device is the current one.
        make: Computes it on the current stream of that device.
    """
    current = _current.get()
    if current is None:
        return make()
    index = -1
    for t in lengths:
        if t is None:
            key = key, None
            continue
        # An address is of one device.
        key = key, t.data_ptr(), t.shape, t.is_contiguous() or t.stride(), -1 if t.is_inference() else t._version
        if index < 0:
            index = t.get_device()
    if (cuda := _cuda()) is not None:
        is_capturing, device, stream_of = cuda
        here = device()
        if index < 0:
            index = here
        stream = stream_of(index)
        # A graph must not read what was computed outside it: its memory may be gone at the replay, and is stale then.
        # Stream 0 is never captured, so that a call on it need not ask.
        if ((stream != 0 or index != here) and is_capturing()) is not current.capturing:
            return make()
        key = key, index, stream
    found = current.kept.get(key)
    if found is None:
        # The tensors are kept too, so that no other tensor takes their memory while the block lasts.
        found = current.kept[key] = (make(), lengths)
    result: _T = found[0]
    return result
