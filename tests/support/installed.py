"""Distributions as pip leaves them, and the source of plugins, each from a few arguments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any


def distribution(
    place: Path,
    name: str,
    version: str = "1.0",
    *,
    files: Mapping[str, str] | None = None,
    points: Mapping[str, Mapping[str, str]] | None = None,
    metadata: Mapping[str, str | bytes] | None = None,
) -> Path:
    """Write a distribution to ``place``, a folder of ``sys.path``, and return its ``.dist-info``.

    Args:
        files: Texts by path.
        points: Its entry points: by group, targets by name.
        metadata: More files of the ``.dist-info``, or others in place of its own ``METADATA``.
    """
    for path, text in (files or {}).items():
        file = place / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(dedent(text), encoding="utf-8")
    info = place / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    kept: dict[str, str | bytes] = {"METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"}
    if points:
        kept["entry_points.txt"] = "".join(
            f"[{group}]\n" + "".join(f"{point} = {target}\n" for point, target in targets.items())
            for group, targets in points.items()
        )
    for file_name, content in (kept | dict(metadata or {})).items():
        (info / file_name).write_bytes(content.encode() if isinstance(content, str) else content)
    return info


def provider(
    ops: Mapping[str, Mapping[str, Any]], *, name: str = "acme", tier: str = "NATIVE", code: str = "", **fields: Any
) -> str:
    """The source of a plugin with one provider, which its own ``code`` follows.

    Args:
        ops: Fields of the ``Implementation`` of each op.
        tier: A name in ``Tier``.
        fields: More of the ``ProviderSpec``.
    """
    rows = "".join(f"        d.Implementation(op={op!r}{_written(of_op)}),\n" for op, of_op in ops.items())
    return (
        "import dsv4_backends as d\n"
        "@d.hookimpl\n"
        "def dsv4_providers():\n"
        f"    yield d.ProviderSpec(name={name!r}, summary='fake', tier=d.Tier.{tier}{_written(fields)}, "
        f"implementations=(\n{rows}    ))\n{dedent(code)}"
    )


def _written(fields: Mapping[str, Any]) -> str:
    return "".join(f", {name}={value!r}" for name, value in fields.items())
