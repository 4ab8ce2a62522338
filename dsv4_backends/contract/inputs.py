"""Random inputs. Those of the contracts' cases are drawn on the CPU from the case's seed, then moved. ``bench`` has
``Draw``.

A case fills memory that a caller may leave unwritten with NaN, so that a provider that reads it fails.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

POISON = 0xFF
"""NaN as e4m3, as E8M0, and, repeated, as bf16 and fp32."""


def normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    """fp32 standard normal times ``scale``."""
    import torch

    return torch.randn(shape, generator=generator, dtype=torch.float32) * scale


def powers(generator: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    """fp32 powers of two, at least 2^low and below 2^high."""
    import torch

    return 2.0 ** torch.randint(low, high, shape, generator=generator).float()


def uniform(generator: torch.Generator, *shape: int) -> Tensor:
    """fp32 in [0, 1)."""
    import torch

    return torch.rand(shape, generator=generator, dtype=torch.float32)


def e4m3(generator: torch.Generator, device: torch.device, *shape: int) -> Tensor:
    """Standard normal values as e4m3, rounded on ``device``, since the CPU is slow at it."""
    import torch

    return normal(generator, *shape).to(device).to(torch.float8_e4m3fn)


def spread(x: Tensor) -> Tensor:
    """A copy of x with gaps between the rows of its second to last dimension, filled with NaN or 0x7F bytes."""
    import torch

    wide = torch.empty(*x.shape[:-1], x.shape[-1] + 16, dtype=x.dtype)
    wide.view(torch.uint8).fill_(0x7F)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def move(x: Tensor, device: torch.device) -> Tensor:
    """x on ``device`` with its strides. ``Tensor.to`` would drop the gaps between rows."""
    import torch

    if device.type == "cpu":
        return x
    moved = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    return moved.copy_(x)


def sinks(generator: torch.Generator, heads: int, kind: str) -> Tensor | None:
    """Attention sinks: ``none``, ``finite``, or ``mixed`` with infinities of both signs."""
    if kind == "none":
        return None
    sink = normal(generator, heads)
    if kind == "mixed":
        sink[0::3] = float("inf")
        sink[1::3] = -float("inf")
    return sink


def lengths(generator: torch.Generator, rows: int, width: int, kind: str) -> Tensor | None:
    """Lengths up to ``width``: ``none``, ``random`` (with a 0 and a full one), ``zero``, or ``any`` (below 0 and above
    the width too)."""
    import torch

    if kind == "none":
        return None
    if kind == "zero":
        return torch.zeros(rows, dtype=torch.int32)
    drawn = torch.randint(0, width + 1, (rows,), generator=generator, dtype=torch.int32)
    if kind == "any":
        for place, value in enumerate((width + 1, -1, 2**31 - 1, -(2**31), -width)):
            drawn[2 * place :: 12] = value
        return drawn
    drawn[:1] = width
    drawn[1:2] = 0
    return drawn


def choices(generator: torch.Generator, rows: int, topk: int, pool: Tensor, size: int, invalid: str) -> Tensor:
    """int32 ``[rows, topk]`` drawn with repetition from ``pool``, some of them invalid.

    ``invalid`` is ``none``, ``tail`` (-1 at the end of each row, a different number in each), ``mixed`` (-1
    anywhere), ``all``, or ``extreme`` (any value outside ``[0, size)`` anywhere, and one row of only such values).
    """
    import torch

    if len(pool) == 0:
        return torch.full((rows, topk), -1, dtype=torch.int32)
    picked = pool[torch.randint(0, len(pool), (rows, topk), generator=generator)].int()
    if invalid == "tail":
        keep = torch.randint(0, topk + 1, (rows, 1), generator=generator)
        picked[torch.arange(topk) >= keep] = -1
    elif invalid == "mixed":
        picked[uniform(generator, rows, topk) < 0.3] = -1
    elif invalid == "all":
        picked.fill_(-1)
    elif invalid == "extreme":
        bad = torch.tensor([-1, -2, -(2**31), 2**31 - 1, size, size + 1], dtype=torch.int32)
        drawn = bad[torch.randint(0, len(bad), (rows, topk), generator=generator)]
        where = uniform(generator, rows, topk) < 0.5
        where[:1] = True
        picked = torch.where(where, drawn, picked)
    return picked


def positions(generator: torch.Generator, count: int, most: int, dtype: str = "int64", kind: str = "within") -> Tensor:
    """Positions of tokens below ``most``, 0 and the last included; ``any``: half of them outside the table."""
    import torch

    drawn = torch.randint(0, most, (count,), generator=generator)
    drawn[1:2], drawn[2:3] = 0, most - 1
    if kind == "any":
        bad = torch.tensor([-1, most, -(2**31), 2**31 - 1] + [2**40, -(2**63)] * (dtype == "int64"))
        picked = bad[torch.randint(0, len(bad), (count,), generator=generator)]
        drawn = torch.where(uniform(generator, count) < 0.5, picked, drawn)
    return drawn.to(getattr(torch, dtype))


def cos_sin(most: int, used: Tensor | None = None, *, quarters: bool = False) -> Tensor:
    """The rotations at positions below ``most``, fp32 ``[most, 64]``: 32 cosines, then 32 sines.

    Rows at none of the positions ``used`` (clamped to the table) hold NaN. ``quarters``: only right angles, so that
    nothing is rounded.
    """
    import torch

    places = torch.arange(most, dtype=torch.float64, device="cpu").unsqueeze(-1)
    pairs = torch.arange(32, dtype=torch.float64, device="cpu")
    angles = (places + pairs) * (torch.pi / 2) if quarters else places * 160000.0 ** (-pairs / 32)
    table = torch.cat([angles.cos(), angles.sin()], -1).float()
    table = table.round() if quarters else table
    if used is not None:
        unused = torch.ones(most, dtype=torch.bool)
        unused[used.long().clamp(0, most - 1)] = False
        table[unused] = float("nan")
    return table


PIECE = 1 << 17
"""Tokens that ``Draw`` quantises at a time: half a GiB of temporaries."""


class Draw:
    """Random tensors made on the device that is timed.

    The contracts' cases are drawn on the CPU, so that they are the same on every machine. For caches of gigabytes that
    would take minutes. Here the seed is fixed, but the values differ between kinds of device.
    """

    def __init__(self, generator: torch.Generator, device: torch.device) -> None:
        self.generator, self.device = generator, device

    def normal(self, *shape: int, dtype: str = "float32", scale: float = 1.0) -> Tensor:
        import torch

        drawn = torch.empty(shape, dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32, device=self.device)
        return drawn.normal_(0, scale, generator=self.generator).to(getattr(torch, dtype))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        import torch

        return torch.randint(low, high, shape, generator=self.generator, device=self.device)

    def powers(self, *shape: int) -> Tensor:
        return 2.0 ** self.integers(-3, 4, *shape).float()

    def pages(self, count: int, each: int) -> Tensor:
        """A table ``[count, each]`` of all pages in random order."""
        import torch

        return torch.randperm(count * each, generator=self.generator, device=self.device).view(count, each)

    def range(self, stop: int) -> Tensor:
        import torch

        return torch.arange(stop, device=self.device)

    def full(self, value: int, *shape: int) -> Tensor:
        """int32, filled with one value."""
        import torch

        return torch.full(shape, value, dtype=torch.int32, device=self.device)

    def cos_sin(self, most: int) -> Tensor:
        """The rotations at positions below ``most``."""
        return cos_sin(most).to(self.device)
