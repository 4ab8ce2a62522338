"""``dsv4-backends check``: whether a model will run here and who serves it, before it is loaded."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from ..errors import PolicyError
from ..runtime.check import Check
from ..runtime.check import check as judge
from ..selection.survey import survey
from .render import SCHEMA_VERSION, hinted, resolution_json, table, versions
from .shared import DEVICE, FINDING, OK, AddCommand, positive, show


def add(command: AddCommand) -> None:
    check = command("check", run, "whether a DeepSeek V4 model will run here and who serves it, before it is loaded")
    check.add_argument(
        "--model", required=True, metavar="MODEL", help="a config.json, the folder it is in, or flash or pro"
    )
    check.add_argument("--tp", type=positive, default=1, metavar="N", help="tensor parallel size (default: 1)")
    check.add_argument(
        "--max-model-len", type=positive, metavar="L", help="longest context in tokens (default: the model's)"
    )
    check.add_argument(
        "--max-num-seqs", type=positive, default=256, metavar="B", help="sequences of a decode step (default: 256)"
    )
    check.add_argument("--device", **DEVICE)


def run(args: argparse.Namespace) -> int:
    from ..contract import models

    try:
        model = models.from_config(args.model)
    except (OSError, ValueError) as error:
        raise PolicyError(f"--model: {error}") from error
    found = survey(args.device)
    try:
        checks = judge(model, args.tp, args.max_model_len, args.max_num_seqs, found.machine, found.resolutions)
    except ValueError as error:  # the model cannot be served like this, on any machine
        print(f"dsv4-backends: {error}", file=sys.stderr)
        return FINDING
    show(args, lambda: as_json(checks), lambda: text(checks))
    return FINDING if any(c.uncovered for c in checks) else OK


def as_json(checks: Sequence[Check]) -> dict[str, Any]:
    first = checks[0]
    rank, model = first.rank, first.rank.model
    return {
        "schema_version": SCHEMA_VERSION,
        "model": model.name,
        "tp": rank.tp,
        "max_model_len": first.limits.max_context,
        "max_num_seqs": first.limits.max_requests,
        "rank": {"heads": rank.heads, "o_groups": rank.o_groups, "index_heads": model.index_heads},
        "devices": [
            {
                "device": check.device.json(),
                "needs": [
                    {"role": need.role, "sizes": dict(need.sizes), **resolution_json(resolution)}
                    for need, resolution in check.served
                ],
                "uncovered": len(check.uncovered),
                "reference": len(check.slow),
            }
            for check in checks
        ],
        "ok": not any(check.uncovered for check in checks),
    }


def text(checks: Sequence[Check]) -> str:
    first = checks[0]
    rank, model = first.rank, first.rank.model
    groups = f"{rank.o_groups} output group{'s' * (rank.o_groups != 1)}"
    limits = f"contexts up to {first.limits.max_context} tokens, {first.limits.max_requests} sequences"
    shares = f"{rank.heads} heads, {groups} and {model.index_heads} index heads on a rank"
    parts = [f"{model.name}, tensor parallel {rank.tp}: {shares}; {limits}"]
    for check in checks:
        rows = []
        reasons: dict[str, None] = {}
        for need, resolution in check.served:
            selected = resolution.selected
            name, tier = ("none", "") if selected is None else (selected.name, selected.provider.tier.label)
            rows.append((need.op, need.role, need.shown, name, tier))
            for candidate in resolution.passed_over:
                for reason in candidate.reasons:
                    reasons.setdefault(f"{need.op}: {candidate.name}: {hinted(reason, resolution)}")
            if selected is not None and selected.warning is not None:
                reasons.setdefault(f"{need.op}: {selected.name}: {selected.warning}")
            if selected is None and not resolution.candidates:
                reasons.setdefault(f"{need.op}: no installed provider implements it")
        parts.append(f"{check.device.label}; {versions(check.machine)}")
        parts.append(table(("OP", "FOR", "LARGEST SHAPES", "PROVIDER", "TIER"), rows))
        if reasons:
            parts.append("why not a better one:\n" + "\n".join(f"  {line}" for line in reasons))
        total = len(check.served)
        if check.uncovered:
            parts.append(f"NOT SERVED: {len(check.uncovered)} of {total}; the model will not run here")
        if check.slow:
            parts.append(f"warning: only the reference serves {len(check.slow)} of {total}, which is slow")
        if not check.uncovered and not check.slow:
            parts.append("everything is served")
    return "\n\n".join(parts)
