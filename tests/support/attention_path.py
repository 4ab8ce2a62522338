"""Tests over several ops around attention, whose results are each other's inputs, for every provider."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsv4_backends.contract import inputs, layouts
from dsv4_backends.testing import checks, numerics, oracle
from dsv4_backends.testing.oracle.codes import F64, e4m3


def _run(provider: str, op: str, device: torch.device, **made: Any) -> Any:
    moved = {name: inputs.move(v, device) if isinstance(v, Tensor) else v for name, v in made.items()}
    results = checks.subject(provider, op, device).run(moved)
    return results if len(results) > 1 else results[0]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _near(found: Tensor, want: Tensor, most: float) -> None:
    assert found.isfinite().all()
    assert 0 < numerics.calc_diff(found, want) < most


def check_einsum_takes_the_output(provider: str, device: torch.device) -> None:
    """As it is, with either form of scales; the product is the unquantised one within the error of FP8."""
    g = _generator()
    t, h, groups, d = 9, 6, 3, 40
    x, at = inputs.normal(g, t, h, 512).bfloat16(), inputs.positions(g, t, 50)
    made = {"x": x, "positions": at, "cos_sin": inputs.cos_sin(50, at), "groups": groups}
    w = inputs.normal(g, groups, d, h // groups * 512).to(torch.float8_e4m3fn)
    (turned,) = oracle.of("inverse_rope")(**made)
    want = torch.einsum("bhr,hdr->bhd", turned, e4m3(w))
    products = []
    for packed in (False, True):
        x_fp8, x_scale = _run(provider, "inverse_rope_quant", device, **made, packed=packed)
        columns = x_scale.shape[-1]
        assert x_scale.stride() == (1, columns * 12, 12)  # nine tokens, padded to a multiple of four
        ones = torch.ones(groups, 1, columns) if not packed else torch.full((groups, 1, columns), 0x7F7F7F7F).int()
        product = _run(provider, "fp8_einsum", device, x=x_fp8, x_scale=x_scale, w=w, w_scale=ones)
        _near(product.to("cpu", F64), want, 1e-3)
        products.append(product)
    assert numerics.same_bits(*products)


def check_logits_take_the_queries(provider: str, device: torch.device) -> None:
    """The logits are those of the rotated queries within the error of FP8; of transformed ones over transformed keys,
    since the transform is orthogonal."""
    g = _generator()
    t, h, n = 7, 16, 33
    q, at = inputs.normal(g, t, h, 128).bfloat16(), inputs.positions(g, t, 50)
    weights = inputs.normal(g, t, h).bfloat16()
    made = {"q": q, "positions": at, "cos_sin": inputs.cos_sin(50, at), "weights": weights, "scale": 0.125}
    keys = inputs.normal(g, n, 128)
    turned = oracle_queries(q, at, made["cos_sin"])
    want = torch.einsum("thn,th->tn", (turned @ keys.double().T).clamp(min=0), weights.double()) * 0.125
    for hadamard in (False, True):
        q_fp8, folded = _run(provider, "indexer_q_rope_quant", device, **made, hadamard=hadamard)
        k, k_scale = layouts.quantize_e4m3((keys.double() @ sylvester()).float() if hadamard else keys, 128)
        bounds = {"row_starts": torch.zeros(t, dtype=torch.int32), "row_ends": torch.full((t,), n, dtype=torch.int32)}
        logits = _run(provider, "mqa_logits", device, q=q_fp8, k=k, k_scale=k_scale[:, 0], weights=folded, **bounds)
        _near(logits.to("cpu", F64), want, 2e-3)


def oracle_queries(q: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
    """fp64 queries, rotated pair by pair."""
    wide = q.double()
    for token, position in enumerate(positions.tolist()):
        for pair in range(32):
            cos, sin = cos_sin[position, pair].double(), cos_sin[position, 32 + pair].double()
            a, b = wide[token, :, 64 + 2 * pair].clone(), wide[token, :, 65 + 2 * pair].clone()
            wide[token, :, 64 + 2 * pair], wide[token, :, 65 + 2 * pair] = a * cos - b * sin, a * sin + b * cos
    return wide


def sylvester() -> Tensor:
    """Element (i, j) of the Walsh-Hadamard matrix is 1 or -1 as i & j has an even or odd number of ones."""
    signs = [[1 - 2 * ((i & j).bit_count() % 2) for j in range(128)] for i in range(128)]
    return torch.tensor(signs, dtype=F64) * 128**-0.5


def check_hadamard_is_the_matrix(provider: str, device: torch.device) -> None:
    """Every row of it, exactly, by unit vectors; and products with it, in which every element counts."""
    table = inputs.cos_sin(1)  # position 0: no rotation
    made = {"positions": torch.zeros(1, dtype=torch.long), "cos_sin": table, "scale": 1.0, "hadamard": True}
    units = torch.eye(128).bfloat16().unsqueeze(0)
    q_fp8, scale = _run(provider, "indexer_q_rope_quant", device, q=units, weights=torch.ones(1, 128), **made)
    value = e4m3(q_fp8.cpu())[0] * scale.cpu().double().T
    assert torch.equal(value.sign(), sylvester().sign())
    assert len(value.abs().unique()) == 1
    q = inputs.normal(_generator(), 1, 20, 128).bfloat16()
    q_fp8, scale = _run(provider, "indexer_q_rope_quant", device, q=q, weights=torch.ones(1, 20), **made)
    want = q.double()[0] @ sylvester()
    error = (e4m3(q_fp8.cpu())[0] * scale.cpu().double().T - want).abs()
    # Half a unit of e4m3's last place (2^-4), or half the least code, and the roundings to bf16.
    assert (error <= want.abs() * (2**-4 + 2**-8) + scale.cpu().double().T * 2**-10).all()


def check_gather_gives_what_was_packed(provider: str, device: torch.device) -> None:
    """The bits that ``layouts`` unpacks, NaN payloads in the part that is copied included."""
    g = _generator()
    cache = torch.full((7, 16, layouts.KV_BYTES), 0xFF, dtype=torch.uint8)
    slots = torch.randperm(7 * 16, generator=g)
    kv = inputs.normal(g, len(slots), 512).bfloat16()
    kv[::3, 448:] = torch.randint(0x7F81, 0x7FFF, (64,), generator=g).short().view(torch.bfloat16)
    layouts.write_kv(cache, slots, kv)
    table = torch.tensor([[3, 6, 0], [1, 5, 2]], dtype=torch.int32)
    out = torch.full((2, 60, 512), 7.0).bfloat16()
    lens, some = torch.tensor([41, 17], dtype=torch.int32), torch.tensor([20, 99], dtype=torch.int32)
    for gather_lens, first in ((None, (0, 0)), (some, (21, 0))):
        made = {"k_cache": cache, "seq_lens": lens, "block_table": table, "out": out.clone()}
        found = _run(provider, "gather_dequant_kv", device, **made, gather_lens=gather_lens, offset=5).cpu()
        want = out.clone()
        for i, (start, length) in enumerate(zip(first, lens.tolist(), strict=True)):
            entry = torch.arange(start, length)
            want[i, 5 : 5 + len(entry)] = layouts.read_kv(cache, table[i, entry // 16].long() * 16 + entry % 16)
        assert numerics.same_bits(found, want)


def check_copied_bits(provider: str, device: torch.device) -> None:
    """``inverse_rope`` does not touch the 448: zeros of both signs, NaN payloads, subnormals."""
    bits = torch.randint(-(2**15), 2**15, (3, 2, 512), generator=_generator()).short()
    x = bits.view(torch.bfloat16)
    x[..., 448:] = 1.0
    at = torch.tensor([0, 1, 2])
    out = _run(provider, "inverse_rope", device, x=x, positions=at, cos_sin=inputs.cos_sin(3), groups=1).cpu()
    assert torch.equal(out.view(torch.int16).view(3, 2, 512)[..., :448], bits[..., :448])


def check_a_nan_spoils_its_block(provider: str, device: torch.device) -> None:
    """And no other: of the output 128 elements and their scale, of the queries one head of one token."""
    g = _generator()
    turns = {"positions": torch.arange(4), "cos_sin": inputs.cos_sin(4)}
    x, q = inputs.normal(g, 4, 2, 512).bfloat16(), inputs.normal(g, 4, 6, 128).bfloat16()
    made: tuple[tuple[str, str, dict[str, Any], int], ...] = (
        ("inverse_rope_quant", "x", {"x": x, "groups": 1}, 8),  # and so many blocks of a token
        ("indexer_q_rope_quant", "q", {"q": q, "weights": torch.ones(4, 6), "scale": 1.0}, 6),
    )
    for op, name, own, blocks in made:
        clean = _run(provider, op, device, **own, **turns)
        for bad in (torch.nan, torch.inf, -torch.inf):
            spoilt = own[name].clone()
            spoilt[1, 0, 70] = spoilt[3, 0, 127] = bad
            found = _run(provider, op, device, **(own | {name: spoilt}), **turns)
            keep = torch.ones(4, blocks, dtype=torch.bool, device=device)
            keep[1, 0] = keep[3, 0] = False
            for before, after in zip(clean, found, strict=True):
                assert numerics.same_bits(*(r.reshape(4, blocks, -1)[keep] for r in (before, after))), (op, bad)


def apart(x: Tensor) -> Tensor:
    """x with more than 2^31 elements from row to row, of which no more memory is touched than x has."""
    far = 2**31 + 16
    memory = torch.empty(far * (len(x) - 1) + x[0].numel(), dtype=x.dtype, device=x.device)
    return memory.as_strided(x.shape, (far, *x.stride()[1:])).copy_(x)


def check_wide_strides(provider: str, device: torch.device) -> None:
    """Offsets beyond 2^31: tokens, heads, pages and rows of a workspace far apart in memory."""
    g = _generator()
    at = torch.tensor([1, 0])

    def compare(op: str, name: str, made: dict[str, Any]) -> None:
        def near() -> dict[str, Any]:  # with a buffer of its own for an op in place
            return {k: v.clone().to(device) if isinstance(v, Tensor) else v for k, v in made.items()}

        run = checks.subject(provider, op, device).run
        wide = run(near() | {name: apart(made[name].to(device))})
        for a, b in zip(run(near()), wide, strict=True):
            assert torch.equal(a.cpu().float(), b.cpu().float()), (op, name)

    turns = {"positions": at, "cos_sin": inputs.cos_sin(2)}
    x, q = inputs.normal(g, 2, 2, 512).bfloat16(), inputs.normal(g, 2, 2, 128).bfloat16()
    compare("inverse_rope_quant", "x", {"x": x, "groups": 1, **turns})
    compare("inverse_rope", "x", {"x": x, "groups": 1, **turns})
    compare("indexer_q_rope_quant", "q", {"q": q, "weights": torch.ones(2, 2), "scale": 1.0, **turns})
    cache = torch.full((2, 4, layouts.KV_BYTES), 0xFF, dtype=torch.uint8)
    layouts.write_kv(cache, torch.arange(8), inputs.normal(g, 8, 512).bfloat16())
    table, lens = torch.tensor([[1, 0], [0, 1]], dtype=torch.int32), torch.tensor([7, 8], dtype=torch.int32)
    made = {"k_cache": cache, "seq_lens": lens, "block_table": table, "out": torch.zeros(2, 8, 512).bfloat16()}
    compare("gather_dequant_kv", "k_cache", made)
    compare("gather_dequant_kv", "out", made)


CHECKS: tuple[Callable[[str, torch.device], None], ...] = (
    check_einsum_takes_the_output,
    check_logits_take_the_queries,
    check_hadamard_is_the_matrix,
    check_gather_gives_what_was_packed,
    check_copied_bits,
    check_a_nan_spoils_its_block,
    check_wide_strides,
)
