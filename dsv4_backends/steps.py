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
def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _capturing() -> bool:
    import torch

    return _has_cuda() and torch.cuda.is_current_stream_capturing()


@contextmanager
def step() -> Iterator[None]:
    """Promise that lengths tensors keep their values until the end of the block, on the current thread or task.

    Providers may then compute what depends on the lengths alone (a schedule) once instead of in every call. A length
    that is written to by PyTorch inside the block is noticed; one that is written to by other means is not. A block
    around calls that a CUDA graph captures belongs inside the capture: then each replay computes the schedule anew.
    """
    token = _current.set(_Step())
    try:
        yield
    finally:
        _current.reset(token)


def once_a_step(key: Hashable, lengths: Sequence[Tensor | None], make: Callable[[], _T]) -> _T:
    """``make()``, or what it gave earlier in the caller's ``step()`` block; for authors of providers.

    Args:
        key: Everything that the result depends on, apart from ``lengths`` and the current stream.
        lengths: Tensors whose values it depends on.
        make: Computes it on the current stream.
    """
    current = _current.get()
    if current is None:
        return make()
    stream = 0
    if _has_cuda():
        import torch

        # A graph must not read what was computed outside it: its memory may be gone at the replay, and is stale then.
        if torch.cuda.is_current_stream_capturing() is not current.capturing:
            return make()
        index = next((t.get_device() for t in lengths if t is not None and t.is_cuda), -1)
        # What torch.cuda.current_stream() gives, without the object around it.
        stream = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device() if index < 0 else index)
    whole = (key, stream, *map(_identity, lengths))
    found = current.kept.get(whole)
    if found is None:
        # The tensors are kept too, so that no other tensor takes their memory while the block lasts.
        found = current.kept[whole] = (make(), lengths)
    result: _T = found[0]
    return result


def _identity(t: Tensor | None) -> Hashable:
    if t is None:
        return None
    # An address is of one device.
    return t.data_ptr(), t.shape, t.stride(), -1 if t.is_inference() else t._version
