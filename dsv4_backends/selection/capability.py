"""Compute capability as a version. Whether a claim covers a capability is decided in this file only.

A capability is a ``packaging.version.Version`` ("8.6", "12.1"). A claim is a tuple of specifier sets of which one
must match: ``(">=8.0",)`` for code compiled on the spot, ``("==9.0", "==10.0")`` for a library that was built for
exactly those. A newer part of a family that a claim names exactly ("10.3" where "==10.0" is claimed) is *untested*:
it may run, so it is neither refused nor trusted.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable
from functools import lru_cache

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from ..errors import PolicyError


class Support(enum.Enum):
    """What a claim says about one capability."""

    SUPPORTED = "supported"
    UNTESTED = "untested"
    UNSUPPORTED = "unsupported"


BELOW_10 = ("5.0", "5.2", "5.3", "6.0", "6.1", "6.2", "7.0", "7.2", "7.5", "8.0", "8.6", "8.7", "8.8", "8.9", "9.0")
"""The capabilities below 10.0 that CUDA 12 or 13 compiles for. No other one will come."""


def parse_capability(text: str, name: str = "compute capability", form: str = "the form sm_86 or 8.6") -> Version:
    """Read ``sm_86``, ``sm_90a``, ``sm86``, ``8.6`` as a capability. One from 10.0 on may be a newer GPU's.

    Args:
        text: What the user wrote.
        name: What an error calls it.
        form: What an error says is expected.

    Raises:
        PolicyError: the text is none of these, or CUDA 12 and 13 have no such capability.
    """
    match = re.fullmatch(r"sm_?([0-9]{1,2})([0-9])[af]?|([0-9]{1,2})\.([0-9])", text.strip().lower())
    refused = f"{name}: expected {form}, got {text!r}"
    if match is None:
        raise PolicyError(refused)
    capability = Version(f"{match[1] or match[3]}.{match[2] or match[4]}")
    if capability.major < 10 and str(capability) not in BELOW_10:
        family = ", ".join(known for known in BELOW_10 if known.startswith(f"{capability.major}."))
        absent = f"CUDA 12 and 13 have no compute capability {capability}"
        raise PolicyError(f"{refused}: {absent}" + (family and f", only {family}"))
    return capability


def sm(capability: Version) -> str:
    """The ``sm_86`` spelling of a capability."""
    return f"sm_{capability.major}{capability.minor}"


@lru_cache(maxsize=256)
def support(claim: tuple[str, ...], capability: Version) -> Support:
    """Judge one capability against a claim (a tuple of specifier sets, any of which may match)."""
    sets = [SpecifierSet(text) for text in claim]
    if any(capability in specifiers for specifiers in sets):
        return Support.SUPPORTED
    exact = [
        Version(specifier.version)
        for specifiers in sets
        for specifier in specifiers
        if specifier.operator == "==" and not specifier.version.endswith(".*")
    ]
    if any(capability.major == named.major and capability > named for named in exact):
        return Support.UNTESTED
    return Support.UNSUPPORTED


def describe(claim: Iterable[str]) -> str:
    """A claim in words: ``9.0, 10.x or 12.0 and newer``."""
    parts = []
    for text in claim:
        words = []
        for specifier in sorted(SpecifierSet(text), key=str):
            operator, version = specifier.operator, specifier.version.replace(".*", ".x")
            words.append(
                {
                    "==": version,
                    ">=": f"{version} and newer",
                    "<": f"below {version}",
                    "!=": f"not {version}",
                }.get(operator, f"{operator} {version}")
            )
        parts.append(", ".join(words))
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " or " + parts[-1]
