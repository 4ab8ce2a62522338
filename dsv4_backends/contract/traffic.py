"""What serving asks of the ops: a server's limits, and the form in which each op says what they mean for it.

Free of torch until a call is made. Shapes decide everything here, so tensors of the meta device are enough to ask who
would serve a call, what it would compile, and how much memory it would take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .models import Model, Rank

WINDOW_PAGE = 64
"""Tokens in a page of the window's cache, and keys in one of the indexer's."""
BLOCK = 256
"""Tokens of context that one page of a compressed cache stands for: 64 keys at ratio 4, 2 at ratio 128."""
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
    """How far a server goes.

    Attributes:
        max_tokens: Query tokens of one step: the prefill chunk, or the tokens of a decode batch if that is more.
        max_requests: Requests of one decode step.
        max_context: Tokens of the longest context.
        next_n: Most tokens of one request in a decode step: 1, or more with speculative decoding.
        heads: Heads of an attention call; 0: the rank's own. vLLM pads them to 64 or 128.

    Raises:
        ValueError: a limit that is no int, or below 1 (``heads``: below 0).
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
        limits: How far the server goes.
        packed_scales: The engine packs the scales of the output projection.
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
    def tokens(self) -> list[int]:
        """Token counts at which a launch configuration may change: the small ones, and both sides of round ones."""
        most = self.limits.max_tokens
        edges = {*range(64, 1025, 16), *range(1152, most + 1, 128)}
        return sorted(n for n in {*range(1, 65), *edges, *(edge + 1 for edge in edges), most} if n <= most)

    @property
    def steps(self) -> tuple[tuple[str, int], ...]:
        """The largest step of each kind, with its tokens."""
        return ("prefill", self.limits.max_tokens), ("decode", self.limits.max_requests * self.limits.next_n)


def packed_scales(capability: Any) -> bool:
    """Whether engines pack the scales of the output projection for a compute capability (None: no GPU)."""
    return capability is not None and bool(capability.major >= 10)


@dataclass(frozen=True)
class Need:
    """One op in one set of shapes.

    Attributes:
        op: The contract's name.
        role: What asks for it, for people.
        sizes: The dimensions that decide, by name.
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
        only: Options of ``bench`` with which the row is measured; with others it is left out.
    """

    op: str
    name: str
    params: Mapping[str, Any]
    only: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Classes:
    """How the shapes of one op are told apart by the measured choice.

    Attributes:
        tensors: Positions of the two arguments whose shapes are looked at.
        load: What grows with the batch, for people.
        read: Those shapes to the name of the class and the load.
        of_row: The same shapes from the parameters of a row of ``bench``.
    """

    tensors: tuple[int, int]
    load: str
    read: Callable[[Shape, Shape], tuple[str, int]]
    of_row: Callable[[Mapping[str, Any]], tuple[Shape, Shape]]


@dataclass(frozen=True)
class Traffic:
    """What serving asks of one op.

    Attributes:
        calls: Arguments of every call that differs in what could be compiled for it, on the ``meta`` device.
        needs: The calls in their largest shapes, which ``check`` shows.
        classes: The classes of shapes of the measured choice.
        rows: The rows of ``bench`` for a model's label and a rank.
        tiny: Rows that a CPU gets through at once.
        draw: ``draw(inputs.Draw, **params)`` makes a row's arguments on the device that is timed: random, valid, and
            in the layouts that an engine keeps.
        held: Arguments that are the cache or weights; all others live for the call.
    """

    calls: Callable[[Deployment], Iterator[Arguments]]
    needs: Callable[[Deployment], Iterator[Need]]
    classes: Classes
    rows: Callable[[str, Rank], Iterator[Row]]
    tiny: tuple[Row, ...]
    draw: Callable[..., Arguments]
    held: tuple[str, ...] = ()


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def meta(dtype: str, *shape: int) -> Any:
    """A tensor without storage."""
    import torch

    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
