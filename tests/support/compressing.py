"""Tests of what only the compressors' contract defines, for every provider that a test can run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from attention_path import apart, sylvester
from torch import Tensor

from dsv4_backends.contract import CONTRACTS, inputs, layouts
from dsv4_backends.testing import checks, numerics, oracle

MAIN, INDEXER = "compress_norm_rope_insert", "indexer_compress_insert"
DIM = {MAIN: 512, INDEXER: 128}
WRITE = {MAIN: layouts.write_kv, INDEXER: layouts.write_indexer_keys}


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _own(x: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """x on a device in memory of its own, gaps between pages included."""
    made = torch.empty(0, dtype=x.dtype, device=device)
    return made.set_(x.untyped_storage().clone().to(device=device), x.storage_offset(), x.shape, x.stride())


def _bytes(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())


def _run(provider: str, op: str, device: torch.device, **made: Any) -> Tensor:
    """The cache after a call with copies of the arguments, on the CPU."""
    moved = {name: _own(v, device) if isinstance(v, Tensor) else v for name, v in made.items()}
    (cache,) = checks.subject(provider, op, device).run(moved)
    return _own(cache)


def _cache(op: str, pages: int, page_size: int, gap: int) -> Tensor:
    """Random bytes, ``gap`` more of them between pages."""
    entry = CONTRACTS[op].args["k_cache"].forms[0].dims[-1]  # type: ignore[union-attr]
    stride = page_size * int(entry) + gap
    raw = torch.randint(0, 256, (pages * stride,), generator=_generator()).to(torch.uint8)
    return raw.as_strided((pages, page_size, int(entry)), (stride, int(entry), 1))


def _state(kv: Tensor, scores: Tensor, pages: Tensor, page_size: int) -> Tensor:
    """The state of tokens ``[n, channels]`` in these pages; all else is NaN."""
    made = torch.full((int(pages.max()) + 2, page_size, 2 * kv.shape[1]), float("nan"))
    at = torch.arange(len(kv))
    made[pages[at // page_size], at % page_size] = torch.cat([kv, scores], 1)
    return made


def check_exact_bytes(provider: str, device: torch.device) -> None:
    """Every byte of the cache's memory where fp32 rounds nothing: one row of a window has all the weight, or all rows
    are the same; magnitudes of 8, eps 0, no rotation. Pages at odd addresses too."""
    for op in (MAIN, INDEXER):
        dim = DIM[op]
        for ratio, overlap, gap in (
            (4, True, 11),
            (4, True, 24),
            (4, False, 0),
            (3, True, 1),
            (16, False, 11),
            (64, True, 24),
        ):
            for same in (True, False):
                g, n = _generator(ratio), 4 * ratio
                kv = 8.0 - 16 * torch.randint(0, 2, (n, dim), generator=g)
                scores, rows = torch.zeros(n, dim), ratio * torch.arange(4).unsqueeze(1)
                if same:
                    kv = kv[:1].expand(n, dim)
                else:
                    rows = rows + torch.randint(0, ratio, (4, dim), generator=g)
                    scores = torch.full((n, dim), -1e4).scatter(0, rows, 0.0)
                c = kv.gather(0, rows.expand(4, dim))
                if overlap:  # the first channels are for the window after
                    kv = torch.cat([kv, kv], 1)
                    scores = torch.cat([scores if same else torch.full_like(scores, -torch.inf), scores], 1)
                pages = torch.randperm(-(-n // 8), generator=g)
                cache, slots = _cache(op, 3, 5, gap), torch.tensor([7, -1, 14, 0])
                weight = inputs.normal(g, dim).bfloat16()
                found = _run(
                    provider,
                    op,
                    device,
                    positions=ratio * torch.arange(1, 5) - 1,
                    requests=torch.zeros(4, dtype=torch.int32),
                    slots=slots,
                    state=_state(kv, scores, pages, 8),
                    block_table=pages.int().unsqueeze(0),
                    norm_weight=weight,
                    eps=0.0,
                    cos_sin=inputs.cos_sin(1),
                    ratio=ratio,
                    k_cache=cache,
                )
                want = _own(cache)
                WRITE[op](want, slots, (c / 8 * weight.float()).bfloat16())
                assert torch.equal(_bytes(found), _bytes(want)), (op, ratio, overlap, gap, same)


def official_entries(kv: Tensor, scores: Tensor, weight: Tensor, eps: float, cos_sin: Tensor, ratio: int) -> Tensor:
    """Every whole window of a prompt as DeepSeek's compressor has it, in fp64 and without rounding: the tokens of the
    window before by the first half of the channels, if there are twice as many, and its own by the last."""
    dim = len(weight)
    entries = []
    for window in range(len(kv) // ratio):
        now = slice(window * ratio, window * ratio + ratio)
        rows, share = kv[now, -dim:].double(), scores[now, -dim:].double()
        if kv.shape[1] == 2 * dim:
            before = slice(now.start - ratio, now.start)
            old_rows, old_share = torch.zeros(ratio, dim).double(), torch.full((ratio, dim), -torch.inf).double()
            if window:
                old_rows, old_share = kv[before, :dim].double(), scores[before, :dim].double()
            rows, share = torch.cat([old_rows, rows]), torch.cat([old_share, share])
        c = (share.softmax(0) * rows).sum(0)
        entry = weight.double() * (c * torch.rsqrt(c.square().mean() + eps))
        for pair in range(32):
            cos, sin = cos_sin[window * ratio, pair].double(), cos_sin[window * ratio, 32 + pair].double()
            i = dim - 64 + 2 * pair
            a, b = float(entry[i]), float(entry[i + 1])
            entry[i], entry[i + 1] = a * cos - b * sin, a * sin + b * cos
        entries.append(entry)
    return torch.stack(entries)


def check_prompt_token_by_token(provider: str, device: torch.device) -> None:
    """A prompt's tokens one after the other, each when the state has no later one, against the official formula; the
    whole prompt at once gives the same bytes. What is packed is unpacked to the formula within half a code."""
    for op, ratio, n, page_size, hadamard in (
        (MAIN, 4, 18, 4, False),
        (MAIN, 128, 257, 8, False),
        (INDEXER, 4, 18, 4, False),
        (INDEXER, 4, 18, 4, True),
    ):
        dim, g = DIM[op], _generator(n)
        channels = dim * (1 + (ratio == 4))
        kv, scores = inputs.normal(g, n, channels), inputs.normal(g, n, channels, scale=2.0)
        weight, table = 1 + inputs.normal(g, dim, scale=0.2), inputs.cos_sin(n)
        pages = torch.randperm(-(-n // page_size), generator=g)
        cache, slots, positions = _cache(op, 3, 2, 0), torch.randperm(6, generator=g), torch.arange(n)
        ends = torch.where(positions % ratio == ratio - 1, slots[positions // ratio], -1)
        step = functools.partial(
            _run,
            provider,
            op,
            device,
            block_table=pages.int().unsqueeze(0),
            norm_weight=weight,
            eps=1e-6,
            cos_sin=table,
            ratio=ratio,
            **({"hadamard": hadamard} if op == INDEXER else {}),
        )
        none = torch.zeros(n, dtype=torch.int32)
        state = _state(kv, scores, pages, page_size)
        whole = step(positions=positions, requests=none, slots=ends, state=state, k_cache=cache)
        stepwise = cache
        for token in range(n) if ratio == 4 else (0, 63, 126, 127, 128, 254, 255, 256):
            before = stepwise
            one, state = slice(token, token + 1), _state(kv[: token + 1], scores[: token + 1], pages, page_size)
            stepwise = step(
                positions=positions[one], requests=none[one], slots=ends[one], state=state, k_cache=stepwise
            )
            if (token + 1) % ratio:
                assert torch.equal(_bytes(stepwise), _bytes(before)), (op, token)
        assert torch.equal(_bytes(stepwise), _bytes(whole)), op
        written = slots[: n // ratio]
        want = official_entries(kv, scores, weight, 1e-6, table, ratio)
        if op == MAIN:
            found, most = layouts.read_kv(whole, written).double(), 448
        else:
            codes, scale = layouts.read_indexer_keys(whole, written)
            found, most = codes.double() * scale.double().unsqueeze(1), 128
            want = want @ sylvester() if hadamard else want
        # Half a unit of e4m3's last place, or of its least code, and the roundings to bf16 (two of the transformed).
        error, largest = (found - want).abs(), want[:, :most].abs().amax(1, keepdim=True)
        assert (error[:, :most] <= want[:, :most].abs() * 2**-4 + largest * 2**-7).all(), op
        assert (error[:, most:] <= want[:, most:].abs() * 2**-8 + 1e-5).all(), op


def check_several_windows_of_a_block(provider: str, device: torch.device) -> None:
    """So many tokens that a block looks at several, of requests whose tokens are interleaved."""
    for op, sizes in (
        (INDEXER, {"t": 1750, "r": 7, "context": 500}),
        (MAIN, {"t": 330, "r": 7, "ratio": 9, "overlap": False, "context": 400}),
    ):
        contract = CONTRACTS[op]
        made = contract.make(torch.device("cpu"), _generator(), **sizes)  # type: ignore[arg-type]
        found = _run(provider, op, device, **made)
        (want,) = oracle.expected(op, made)
        (have,) = oracle.finished(op, made, (found,))
        error = numerics.compare(have, want, contract.tolerances["k_cache"])
        assert error.ok, (op, error)


def check_far_pages(provider: str, device: torch.device) -> None:
    """Offsets beyond 2^31: pages of the state, and of the cache, that far apart in memory."""
    for op in (MAIN, INDEXER):
        contract = CONTRACTS[op]
        made = contract.make(torch.device("cpu"), _generator(), t=5, r=1, context=5, state_page=4, page_size=8)
        made["slots"] = torch.tensor([-1, -1, -1, 9, -1])
        made["positions"] = torch.arange(5)
        made["state"] = torch.randn(2, 4, made["state"].shape[2], generator=_generator())
        made["block_table"] = torch.tensor([[1, 0]], dtype=torch.int32)
        made["cos_sin"] = inputs.cos_sin(5)
        near = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in made.items()}
        run = checks.subject(provider, op, device).run
        (want,) = run(near | {"k_cache": near["k_cache"].clone()})
        for name in ("state", "k_cache"):
            (found,) = run(near | {"k_cache": near["k_cache"].clone()} | {name: apart(near[name])})
            assert torch.equal(found, want), (op, name)
            assert not torch.equal(found, near["k_cache"]), "nothing was written"
            del found


CHECKS: tuple[Callable[[str, torch.device], None], ...] = (
    check_exact_bytes,
    check_prompt_token_by_token,
    check_several_windows_of_a_block,
    check_far_pages,
)
