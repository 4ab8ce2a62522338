"""Whether a requirement is met: which version is installed, and how versions that are not releases count."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from .provider import Reason

_VERSION = re.compile(r"^__version__\s*(?::[^=]*)?=\s*['\"]([^'\"]+)['\"]", re.MULTILINE)


def version_of(name: str) -> str | None:
    """The installed version of a distribution; None where there is neither it nor a module of its name.

    The module that an import would find says it first, where its ``__init__.py`` has the version as text. Triton comes
    as pytorch-triton, triton-windows or fbtriton too, and one of two builds overwrites the other's files while the
    metadata of both stay. Nothing is imported.
    """
    module = re.sub(r"[-.]+", "_", name)
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        spec = None
    source = Path(spec.origin) if spec is not None and spec.origin else None
    if source is not None and source.name == "__init__.py":
        try:
            text = source.read_text(encoding="utf-8", errors="replace")
        except OSError:
            text = ""
        if match := _VERSION.search(text):
            return match[1]
    try:
        version: str | None = metadata.version(name)
    except Exception:  # not installed, or metadata that cannot be read
        version = None
    if version is None and source is not None:
        version = _owner_version(module)
    return version


def _owner_version(module: str) -> str | None:
    """The version of whichever distribution has a module: reads all metadata, so it is asked last."""
    try:
        owners = metadata.packages_distributions().get(module, ())
        return next((version for owner in owners if (version := metadata.version(owner))), None)
    except Exception:
        return None


def release(text: str) -> Version | None:
    """A version as far as it can be compared: its beginning, where PEP 440 cannot read the whole."""
    try:
        return Version(text)
    except InvalidVersion:
        match = re.match(r"v?(\d+(?:\.\d+)*)", text.strip())
        return Version(match[1]) if match else None


def unmet(text: str, installed: Mapping[str, str], hint: str = "") -> Reason | None:
    """Why a PEP 508 requirement is not met, or None.

    A pre-release counts as the release that it leads to: 3.6.0rc1 meets ``>=3.6``.

    Args:
        text: The requirement.
        installed: Distribution name to version.
        hint: The next step; default: pip's command.
    """
    requirement = Requirement(text)
    if requirement.marker is not None and not requirement.marker.evaluate():
        return None
    name, specifier = requirement.name, requirement.specifier
    found = installed.get(name)
    if found is None:
        return Reason("distribution-missing", f"{name} is not installed", hint or f"pip install '{text}'")
    version = release(found)
    if not specifier or (
        version is not None
        and any(specifier.contains(v, prereleases=True) for v in (version, Version(version.base_version)))
    ):
        return None
    hint = hint or f"pip install -U '{text}'"
    if version is None:
        message = f"{name} is installed as {found!r}, which cannot be compared with {specifier}"
        return Reason("distribution-version", message, hint)
    return Reason("distribution-version", f"{name} {found} is installed, needs {specifier}", hint)


__all__ = ["release", "unmet", "version_of"]
