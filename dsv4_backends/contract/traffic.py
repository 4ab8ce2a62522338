"""The calls that serving makes of the ops: a server's limits, and the type in which each op states its calls.

Does not import torch until a call is made. Everything here depends on shapes only. So tensors of the meta device are
enough to find which provider serves a call, what it compiles, and how much memory it takes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .models import Model, Rank

WINDOW_PAGE = 64
"""Tokens in a page of the window's cache, and keys in a page of the indexer's cache."""
BLOCK = 256
"""Tokens of context for one page of a compressed cache: 64 keys at ratio 4, 2 at ratio 128."""
INDEXER_RATIO = 4
"""Tokens per compressed key in a layer that has an indexer."""
BENCH_CONTEXT = 65536
"""Tokens before a prefill chunk of ``bench``, and of each request of a decode batch: 16384 compressed keys."""
POSITIONS = ("int64", "int32")
"""The dtypes in which engines keep the positions of tokens."""
Arguments = dict[str, Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Limits:
    """A server's limits.

    Attributes:
        max_tokens: Query tokens of one step: the prefill chunk, or the tokens of a decode batch if that is more.
        max_requests: Requests of one decode step.
        max_context: Tokens of the longest context.
        next_n: Largest number of tokens of one request in a decode step; more than 1 with speculative decoding.
        heads: Heads of an attention call; 0: the rank's own. vLLM pads them to 64 or 128.

    Raises:
        ValueError: a limit that is not an int, or below 1 (``heads``: below 0).
    """

    max_tokens: int = 8192
    max_requests: int = 256
    max_context: int = 131072
    next_n: int = 1
    heads: int = 0

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_requests", "max_context", "next_n", "heads"):
            least = int(name != "heads")
            value = getattr(self, name)
            if not isinstance(value, int):
                raise ValueError(f"{name}: expected an int, got {value!r}")
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")


@dataclass(frozen=True)
class Deployment:
    """One rank of a server.

    Attributes:
        rank: The model and its tensor parallelism.
        limits: The server's limits.
        packed_scales: Whether the engine packs the scales of the output projection.
    """

    rank: Rank
    limits: Limits
    packed_scales: bool = False

    @property
    def model(self) -> Model:
        return self.rank.model

    @property
    def heads(self) -> int:
        """Heads of an attention call."""
        return self.limits.heads or self.rank.heads

    @property
    def compressed_keys(self) -> int:
        """Keys of the longest context in a layer that has an indexer."""
        return -(-self.limits.max_context // INDEXER_RATIO)

    @property
    def tokens(self) -> Sequence[int]:
        """Token counts at which a launch configuration may change: small ones, and the neighbours of round ones."""
        most = self.limits.max_tokens
        edges = {*range(64, 1025, 16), *range(1152, most + 1, 128)}
        return sorted(n for n in {*range(1, 65), *edges, *(edge + 1 for edge in edges), most} if n <= most)

    @property
    def batches(self) -> Sequence[int]:
        """Requests of a decode step."""
        return range(1, self.limits.max_requests + 1)

    @property
    def rows(self) -> Sequence[int]:
        """Rows of a decode step in which an engine passes each token of a request as a row."""
        return range(1, self.limits.max_requests * self.limits.next_n + 1)

    @property
    def steps(self) -> tuple[tuple[str, int], ...]:
        """The largest step of each kind, with its tokens."""
        return ("prefill", self.limits.max_tokens), ("decode", self.limits.max_requests * self.limits.next_n)


def packed_scales(capability: Any) -> bool:
    """Whether engines pack the scales of the output projection for a compute capability (None: no GPU)."""
    return capability is not None and bool(capability.major >= 10)


@dataclass(frozen=True)
class Need:
    """One op with one set of shapes.

    Attributes:
        op: The contract's name.
        role: The part of the model that calls it, for people.
        sizes: The dimensions that matter, by name.
        arguments: Makes the call's arguments on the ``meta`` device.
    """

    op: str
    role: str
    sizes: Mapping[str, int]
    arguments: Callable[[], Arguments]

    @property
    def shown(self) -> str:
        return ", ".join(f"{name} {size}" for name, size in self.sizes.items())


@dataclass(frozen=True)
class Row:
    """One call to time.

    Attributes:
        op: Contract name.
        name: Unique within the op, and the same in every run, so that runs can be compared.
        params: Keyword arguments of ``Traffic.draw``.
        only: Options of ``bench`` with which the row is measured. With other options it is left out.
    """

    op: str
    name: str
    params: Mapping[str, Any]
    only: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Classes:
    """How the measured choice classifies the shapes of one op.

    Attributes:
        tensors: Positions of the two arguments whose shapes are read.
        load: The size that grows with the batch, as text for people.
        read: From these shapes the name of the class and the load.
        of_row: The same shapes from the parameters of a row of ``bench``.
    """

    tensors: tuple[int, int]
    load: str
    read: Callable[[Shape, Shape], tuple[str, int]]
    of_row: Callable[[Mapping[str, Any]], tuple[Shape, Shape]]


@dataclass(frozen=True)
class Traffic:
    """The calls that serving makes of one op.

    Attributes:
        calls: Arguments of every call that may need another compiled kernel, on the ``meta`` device.
        needs: The calls with their largest shapes, which ``check`` shows.
        classes: The classes of shapes of the measured choice.
        rows: The rows of ``bench`` for a model's label and a rank.
        tiny: Rows that a CPU computes quickly.
        draw: ``draw(inputs.Draw, **params)`` makes a row's arguments on the device that is timed: random, valid, and
            in an engine's layouts.
        held: Arguments that are the cache or weights; all others exist for the call only.
    """

    calls: Callable[[Deployment], Iterator[Arguments]]
    needs: Callable[[Deployment], Iterator[Need]]
    classes: Classes
    rows: Callable[[str, Rank], Iterator[Row]]
    tiny: tuple[Row, ...]
    draw: Callable[..., Arguments]
    held: tuple[str, ...] = ()


def long_tailed(count: int, mean: int, most: int, seed: int) -> list[int]:
    """Lengths with few long ones: a lognormal distribution with sigma 1, scaled to the mean and cut at ``most``."""
    drawn = random.Random(seed)
    sizes = [drawn.lognormvariate(0, 1) for _ in range(count)]
    return [min(max(round(size * mean * count / sum(sizes)), 1), most) for size in sizes]


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def meta(dtype: str, *shape: int) -> Any:
    """A tensor without storage."""
    import torch

    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
