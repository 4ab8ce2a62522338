"""Other people's code and data: they may raise anything, print, hang, or be unreadable, and harm only themselves.

What runs in this process cannot be stopped. So a command runs it in a thread and goes on after ``LIMIT`` seconds; a
call of an op waits, as every import does.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any, TypeVar

T = TypeVar("T")

LIMIT = 60.0
"""Seconds that a command waits for other people's code: an import, a hook, a look at metadata and files."""
_LONGEST = 2000

_stdout: tuple[Any, int | None] | None = None
"""In a command, its stream and its descriptor."""


class Late(Exception):
    """Other people's code did not finish within the limit."""


def words(error: BaseException) -> str:
    """An error's type and text on one line, with its cause: loaders keep the linker's words there."""
    text, hidden = _line(error)
    line = f"{type(error).__name__} (its {hidden})" if hidden else f"{type(error).__name__}: {text}"
    if error.__cause__ is None:
        return line
    text, hidden = _line(error.__cause__)
    return f"{line} (its cause's {hidden})" if hidden else f"{line} ({text})"


def raised(error: BaseException) -> str:
    """What became of other people's code, after its name in a sentence."""
    return str(error) if isinstance(error, Late) else f"raised {words(error)}"


def _line(error: BaseException) -> tuple[str, str]:
    """An error's text on one line, or why it cannot be shown."""
    try:
        text = " ".join(str(error).split())
    except KeyboardInterrupt:
        raise
    except BaseException as second:
        return "", f"message cannot be shown: __str__ raised {type(second).__name__}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ...", ""


def shown(value: Any) -> str:
    """The ``repr`` of a value, shortened; its type where that raises."""
    try:
        text = repr(value)
    except KeyboardInterrupt:
        raise
    except BaseException:
        return f"a {type(value).__name__} without a repr"
    return text if len(text) <= 200 else f"{text[:200]} ..."


@contextlib.contextmanager
def as_command(*, to_the_end: bool = False) -> Iterator[None]:
    """Within it, what anybody prints goes to stderr, from C too, and other people's code has a time limit.

    Args:
        to_the_end: It stays so until the process ends: an exit handler or a thread may print then.
    """
    global _stdout
    if _stdout is not None:
        yield
        return
    try:
        kept: int | None = os.dup(1)
    except OSError:  # closed: nothing that is printed gets anywhere
        kept = None
    _stdout = sys.stdout, kept
    _point(sys.stderr, 2)
    try:
        yield
    finally:
        if not to_the_end:
            _point(*_stdout)
            _stdout = None
            if kept is not None:
                os.close(kept)


@contextlib.contextmanager
def answering() -> Iterator[None]:
    """In a command, standard output is the command's own again."""
    if _stdout is None:
        yield
        return
    _point(*_stdout)
    try:
        yield
    finally:
        _point(sys.stderr, 2)


def _point(stream: Any, descriptor: int | None) -> None:
    """Print to ``stream``, and from C to ``descriptor``. What is buffered goes where it was meant to go."""
    for printed in (sys.stdout, sys.__stdout__):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            printed.flush()  # type: ignore[union-attr]
    with contextlib.suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).fflush(None)
    if descriptor is not None:
        with contextlib.suppress(OSError):
            os.dup2(descriptor, 1)
    sys.stdout = stream


def run(function: Callable[[], T]) -> T:
    """Run other people's code: at once, or in a command within the limit.

    Raises:
        Late: the limit has passed. The code goes on, in a thread that ends with the process.
        BaseException: whatever it raised.
    """
    if _stdout is None:
        return function()
    result: list[T] = []
    raised: list[BaseException] = []
    context = contextvars.copy_context()

    def work() -> None:
        try:
            result.append(context.run(function))
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work, name="dsv4_backends: other people's code", daemon=True)
    thread.start()
    thread.join(LIMIT)
    if raised:
        raise raised[0]
    if not result:
        raise Late(f"did not finish within {LIMIT:g} s")
    return result[0]


def contained(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a provider's function; what it raises besides exceptions (a panic of Rust's, an exit) becomes one."""
    try:
        return function(*args, **kwargs)
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise RuntimeError(words(error)) from error


def identity(distribution: metadata.Distribution) -> tuple[str, str]:
    """A distribution's name and version, as far as its metadata can be read; else the name of its folder."""
    found = []
    for field in ("name", "version"):
        try:
            found.append(getattr(distribution, field))
        except Exception:
            found.append(None)
    name, version = (value if isinstance(value, str) else "" for value in found)
    return name or os.path.basename(str(getattr(distribution, "_path", ""))) or "unknown distribution", version


__all__ = ["LIMIT", "Late", "answering", "as_command", "contained", "identity", "raised", "run", "shown", "words"]
