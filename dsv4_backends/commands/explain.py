"""``dsv4-backends explain OP``: every candidate, the preferred first, with all reasons."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ..contract import OPS
from ..selection import builds
from ..selection.resolve import Resolution
from ..selection.survey import survey
from .render import SCHEMA_VERSION, reason_json, resolution_json
from .shared import DEVICE, FINDING, OK, AddCommand, show


def add(command: AddCommand) -> None:
    explain = command("explain", run, "every candidate for one op, the preferred first, with all reasons")
    explain.add_argument("op", choices=OPS, metavar="OP", help=", ".join(OPS))
    explain.add_argument("--device", **DEVICE)


def run(args: argparse.Namespace) -> int:
    resolutions = [r for _, all_ops in survey(args.device).resolutions for r in all_ops if r.op == args.op]
    show(args, lambda: as_json(resolutions), lambda: "\n\n".join(map(str, resolutions)))
    return OK if all(r.serves().candidate for r in resolutions) else FINDING


def as_json(resolutions: Sequence[Resolution]) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "op": resolutions[0].op,
        "devices": [
            {
                "device": r.device.json(),
                **resolution_json(r),
                "notices": {c.name: [reason_json(n) for n in builds.notices(c.implementation)] for c in r.accepted},
            }
            for r in resolutions
        ],
    }
