"""The locks of this package, in the order in which they may be taken, and what ``fork()`` does with them.

A process may fork while another thread holds one. The child has no such thread, so it is never released; and what the
lock guards, an import among it, would stay half done. So a fork waits for them, and the child gets them free.
"""

from __future__ import annotations

import os
import threading

bindings = threading.RLock()
"""Who is bound: plugins, probes and the import of implementations."""
natives = threading.RLock()
"""The libraries behind what ``compat.install`` put in front of them."""
imports = threading.RLock()
"""Who waits for the import of a module."""

_ORDER = (bindings, natives, imports)
_WAIT = 30.0
"""Seconds: the import of a library ends within them. After it the fork goes on, as it would without these lines."""
_forking = threading.local()


def _before() -> None:
    _forking.taken = [lock for lock in _ORDER if lock.acquire(timeout=_WAIT)]


def _after() -> None:
    taken, _forking.taken = getattr(_forking, "taken", []), []
    for lock in reversed(taken):
        lock.release()


def _in_child() -> None:
    for lock in _ORDER:
        if lock not in _forking.taken:  # its owner is not in this process
            lock._at_fork_reinit()  # type: ignore[attr-defined]
    _after()  # not acquired again: this thread may have forked while it had one


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_in_child)

__all__ = ["bindings", "imports", "natives"]
