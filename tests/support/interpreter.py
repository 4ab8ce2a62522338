"""Whether Triton's interpreter can run here, where the kernels are tested without a GPU."""

from __future__ import annotations

import os
from importlib import metadata

from packaging.version import Version

ON = os.environ.get("TRITON_INTERPRET", "0") == "1"


def trouble(triton: str, numpy: str) -> str:
    """Why the interpreter of this Triton cannot run with this NumPy; empty if it can."""
    if Version(triton) < Version("3.7") and Version(numpy) >= Version("2.4.dev0"):
        return (
            f"the interpreter of Triton {triton} reads scalars in a way that NumPy {numpy} refuses: "
            "install 'numpy<2.4', or Triton 3.7 or newer"
        )
    return ""


def trouble_here() -> str:
    import triton

    return trouble(triton.__version__, metadata.version("numpy"))
