"""The command ``dsv4-backends``, and ``python -m dsv4_backends``."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line; returns the exit code."""
    try:
        from .commands import cli
    except KeyboardInterrupt:  # the imports take a moment
        print("dsv4-backends: interrupted", file=sys.stderr)
        return 130
    return cli.main(to_the_end=True)


if __name__ == "__main__":
    sys.exit(main())
