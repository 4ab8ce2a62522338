"""What a file of tests/gpu needs. Without it the file is one skip with the reason."""

from __future__ import annotations

import pytest
import torch

from dsv4_backends import NoProviderError
from dsv4_backends.selection import builds, plugins
from dsv4_backends.testing import checks

EVERYWHERE = ("torch", "triton")
"""Providers of every op on every GPU that runs these tests."""


def needs(count: int = 1, *, library: str = "") -> None:
    """Skip the file that calls this at its head.

    Args:
        count: CUDA GPUs.
        library: The provider whose native library has to be installed.
    """
    __tracebackhide__ = True  # the skip is that file's
    wanted = "a CUDA GPU" if count == 1 else f"{count} CUDA GPUs"
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if there < count:
        pytest.skip(f"needs {wanted}{' and ' * bool(library)}{library}", allow_module_level=True)
    if library:
        (spec,) = (spec for spec in plugins.load().providers if spec.name == library)
        for reason in (reason for build in builds.look(spec).values() for reason in build.reasons):
            if reason.code == "distribution-missing":
                pytest.skip(f"needs {library}: {reason.message}", allow_module_level=True)


def provided(provider: str, op: str, device: torch.device) -> checks.Subject:
    """A provider's function on a GPU. Skips the test where a native library does not have it; those of
    ``EVERYWHERE`` have to.
    """
    try:
        return checks.subject(provider, op, device)
    except NoProviderError as error:
        if provider in EVERYWHERE:
            raise
        pytest.skip(str(error))
