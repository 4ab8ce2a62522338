"""Passes the call's window, the selected keys and the pages from compressor and cache to the attention."""

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
    """Replaces the mask: the positions of the queries and the window keys, and which keys are padding.

    Attributes:
        batch, q_length, kv_length: Sequences, queries, and window keys that this call sees.
        q_offset, kv_offset: Position in the sequence of the first query and of the first window key.
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
        width: The largest possible count.
        entries: int32 ``[batch, S, width]``; None: entry j is j.
        key: Identifies count and width within a call, for what layers share.
    """

    count: Tensor
    width: int
    entries: Tensor | None
    key: Any


class HandOver(threading.local):
    """Arguments that transformers does not pass to the attention function.

    Attributes:
        selected, pages: Stored by the module that runs just before the attention, which takes them at once.
        window: A weak reference to the current call's window, for modules that get no mask.
    """

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
    """``make()``, computed once in a call for each ``key`` and tensor of positions."""
    window = None if handover.window is None else handover.window()
    if window is None:
        return make()
    # By id: layers on another device get another tensor. It is kept with the result, so that its id is not reused.
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
    """transformers' mask function. Returns a ``Window`` and not a mask."""
    handover.take()  # left over if an earlier call raised
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
