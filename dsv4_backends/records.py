"""Dataclasses as JSON: the one writer and the one reader of result files and of the shipped tables.

A file has a line for each field of the outermost dataclass, and a line for each entry of a field that holds several
dataclasses, so that a diff shows what changed. A field at its default is left out. Fractions have 6 significant digits:
more than a clock resolves, and enough for what is made of the file to stay the same. Keys that the dataclass lacks are
ignored.
"""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from packaging.version import InvalidVersion, Version

from .errors import PolicyError

T = TypeVar("T")
DIGITS = 6
_NONE = type(None)


def plain(value: Any) -> Any:
    """What ``json`` can write: dataclasses as objects, named tuples as arrays, both without trailing defaults."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((f.name, getattr(value, f.name), _default(f)) for f in dataclasses.fields(value))
        return {
            name: plain(found) for name, found, default in fields if default is dataclasses.MISSING or found != default
        }
    if isinstance(value, tuple) and hasattr(value, "_field_defaults"):
        kind: Any = type(value)
        items, names = list(value), list(kind._fields)
        while names and names[-1] in kind._field_defaults and items[-1] == kind._field_defaults[names[-1]]:
            items.pop()
            names.pop()
        return [plain(item) for item in items]
    if isinstance(value, Mapping):
        return {key: plain(found) for key, found in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(found) for found in value]
    if isinstance(value, float):
        return int(value) if value.is_integer() else float(f"{value:.{DIGITS}g}")
    return str(value) if isinstance(value, Version) else value


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def text(record: Any) -> str:
    """The file of a dataclass, or of a mapping of the same form."""
    content = plain(record)
    lines = ",\n".join(f" {json.dumps(name)}: {_lines(value)}" for name, value in content.items())
    return f"{{\n{lines}\n}}\n"


def _lines(value: Any) -> str:
    """A value on one line, or on a line for each entry where the entries are objects or several arrays."""
    entries = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    if not any(isinstance(entry, dict) for entry in entries):
        return json.dumps(value)
    if isinstance(value, dict):
        body = ",\n".join(f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items())
        return f"{{\n{body}\n }}"
    body = ",\n".join(f"  {json.dumps(entry)}" for entry in value)
    return f"[\n{body}\n ]"


def write(record: Any, path: str | Path) -> None:
    Path(path).write_text(text(record), encoding="utf-8")


def load(path: str | Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        PolicyError: it cannot be read, or is no JSON object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PolicyError(f"{path}: no such file") from error
    except OSError as error:
        raise PolicyError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise PolicyError(f"{path}: expected JSON in UTF-8, got something else: {error}") from error
    if not isinstance(content, dict):
        raise PolicyError(f"{path}: expected a JSON object, got {_kind(content)}")
    return content


def read(cls: type[T], path: str | Path) -> T:
    """A file that ``write`` wrote.

    Raises:
        PolicyError: it cannot be read, or lacks something, or has something of another type.
    """
    return build(cls, load(path), str(path))


def build(cls: type[T], content: Any, where: str) -> T:
    """A dataclass from what ``plain`` made of it.

    Args:
        where: What an error calls the content: a file's name.

    Raises:
        PolicyError: something is missing or of another type.
    """
    made: T = _build(cls, content, where)
    return made


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _build(wanted: Any, content: Any, where: str) -> Any:
    origin, arguments = get_origin(wanted), get_args(wanted)
    if wanted is Any:
        return content
    if origin in (Union, types.UnionType):
        return _build_any(arguments, content, where)
    if dataclasses.is_dataclass(wanted):
        return _build_dataclass(wanted, _expect(content, dict, "an object", where), where)
    if hasattr(wanted, "_field_defaults"):
        items = _expect(content, list, "an array", where)
        hints = list(_hints(wanted).items())
        least = len(hints) - len(wanted._field_defaults)
        if not least <= len(items) <= len(hints):
            fields = ", ".join(wanted._fields)
            raise PolicyError(f"{where}: expected {least} to {len(hints)} entries ({fields}), got {len(items)}")
        return wanted(
            *(_build(hint, item, f"{where}.{name}") for (name, hint), item in zip(hints, items, strict=False))
        )
    if origin is tuple:
        items = _expect(content, list, "an array", where)
        return tuple(_build(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(items))
    if origin is not None and issubclass(origin, Mapping):
        found = _expect(content, dict, "an object", where)
        return {key: _build(arguments[1], value, f"{where}.{key}") for key, value in found.items()}
    if wanted is Version:
        try:
            return Version(_expect(content, str, "a version", where))
        except InvalidVersion:
            raise PolicyError(f"{where}: expected a version, got {content!r}") from None
    if wanted is float and type(content) is int:
        return float(content)
    if type(content) is not wanted:
        raise PolicyError(f"{where}: expected {wanted.__name__}, got {_kind(content)}")
    return content


def _build_any(arguments: Sequence[Any], content: Any, where: str) -> Any:
    if content is None and _NONE in arguments:
        return None
    kinds = [kind for kind in arguments if kind is not _NONE]
    for kind in kinds[:-1]:
        if type(content) is kind:
            return content
    return _build(kinds[-1], content, where)


def _build_dataclass(cls: Any, content: dict[str, Any], where: str) -> Any:
    hints, values = _hints(cls), {}
    for field in dataclasses.fields(cls):
        if field.name in content:
            values[field.name] = _build(hints[field.name], content[field.name], f"{where}: {field.name}")
        elif _default(field) is dataclasses.MISSING:
            raise PolicyError(f"{where}: expected {field.name!r}, which is missing")
    return cls(**values)


def _expect(content: Any, kind: type[T], words: str, where: str) -> T:
    if not isinstance(content, kind):
        raise PolicyError(f"{where}: expected {words}, got {_kind(content)}")
    return content


def _kind(content: Any) -> str:
    return "null" if content is None else f"{type(content).__name__} {str(content)[:40]!r}"
