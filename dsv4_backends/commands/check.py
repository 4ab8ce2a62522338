"""``dsv4-backends check``: whether a model will run here and who serves it, before it is loaded."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..errors import PolicyError
from ..runtime.check import STEP_TOKENS, Check
from ..runtime.check import check as judge
from ..runtime.memory import Memory
from ..selection.explanation import hinted
from .render import SCHEMA_VERSION, resolution_json, table, versions
from .shared import DEVICE, FINDING, OK, AddCommand, need_torch, positive, show

WIDTH = 100
"""Columns of the text."""
_UNITS = {"MB": 10**6, "MiB": 2**20, "GB": 10**9, "GiB": 2**30, "TB": 10**12, "TiB": 2**40}


def add(command: AddCommand) -> None:
    check = command("check", run, "whether a DeepSeek V4 model will run here and who serves it, before it is loaded")
    check.add_argument(
        "--model",
        required=True,
        metavar="MODEL",
        help="a config.json, the folder it is in, the id of a model in the hub's cache, or flash or pro",
    )
    check.add_argument("--tp", type=positive, default=1, metavar="N", help="tensor parallel size (default: 1)")
    check.add_argument(
        "--max-model-len", type=positive, metavar="L", help="longest context in tokens (default: the model's)"
    )
    check.add_argument(
        "--max-num-seqs", type=positive, default=256, metavar="B", help="sequences of a decode step (default: 256)"
    )
    check.add_argument(
        "--max-num-batched-tokens",
        type=positive,
        default=STEP_TOKENS,
        metavar="T",
        help=f"tokens of one step, as engines chunk prefill (default: {STEP_TOKENS})",
    )
    check.add_argument(
        "--next-n",
        type=positive,
        default=1,
        metavar="N",
        help="tokens of one sequence in a decode step: more than 1 with speculative decoding (default: 1)",
    )
    check.add_argument("--device", **DEVICE)
    check.add_argument(
        "--memory", type=_size, metavar="SIZE", help="a GPU's memory, such as 24GiB (default: the device's, if known)"
    )


def _size(text: str) -> int:
    """Bytes of a size with a unit, for argparse."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([MGT]i?B)", text.strip())
    if match is None or (size := int(float(match[1]) * _UNITS[match[2]])) < 1:
        raise argparse.ArgumentTypeError(f"expected a size with a unit ({', '.join(_UNITS)}), got {text!r}")
    return size


def run(args: argparse.Namespace) -> int:
    need_torch()
    try:
        checks = judge(
            args.model,
            tp=args.tp,
            max_model_len=args.max_model_len,
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
            next_n=args.next_n,
            memory=args.memory,
            device=args.device,
        )
    except PolicyError:
        raise
    except (OSError, ValueError) as error:
        raise PolicyError(f"check: {error}") from error
    show(args, lambda: as_json(checks), lambda: text(checks))
    return OK if all(check.ok for check in checks) else FINDING


def as_json(checks: Sequence[Check]) -> dict[str, Any]:
    first = checks[0]
    rank, model = first.rank, first.rank.model
    return {
        "schema_version": SCHEMA_VERSION,
        "model": model.name,
        "tp": rank.tp,
        "max_model_len": first.limits.max_context,
        "max_num_seqs": first.limits.max_requests,
        "max_tokens": first.limits.max_tokens,
        "next_n": first.limits.next_n,
        "rank": {
            "heads": rank.heads,
            "o_groups": rank.o_groups,
            "index_heads": model.index_heads,
            "replicas": rank.replicas,
        },
        "unsupported": list(first.unsupported),
        "notes": list(first.notes),
        "devices": [
            {
                "device": check.device.json(),
                "needs": [
                    {"role": need.role, "sizes": dict(need.sizes), **resolution_json(resolution)}
                    for need, resolution in check.served
                ],
                "refused": [{"op": need.op, "role": need.role, "message": message} for need, message in check.broken],
                "uncovered": len(check.uncovered),
                "reference": len(check.slow),
                "memory": None
                if check.memory is None
                else {**asdict(check.memory), "needed": check.memory.needed, "fits": check.memory.fits},
                "ok": check.ok,
            }
            for check in checks
        ],
        "ok": all(check.ok for check in checks),
    }


def text(checks: Sequence[Check]) -> str:
    first = checks[0]
    rank, model = first.rank, first.rank.model
    groups = f"{rank.o_groups} output group{'s' * (rank.o_groups != 1)}"
    limits = f"contexts up to {first.limits.max_context} tokens, {first.limits.max_requests} sequences"
    if first.limits.next_n > 1:
        limits += f", {first.limits.next_n} tokens of each in a decode step"
    shares = f"{rank.heads} heads, {groups} and {model.index_heads} index heads on a rank"
    parts = [_fill(f"{model.name}, tensor parallel {rank.tp}: {shares}; {limits}")]
    if first.notes:
        parts.append("\n".join(_fill(f"note: {note}") for note in first.notes))
    for check in checks:
        parts.append(_fill(f"{check.device.label}; {versions(check.machine)}"))
        parts.append(_needs(check))
        if reasons := _reasons(check):
            parts.append("\n".join(("why not a better one:", *(_fill(line, 2) for line in reasons))))
        if check.memory is not None:
            parts.append(_memory(check, check.memory))
        parts.append("\n".join(map(_fill, _verdict(check))))
    return "\n\n".join(parts)


def _fill(line: str, indent: int = 0) -> str:
    """A line that fits ``WIDTH``; what it continues in is indented further."""
    first, rest = " " * indent, " " * (indent + 2)
    return textwrap.fill(
        line, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False, break_long_words=False
    )


def _needs(check: Check) -> str:
    rows = []
    for need, resolution in check.served:
        selected = resolution.selected
        name, tier = ("none", "") if selected is None else (selected.name, selected.provider.tier.label)
        rows.append((need.op, need.role, need.shown, name, tier))
    header = ("OP", "FOR", "LARGEST SHAPES", "PROVIDER", "TIER")
    others = sum(max(len(row[i]) for row in (header, *rows)) + 2 for i in (0, 1, 3, 4)) - 2
    width = max(WIDTH - others - 2, 16)
    sizes = [
        textwrap.fill(row[2].replace(" ", "\0").replace(",\0", ", "), width, break_on_hyphens=False).replace("\0", " ")
        for row in rows
    ]
    return table(header, [(*row[:2], shown, *row[3:]) for row, shown in zip(rows, sizes, strict=True)])


def _reasons(check: Check) -> list[str]:
    """Why candidates do not serve, and what the chosen ones warn of; each once."""
    reasons: dict[str, None] = {}
    broken = [need for need, _ in check.broken]
    for need, resolution in check.served:
        selected = resolution.selected
        for candidate in resolution.passed_over:
            for reason in candidate.reasons:
                reasons.setdefault(f"{need.op}: {candidate.name}: {hinted(reason, selected)}")
        if selected is not None and selected.warning is not None:
            reasons.setdefault(f"{need.op}: {selected.name}: {selected.warning}")
        if selected is None and not resolution.candidates and need not in broken:
            reasons.setdefault(f"{need.op}: no installed provider implements it")
    return list(reasons)


def _bytes(size: float) -> str:
    if size < 10240:
        return f"{size:.0f} bytes"
    power = min((int(size).bit_length() - 1) // 10, 4)
    return f"{size / 1024**power:.1f} {('', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _memory(check: Check, memory: Memory) -> str:
    limits = check.limits
    weights = "not in the configuration" if memory.weights is None else _bytes(memory.weights)
    workspace = "" if memory.workspace else ", and what its provider allocates for itself"
    at_least = "at least " * (memory.weights is None or not memory.workspace)
    rows = [
        ("weights", weights),
        (f"largest call: {memory.call_of}", f"{_bytes(memory.call)}{workspace}"),
        (
            f"cache of one sequence of {limits.max_context} tokens",
            f"{_bytes(memory.sequence)}, {_bytes(memory.token)} a token",
        ),
        ("together", f"{at_least}{_bytes(memory.needed)}"),
        (f"cache of {limits.max_requests} such sequences", _bytes(memory.sequences)),
        ("the device has", _bytes(memory.device) if memory.device else "unknown; --memory SIZE compares"),
    ]
    lines = ["memory of a rank, without activations between the ops, graphs and communication:"]
    width = max(len(name) for name, _ in rows)
    lines += [_fill(f"{name:{width}}  {size}", 2) for name, size in rows]
    return "\n".join(lines)


def _verdict(check: Check) -> list[str]:
    total = len(check.served)
    reasons = dict.fromkeys((*check.unsupported, *(message for _, message in check.broken)))
    lines = [f"NOT SERVED: {reason}" for reason in reasons]
    if check.uncovered:
        lines.append(f"NOT SERVED: {len(check.uncovered)} of {total}; the model will not run here")
    memory = check.memory
    if check.slow:
        lines.append(f"warning: only the reference serves {len(check.slow)} of {total}, which is slow")
    if not check.uncovered and not check.slow and not check.unsupported:
        lines.append("everything is served")
    if memory is None:
        return lines
    if memory.fits is None:
        lines.append("whether it fits into the device's memory is not known")
    elif memory.fits:
        left = memory.device - memory.needed
        room = f"; in all a cache of {(left + memory.sequence) / memory.token:.0f} tokens" if memory.token else ""
        lines.append(f"it fits: {_bytes(left)} are left{room}")
    else:
        lines.append(
            f"DOES NOT FIT: {_bytes(memory.needed)} are needed for one sequence of the longest context, the device has "
            f"{_bytes(memory.device)}; more ranks (--tp), a shorter context (--max-model-len) or fewer tokens of a "
            "step (--max-num-batched-tokens) may fit"
        )
    return lines
