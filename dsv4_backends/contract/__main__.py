"""``python -m dsv4_backends.contract OP``: print the check that is generated from an op's contract."""

from __future__ import annotations

import argparse

from . import CONTRACTS
from .checker import check_source


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dsv4_backends.contract", description="Print the check that is generated from an op's contract."
    )
    parser.add_argument("op", choices=CONTRACTS, metavar="OP", help=", ".join(CONTRACTS))
    print(check_source(CONTRACTS[parser.parse_args().op]), end="")


if __name__ == "__main__":
    main()
