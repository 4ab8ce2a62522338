"""From the compressor and the cache to the attention: the call's window, and the keys that were selected."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...selection.provider import Reason
from .refusals import EngineError, refuse_autocast


@dataclass(frozen=True)
class Window:
    """What stands in for the mask: where the queries are among the window keys, and which keys are padding.

    Attributes:
        batch, q_length, kv_length: Sequences, queries, and window keys that this call sees.
        q_offset, kv_offset: Place in the sequence of the first query and of the first window key.
        padding: bool ``[batch, places]``, False for padding, or None.
        memo: Lists that several layers share.
    """

    batch: int
    q_length: int
    kv_length: int
    q_offset: int
    kv_offset: int
    padding: Tensor | None
    device: torch.device
    memo: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]


@dataclass(frozen=True)
class Selected:
    """The compressed keys that each query sees: the first ``count`` of its ``entries``.

    Attributes:
        count: int32 ``[batch or 1, S]``.
        width: Most that a query can see.
        entries: int32 ``[batch, S, width]``; None where entry j is j.
        key: Names count and width among those of one call, for what layers share.
    """

    count: Tensor
    width: int
    entries: Tensor | None
    key: Any


class HandOver(threading.local):
    """transformers hands neither the selection nor the cache to the attention function. Each is left here by the
    module that runs just before it, and taken at once. The window of the call under way is found here by modules that
    get no mask; only the call itself keeps it."""

    selected: Selected | None = None
    pages: Any = None
    window: weakref.ref[Window] | None = None

    def take(self) -> tuple[Selected | None, Any]:
        taken = self.selected, self.pages
        self.selected = self.pages = None
        return taken


handover = HandOver()


def hand_over_pages(layer: Any) -> None:
    handover.pages = layer


def once(key: Any, positions: Tensor, make: Callable[[], Any]) -> Any:
    """``make()``, what follows from ``key`` and the call's positions: one for all layers that are given these."""
    window = None if handover.window is None else handover.window()
    if window is None:
        return make()
    # By identity: a layer on another device has positions of its own. Kept, so that no other tensor takes their id.
    return window.once((key, id(positions)), lambda: (make(), positions))[0]


def window_of(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    device: Any = "cpu",
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> Window:
    """transformers' mask function: no mask, but what it would have said."""
    handover.take()  # what a call that raised may have left
    refuse_autocast(torch.device(device), dtype)
    if not allow_is_causal_skip:
        raise EngineError(
            Reason("engine-mode", "packed sequences and custom mask functions are not served", "use attn 'eager'")
        )
    if not isinstance(q_offset, int):
        raise EngineError(Reason("engine-mode", "static caches are not served", "use a dynamic or a packed cache"))
    if attention_mask is not None and (short := kv_offset + kv_length - attention_mask.shape[-1]) > 0:
        attention_mask = nn.functional.pad(attention_mask, (0, short), value=False)
    window = Window(batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask, torch.device(device))
    handover.window = weakref.ref(window)
    return window
