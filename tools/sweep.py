"""Find the fastest configuration of the Triton provider's kernels on this GPU: what its tables are made from.

On each row all candidates, what the tables name now and the native library take turns. Then results are compared with
the definition, fastest first, until one is right; wrong ones are told. Usage:

    python tools/sweep.py OP [OP ...] [--jobs N] [--json FILE] [--write]

OP: compress_norm_rope_insert, indexer_compress_insert, fp8_einsum, hc_prenorm_gemm, sparse_mla_decode or
sparse_mla_prefill. With --write, the provider's tables get what was fastest over each class of sizes (fp8_einsum and
sparse_mla_prefill; the rows of the others stand for roles in a plan, and are written by hand from what is printed).
With --jobs, as many processes first make every call once, so that Triton compiles side by side. Needs a Hopper GPU: the
candidates are those of its table. With DSV4_BACKENDS_DEVICE=sm_80 (or another), the attention ops' are those of that
architecture, run on this one.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from dsv4_backend_triton import configurations, variants
from dsv4_backend_triton.arch import arch_of
from dsv4_backend_triton.compressor import portable as compressor
from dsv4_backend_triton.hyper_connection.hc_prenorm_gemm import portable as hc_portable
from dsv4_backend_triton.hyper_connection.hc_prenorm_gemm import wgmma as hc_wgmma
from dsv4_backend_triton.lib.sizes import cdiv
from dsv4_backend_triton.projection.fp8_einsum import portable as einsum_portable
from dsv4_backend_triton.projection.fp8_einsum import wgmma as einsum_wgmma
from dsv4_backend_triton.projection.fp8_einsum import wgmma_few as einsum_few
from dsv4_backend_triton.sparse_mla.decode.plan import Plan, Tile
from dsv4_backend_triton.sparse_mla.prefill.plan import Tile as PrefillTile

from dsv4_backends import records
from dsv4_backends.bench import inputs, run, timing
from dsv4_backends.bench.provenance import provenance
from dsv4_backends.bench.shapes import Row
from dsv4_backends.contract import CONTRACTS
from dsv4_backends.contract.models import FLASH
from dsv4_backends.errors import NoProviderError
from dsv4_backends.testing import checks

NATIVE = {
    "fp8_einsum": "deep_gemm",
    "hc_prenorm_gemm": "deep_gemm",
    "sparse_mla_decode": "flash_mla",
    "sparse_mla_prefill": "flash_mla",
}
SIMULATED = os.environ.get("DSV4_BACKENDS_DEVICE", "").strip()
HOPPER = SIMULATED in ("", "sm_90")
PRESENT = "as the tables say"
MOST_SHARED = 227 * 1024
SAMPLES, SHOWN = 25, 6
SIZES = {"fp8_einsum": "b", "sparse_mla_prefill": "h_q"}
"""The ops whose tables have classes of sizes, and the argument that is the size."""
Candidate = Callable[[dict[str, Any]], Any]
"""Makes the op's call with one configuration, from the call's arguments."""


def _call(op: str, variant: str, config: Any, made: dict[str, Any]) -> Any:
    module, name = f"dsv4_backend_triton.{variants.OPS[op].folder}.op", op
    with variants.forced(op, variant, config):
        return getattr(importlib.import_module(module), name)(**made)


def _candidates(op: str, configs: Iterable[tuple[str, Any]]) -> dict[str, Candidate]:
    return {f"{variant} {config}": functools.partial(_call, op, variant, config) for variant, config in configs}


def _hyper_connection() -> Iterator[tuple[Row, dict[str, Candidate]]]:
    wide = [
        ("portable", hc_portable.Config(m, k, 32, False, mode, m // 16, stages, 1, True))
        for m, k, stages, mode in itertools.product((64, 128), (64, 128), (3, 4, 6), ("bf16", "tf32"))
        if stages * k * (2 * m + 128) + 128 * k <= MOST_SHARED
    ]
    narrow = [
        ("portable", hc_portable.Config(m, k, n, True, "tf32", warps, stages, 1, True))
        for m, n, k, warps, stages in itertools.product((16, 32), (16, 32), (64, 128), (2, 4), (3, 4))
    ]
    tiles = [(64, 64, 8, 4), (64, 128, 4, 2), (64, 128, 4, 3), (64, 128, 5, 2)]
    tiles += [(128, 64, 4, 2), (128, 64, 6, 4), (128, 64, 8, 2), (128, 128, 3, 2)]
    special = [("wgmma", hc_wgmma.Config(*tile)) for tile in tiles]
    shapes = ((32, 32), (64, 32), (128, 32), (256, 32), (512, 16), (1024, 8), (2048, 4), (8192, 1))
    for k, (m, results) in itertools.product((16384, 28672), shapes):
        configs = []
        for variant, config in [*(narrow if m <= 256 else []), *wide, *(special if m > 64 else [])]:
            for group in (1, 2, 4):
                blocks = cdiv(m, config.block_m) * results * group
                if group == 1 or blocks <= 4 * 132:
                    configs.append((variant, config._replace(splits=results * group)))
        params = {"m": m, "k": k, "n": 24, "num_splits": results}
        row = Row("hc_prenorm_gemm", f"m={m} k={k} splits={results}", params)
        yield row, _candidates("hc_prenorm_gemm", configs)


def _einsum() -> Iterator[tuple[Row, dict[str, Candidate]]]:
    for h, b in itertools.product((8, 16), (1, 8, 16, 32, 64, 128, 512, 4096)):
        configs: list[tuple[str, Any]] = []
        if b <= 32:
            tokens = 16 if b <= 16 else 32
            for d, warps, stages, unroll in itertools.product((32, 64), (2, 4, 8), (3, 4, 6, 8), (1, 2)):
                if d >= 4 * warps:
                    config = einsum_portable.Config(tokens, d, True, warps, stages, stages, unroll, False)
                    configs.append(("portable", config))
        else:
            for tokens, d, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (4, 6, 8)):
                if stages * (tokens + d) * 128 <= MOST_SHARED:
                    config = einsum_portable.Config(tokens, d, False, warps, stages, stages, 1, True)
                    configs.append(("portable", config))
            configs += [("wgmma", einsum_wgmma.Config(*sizes)) for sizes in ((64, 8, 152), (128, 6, 216))]
        few = [(tokens, stages) for tokens in (16, 32, 64) for stages in (4, 6, 8, 10) if b <= tokens <= max(4 * b, 16)]
        configs += [("wgmma_few", einsum_few.Config(tokens, stages, stages)) for tokens, stages in few]
        row = Row("fp8_einsum", f"b={b} h={h} token-minor scales", {"b": b, "h": h, "r": 4096, "d": 1024})
        yield row, _candidates("fp8_einsum", configs)


def _decode() -> Iterator[tuple[Row, dict[str, Candidate]]]:
    wide, small, medium = Tile(64, 64, 8), Tile(16, 32, 4), Tile(16, 64, 8)
    models = ((64, 512), (128, 1024), (16, 512), (16, 1024))  # Flash and Pro; of Flash a rank of 4, of Pro one of 8
    for (heads, selected), b in itertools.product(models, (1, 2, 4, 8, 16, 32, 64, 128)):
        tiles = cdiv(128, 64) + cdiv(selected, 64)
        plans: list[tuple[str, Any]] = []
        for high, splits in itertools.product((16, 19, 22, 32, 43, 64), range(1, tiles + 1)):
            programs = b * cdiv(heads, high) * splits
            fits = splits == 1 or programs <= 132 or (high == 64 and programs <= 264)
            if HOPPER and fits and (high <= heads or high == 64):
                plans.append(("wgmma", Plan(wide, splits, single=splits == tiles, block_heads=high)))
        for tile in (Tile(*sizes) for sizes in ((16, 32, 4), (16, 64, 4), (32, 32, 4), (64, 64, 8))):
            most = cdiv(128, tile.keys) + cdiv(selected, tile.keys)
            for splits in range(1, most + 1):
                programs = b * cdiv(heads, tile.heads) * splits
                even = splits == cdiv(most, cdiv(most, splits))  # fewer splits would not do with as few tiles each
                fits = splits == 1 or (programs <= 396 if tile.heads == 16 else programs <= 264)
                if even and fits and tile.heads < 2 * max(heads, 16):
                    plans.append(("mma_sync", Plan(tile, splits)))
        if b <= 8:
            plans.append(("portable", Plan(small, 2 * tiles, single=True)))
            plans.append(("portable", Plan(medium, tiles, single=True)))
        params = {"b": b, "s_q": 1, "h_q": heads, "window": 128, "selected": selected, "compressed": 16384}
        row = Row("sparse_mla_decode", f"b={b} h={heads} topk=128+{selected}", params)
        yield row, _candidates("sparse_mla_decode", plans)


def _prefill() -> Iterator[tuple[Row, dict[str, Candidate]]]:
    plain = [("portable", PrefillTile(*s)) for s in ((16, 32, 4, 2), (16, 64, 4, 2), (32, 16, 4, 3), (32, 32, 4, 2))]
    placed = [("mma_sync", PrefillTile(*sizes)) for sizes in ((16, 64, 4), (32, 32, 4), (64, 64, 8))]
    for (heads, selected), s_q in itertools.product(((64, 512), (128, 1024), (16, 512), (16, 1024)), (512, 4096)):
        tiles = [(variant, tile) for variant, tile in (*plain, *placed) if tile.heads < 2 * max(heads, 16)]
        params = {"s_q": s_q, "h_q": heads, "window": 128, "selected": selected, "compressed": 16384}
        row = Row("sparse_mla_prefill", f"s_q={s_q} h={heads} topk={128 + selected}", params)
        yield row, _candidates("sparse_mla_prefill", tiles)


def _compressors(op: str) -> Iterator[tuple[Row, dict[str, Candidate]]]:
    for row in CONTRACTS[op].traffic.rows("", FLASH.rank(1)):
        ratio, t = row.params["ratio"], row.params["t"]
        # How many blocks of a multiprocessor are aimed at, where that makes a difference.
        blocks = {max(1, min(ratio, t // (132 * n))): n for n in (16, 8, 4, 2, 1)}.values()
        tiles = [(warps, 1) for warps in ((2, 4, 8) if row.params["dim"] == 512 else (1, 2, 4))]
        if ratio == 128:
            tiles = [(4, 8), (8, 8), (16, 8), (8, 4), (16, 4), (4, 16), (8, 16)]
        configs = [("portable", compressor.Config(*tile, n)) for tile, n in itertools.product(tiles, blocks)]
        yield row, _candidates(op, configs)


CANDIDATES = {
    "compress_norm_rope_insert": functools.partial(_compressors, "compress_norm_rope_insert"),
    "indexer_compress_insert": functools.partial(_compressors, "indexer_compress_insert"),
    "fp8_einsum": _einsum,
    "hc_prenorm_gemm": _hyper_connection,
    "sparse_mla_decode": _decode,
    "sparse_mla_prefill": _prefill,
}


def call_once(part: int, parts: int, ops: list[str]) -> None:
    """Make every ``parts``-th candidate's call once; what cannot be called is told when it is measured."""
    device = torch.device("cuda")
    for op in ops:
        seen: set[str] = set()
        for row, candidates in CANDIDATES[op]():
            new = [name for name in candidates if name not in seen]
            seen.update(new)
            if mine := new[part::parts]:
                made = inputs.draw(row, device)
                for name in mine:
                    with contextlib.suppress(Exception):
                        candidates[name](made)
                torch.cuda.synchronize()


def measure(row: Row, candidates: dict[str, Candidate], timer: timing.Timer) -> dict[str, Any]:
    made = inputs.draw(row, timer.device)
    named = {PRESENT: checks.subject("triton", row.op, timer.device).function}
    with contextlib.suppress(NoProviderError, KeyError):
        named[NATIVE[row.op]] = checks.subject(NATIVE[row.op], row.op, timer.device).function

    def tupled(results: Any) -> tuple[Any, ...]:
        return results if isinstance(results, tuple) else (results,)

    calls: dict[str, timing.Captured] = {}
    errors: dict[str, str] = {}
    for name, function in named.items():
        calls[name] = timing.Captured(lambda f=function: tupled(f(**made)), timer.device)
    for name, candidate in candidates.items():
        try:
            candidate(made)  # not a capture's business: what does not fit, or does not compile
            calls[name] = timing.Captured(lambda c=candidate: tupled(c(made)), timer.device)
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    times = {name: taken.us for name, taken in timer.interleaved(calls).items()}
    judge = run.Judge(row.op, made)
    best = None
    for name in sorted(set(times) - set(named), key=times.__getitem__):
        if wrong := judge(calls[name]):
            errors[name] = wrong
        else:
            best = name
            break
    return {"op": row.op, "row": row.name, "best": best, "us": times, "errors": errors}


def _fastest(times: list[dict[str, float]], names: Iterable[str]) -> str:
    """Of what was timed in every row, what takes the least, by the geometric mean."""
    common = [name for name in names if all(name in us for us in times)]
    return min(common, key=lambda name: sum(math.log(us[name]) for us in times))


def retuned(op: str, arch: Any, measured: list[tuple[dict[str, Any], dict[str, float], dict[str, Any]]]) -> list[Any]:
    """The table's rows for this GPU with new configurations, each with the row that it replaces.

    Args:
        measured: Of each row its sizes, the microseconds of the right candidates, and their (variant, configuration).
    """
    classes: dict[str, tuple[Any, list[Any]]] = {}
    for params, us, made in measured:
        for variant in {variant for variant, _ in made.values()}:
            size = params[SIZES[op]]
            with contextlib.suppress(LookupError):
                old = configurations.row(op, variant, arch, size=size)
                classes.setdefault(f"{variant} {old}", (old, []))[1].append((params, us, made))
    found = []
    for old, rows in classes.values():
        configs = {name: c for *_, made in rows for name, (v, c) in made.items() if v == old["variant"]}
        if "stages_alone" not in old["config"]:
            config = configs[_fastest([us for _, us, _ in rows], configs)]._asdict()
        else:
            alone = [cdiv(p["d"], 64) * p["h"] <= arch.sms for p, *_ in rows]
            shared = [us for (_, us, _), one in zip(rows, alone, strict=True) if not one]
            single = [us for (_, us, _), one in zip(rows, alone, strict=True) if one]
            best = configs[_fastest(shared or single, configs)]
            same = {"stages": best.stages, "stages_alone": best.stages_alone}
            alike = {name: c for name, c in configs.items() if c._replace(**same) == best}
            config = best._asdict() | {"stages_alone": configs[_fastest(single or shared, alike)].stages}
        found.append((old, {name: config[name] for name in old["config"]}))
    return found


def write_table(op: str, found: list[Any], source: dict[str, str]) -> None:
    table = configurations.table(op)
    key = f"{source['gpu']} {source['date']}"
    table["sources"][key] = source
    for old, config in found:
        place = table["rows"].index(old)
        table["rows"][place] = old | {"source": key, "config": config}
    used = {row["source"] for row in table["rows"]}
    sources = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in table["sources"].items() if k in used)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in table["rows"])
    path = configurations.TABLES / f"{op}.json"
    path.write_text(f'{{\n "sources": {{\n{sources}\n }},\n "rows": [\n{rows}\n ]\n}}\n', encoding="utf-8")


def told(result: dict[str, Any]) -> str:
    us, errors = result["us"], result["errors"]
    reference = us.get(NATIVE[result["op"]], us[PRESENT])
    lines = [f"{result['op']} {result['row']}"]
    for name in sorted(us, key=us.__getitem__):
        if name in (PRESENT, NATIVE[result["op"]]) or len(lines) <= SHOWN:
            mark = "best " if name == result["best"] else "WRONG" if name in errors else "     "
            lines.append(f"  {us[name]:8.1f} us  {reference / us[name]:.2f}  {mark}  {name}")
    failed = [name for name in errors if name not in us]
    return "\n".join([*lines, *([f"  {len(failed)} failed: {errors[failed[0]]}"] if failed else [])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=CANDIDATES, nargs="+")
    parser.add_argument("--jobs", type=int, default=0)
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true", help="put what was fastest into the provider's tables")
    arguments = parser.parse_args()
    if arguments.part is not None:
        call_once(arguments.part, arguments.jobs, arguments.op)
        return
    if arguments.jobs:
        command = [sys.executable, *sys.argv, "--part"]
        for child in [subprocess.Popen([*command, str(part)]) for part in range(arguments.jobs)]:
            child.wait()
    timer = timing.Timer(torch.device("cuda"), SAMPLES)
    rows = []
    for op in arguments.op:
        measured: list[Any] = []
        for row, candidates in CANDIDATES[op]():
            rows.append(measure(row, candidates, timer))
            right = {n: us for n, us in rows[-1]["us"].items() if n in candidates and n not in rows[-1]["errors"]}
            measured.append((row.params, right, {name: candidates[name].args[1:3] for name in right}))  # type: ignore[attr-defined]
            print(told(rows[-1]), flush=True)
            torch.cuda.empty_cache()
            if arguments.json:
                under = f"DSV4_BACKENDS_DEVICE={SIMULATED} " if SIMULATED else ""
                result = {**provenance(f"{under}python tools/sweep.py {' '.join(arguments.op)}"), "rows": rows}
                records.write(result, arguments.json)
        if arguments.write and op in SIZES:
            told_of, name = provenance(f"python tools/sweep.py {op} --write"), torch.cuda.get_device_name()
            source = {"gpu": name, "capability": str(arch_of(timer.device).capability), "triton": triton.__version__}
            source |= {"torch": torch.__version__, "date": told_of["date"], "command": told_of["command"]}
            write_table(op, retuned(op, arch_of(timer.device), measured), source)


if __name__ == "__main__":
    main()
