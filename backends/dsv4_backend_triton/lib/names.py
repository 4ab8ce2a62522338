"""Names of Triton that another version of it lacks."""

from __future__ import annotations

from typing import Any


class Missing:
    """In place of a name that this Triton lacks."""

    def __init__(self, why: str) -> None:
        self.why = why


def either(owner: Any, *names: str) -> Any:
    """The first of the names that ``owner`` has: what it is called in one version of Triton and in another."""
    for name in names:
        if hasattr(owner, name):
            return getattr(owner, name)
    if isinstance(owner, Missing):
        return owner
    return Missing(f"{called(owner)} has no {' or '.join(names)}")


def called(owner: Any) -> str:
    return str(getattr(owner, "__name__", type(owner).__name__))
