"""``dsv4-backends warmup``: compile before serving what serving a model will need."""

from __future__ import annotations

import argparse

from ..contract import OPS
from ..errors import PolicyError
from .render import SCHEMA_VERSION, table
from .shared import OK, AddCommand, need_torch, show, tell, torch_device, whole


def add(command: AddCommand) -> None:
    from ..runtime.serving import Limits

    warmup = command("warmup", run, "compile before serving what serving a model will need, into the cache on disk")
    warmup.add_argument(
        "--model", required=True, metavar="MODEL", help="flash, pro, a config.json or the folder that it is in"
    )
    warmup.add_argument("--op", action="append", choices=OPS, metavar="OP", help="only this op; may be repeated")
    warmup.add_argument("--tp", type=whole, default=1, metavar="N", help="tensor parallel size (default: 1)")
    limits = {
        "max_tokens": "query tokens of one step",
        "max_requests": "requests of one decode step",
        "max_context": "tokens of the longest context",
        "next_n": "tokens of one request in a decode step: more than 1 with speculative decoding",
        "heads": "heads of an attention call, where the engine pads them; 0: the rank's own",
    }
    for name, about in limits.items():
        default = getattr(Limits, name)
        flag = f"--{name.replace('_', '-')}"
        warmup.add_argument(flag, type=whole, default=default, metavar="N", help=f"{about} (default: {default})")
    warmup.add_argument(
        "--torch-device", metavar="DEVICE", help="a torch device (default: the current GPU, else the CPU)"
    )


def run(args: argparse.Namespace) -> int:
    from ..contract import config
    from ..runtime.serving import Limits

    try:
        model = config.from_config(args.model)
        model.rank(args.tp)
        limits = Limits(args.max_tokens, args.max_requests, args.max_context, args.next_n, args.heads)
    except (OSError, ValueError) as error:
        raise PolicyError(f"warmup: {error}") from error

    need_torch()
    from ..runtime import ahead

    ready = ahead.warmup(
        model,
        tp=args.tp,
        limits=limits,
        device=torch_device(args.torch_device),
        ops=args.op or OPS,
        progress=lambda line: tell(f"{line}\n"),
    )
    rows = [(op, provider, str(count)) for op, made in ready.items() for provider, count in made.items()]
    show(
        args,
        lambda: {"schema_version": SCHEMA_VERSION, "model": args.model, "tp": args.tp, "kernels": ready},
        lambda: table(("OP", "PROVIDER", "KERNELS READY"), rows),
    )
    return OK
