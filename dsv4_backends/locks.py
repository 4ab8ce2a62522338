"""The locks of this package, in the order in which they may be taken, and what ``fork()`` does with them.

A process may fork while another thread holds a lock. The child does not have that thread, so the lock would never be
released there, and what it guards, such as an import, would stay half done. So a fork waits for all locks, and they are
free in the child.
"""

from __future__ import annotations

import os
import threading

bindings = threading.RLock()
"""Held while plugins are loaded, probes run, and implementations are imported."""
natives = threading.RLock()
"""Held while the library behind a module of ``compat.install`` is imported."""
imports = threading.RLock()
"""Guards the list of modules whose import the hook waits for."""

_ORDER = (bindings, natives, imports)
_WAIT = 30.0
"""Seconds for each lock: longer than the import of a library takes. Afterwards the fork goes on without the lock."""
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
