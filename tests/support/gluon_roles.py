"""Runs the source of warp-specialised Gluon kernels on the CPU. Triton's interpreter does not run Gluon.

    emulation = Emulation(seed=0)
    with recording(emulation, arch):
        result = function(**arguments)

Every recorded launch is run, with its own arguments and tensor maps. Values are torch tensors, with Triton's types. A
role is a thread, of which one runs at a time. At every barrier, copy, product and access to shared memory the seed
decides who goes on, so a run can be repeated. If nobody can, that is a deadlock, and the error says who waits where.

What is as on the GPU, or less forgiving:

* An mbarrier has a count of arrivals, bytes that are expected, and a phase.
* A box, or what cp.async copies, comes in at any time after it was issued, with zeros outside of the tensor.
* A product is NaN if its operands in shared memory are not the same when it is issued and when it is waited for.
* Shared memory is NaN at first.
* Stores are counted: see ``Emulation.written``.

What it does not see: code generation; layouts and registers; fences and barriers within a role, whose threads run as
one; variables that a loop of Gluon does not carry, though one of Python does; races between programs, which run one
after the other; a loop without end that waits for nothing. What it does not know raises NotEmulated.
"""

from __future__ import annotations

import ast
import dis
import inspect
import itertools
import math
import random
import re
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import triton.language as tl
from dsv4_backend_triton.launch import Launch
from dsv4_backend_triton.lib import bits
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import ConstexprFunction, JITFunction


class NotEmulated(Exception):
    """A kernel uses what the emulator does not know."""


class Deadlock(Exception):
    """Every role waits."""


class Fault(Exception):
    """A kernel does what the GPU does not define."""


class _Stopped(BaseException):
    """Ends a role's thread after another role failed."""


_DTYPES = {
    "int1": torch.bool,
    "uint8": torch.uint8,
    "uint32": torch.uint32,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8e4nv": torch.float8_e4m3fn,
}


# Values


def _tensor(x: Any) -> Tensor:
    """A value, or a number of Python's, as a tensor."""
    if isinstance(x, Value):
        return x.t
    if isinstance(x, bool):
        return torch.tensor(x)
    if isinstance(x, int):
        return torch.tensor(x, dtype=torch.int32 if -(2**31) <= x < 2**31 else torch.int64)
    if isinstance(x, float):
        return torch.tensor(x, dtype=torch.float32)
    if isinstance(x, Product):
        raise Fault("a product is used before it was waited for")
    raise NotEmulated(f"arithmetic with {type(x).__name__}")


def _promoted(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """Two operands in their common type, to which a number of Python's adds its kind only. PyTorch's own rule differs:
    there a tensor without dimensions does not widen another one. uint32, which kernels only compare, is widened."""
    x, y = (t.to(torch.int64) if t.dtype == torch.uint32 else t for t in (_tensor(a), _tensor(b)))
    strong = [t.dtype for t, given in ((x, a), (y, b)) if isinstance(given, Value)]
    common = torch.promote_types(x.dtype, y.dtype)
    if len(strong) == 1 and (strong[0].is_floating_point or not common.is_floating_point) and strong[0] != torch.bool:
        common = strong[0]
    return x.to(common), y.to(common)


def _binary(function: Callable[..., Tensor], a: Any, b: Any) -> Any:
    if isinstance(a, Pointer) or isinstance(b, Pointer):
        return NotImplemented
    return Value(function(*_promoted(a, b)))


def _divided(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b, rounding_mode="trunc")  # as in C


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return a.float() / b.float()


class Value:
    """A number or a tensor in the registers of a role."""

    type = SimpleNamespace(layout=None)

    def __init__(self, t: Tensor) -> None:
        self.t = t

    @property
    def shape(self) -> list[int]:
        return [*self.t.shape]

    def __add__(self, o: Any) -> Any:
        return _binary(torch.add, self, o)

    def __radd__(self, o: Any) -> Any:
        return _binary(torch.add, o, self)

    def __sub__(self, o: Any) -> Any:
        return _binary(torch.sub, self, o)

    def __rsub__(self, o: Any) -> Any:
        return _binary(torch.sub, o, self)

    def __mul__(self, o: Any) -> Any:
        return _binary(torch.mul, self, o)

    def __rmul__(self, o: Any) -> Any:
        return _binary(torch.mul, o, self)

    def __truediv__(self, o: Any) -> Any:
        return _binary(_ratio, self, o)

    def __rtruediv__(self, o: Any) -> Any:
        return _binary(_ratio, o, self)

    def __floordiv__(self, o: Any) -> Any:
        return _binary(_divided, self, o)

    def __rfloordiv__(self, o: Any) -> Any:
        return _binary(_divided, o, self)

    def __mod__(self, o: Any) -> Any:
        return _binary(torch.fmod, self, o)

    def __rmod__(self, o: Any) -> Any:
        return _binary(torch.fmod, o, self)

    def __rshift__(self, o: Any) -> Any:
        return _binary(torch.bitwise_right_shift, self, o)

    def __lshift__(self, o: Any) -> Any:
        return _binary(torch.bitwise_left_shift, self, o)

    def __and__(self, o: Any) -> Any:
        return _binary(torch.bitwise_and, self, o)

    def __rand__(self, o: Any) -> Any:
        return self & o

    def __ror__(self, o: Any) -> Any:
        return self | o

    def __or__(self, o: Any) -> Any:
        return _binary(torch.bitwise_or, self, o)

    def __xor__(self, o: Any) -> Any:
        return _binary(torch.bitwise_xor, self, o)

    def __lt__(self, o: Any) -> Any:
        return _binary(torch.lt, self, o)

    def __le__(self, o: Any) -> Any:
        return _binary(torch.le, self, o)

    def __gt__(self, o: Any) -> Any:
        return _binary(torch.gt, self, o)

    def __ge__(self, o: Any) -> Any:
        return _binary(torch.ge, self, o)

    def __eq__(self, o: Any) -> Any:
        return _binary(torch.eq, self, o)

    def __ne__(self, o: Any) -> Any:
        return _binary(torch.ne, self, o)

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        return bool(self.t)

    def __index__(self) -> int:
        return int(self.t)

    def __getitem__(self, at: Any) -> Value:
        return Value(self.t[at])

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Value:
        return Value(self.t.view(dtype) if bitcast else self.t.to(dtype))


class Pointer:
    """Elements of a tensor in global memory, by their distance from its first."""

    def __init__(self, tensor: Tensor, at: Tensor) -> None:
        self.tensor, self.at = tensor, at

    def _moved(self, o: Any, sign: int) -> Pointer:
        return Pointer(self.tensor, self.at + sign * _tensor(o).to(torch.int64))

    def __add__(self, o: Any) -> Pointer:
        return self._moved(o, 1)

    __radd__ = __add__

    def __sub__(self, o: Any) -> Pointer:
        return self._moved(o, -1)

    def __getitem__(self, at: Any) -> Pointer:
        return Pointer(self.tensor, self.at[at])

    def to(self, dtype: torch.dtype) -> Pointer:
        """To elements of another size."""
        bytes_at = self.at * self.tensor.itemsize
        if (bytes_at % dtype.itemsize).any():
            raise Fault(f"an address of {dtype} that is not a multiple of its size")
        return Pointer(self.tensor.view(dtype), bytes_at // dtype.itemsize)

    def reached(self, mask: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The tensor's elements in one row, and of every lane the element and whether it is reached."""
        size = 1 + sum((n - 1) * stride for n, stride in zip(self.tensor.shape, self.tensor.stride(), strict=True))
        at, ok = torch.broadcast_tensors(self.at, _tensor(True if mask is None else mask))
        inside = at[ok]
        if inside.numel() and not 0 <= int(inside.min()) <= int(inside.max()) < size:
            raise Fault(f"elements {int(inside.min())} to {int(inside.max())} of a tensor of {size}")
        return self.tensor.as_strided((size,), (1,)), at, ok


def _load(ptr: Pointer, mask: Any = None, other: Any = None) -> Value:
    row, at, ok = ptr.reached(mask)
    if other is None:  # nothing is said of what is masked then
        other = float("nan") if row.dtype.is_floating_point else -1
    return Value(torch.where(ok, row[torch.where(ok, at, 0)], _tensor(other).to(row.dtype)))


def _store(ptr: Pointer, value: Any, mask: Any = None, cache_modifier: str = "") -> None:
    row, at, ok = ptr.reached(mask)
    at, ok, given = torch.broadcast_tensors(at, ok, _tensor(value))
    row[at[ok]] = given[ok].to(row.dtype)
    _role().program.emulation._count(ptr.tensor, at[ok])


# Shared memory and tensor maps


class Shared:
    """A buffer in shared memory, or a part of it."""

    def __init__(self, t: Tensor, layout: Any) -> None:
        self.t, self.layout = t, layout

    @property
    def shape(self) -> list[int]:
        return [*self.t.shape]

    def index(self, i: Any) -> Shared:
        at = int(i)
        if not 0 <= at < len(self.t):
            raise Fault(f"buffer {at} of {len(self.t)} in shared memory")
        return Shared(self.t[at], self.layout)

    def slice(self, start: Any, length: int, dim: int = 0) -> Shared:
        return Shared(self.t.narrow(dim, int(start), length), self.layout)

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.t.permute(*order), self.layout)

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.t.view(list(shape)), self.layout)

    def load(self, layout: Any) -> Value:
        _role().pause(reads=True)
        return Value(self.t.clone())

    def store(self, value: Value) -> None:
        _role().pause()
        if value.t.dtype != self.t.dtype or value.t.shape != self.t.shape:
            raise Fault(f"a store of {value.t.dtype} {[*value.t.shape]} to {self.t.dtype} {[*self.t.shape]}")
        self.t.copy_(value.t)


class Boxes:
    """A tensor map."""

    def __init__(self, made: TensorDescriptor) -> None:
        base = made.base
        self.tensor = base.as_strided(made.shape, made.strides, base.storage_offset())
        self.box, self.layout, self.dtype = list(made.block_shape), made.layout, base.dtype


def _allocate(dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Shared | Barriers:
    if isinstance(layout, mbarrier.MBarrierLayout):
        return Barriers(shape[0])
    # In every type of float, bits that are all 1 are a NaN.
    raw = torch.full((math.prod(shape) * dtype.itemsize,), 0xFF, dtype=torch.uint8)
    return Shared(raw.view(dtype).view(list(shape)), layout)


def _reinterpret(smem: Shared, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Shared:
    return Shared(smem.t.view(-1).view(torch.uint8).view(dtype).view(list(shape)), layout)


def _load_box(source: Boxes, at: Sequence[Any], barrier: Barrier, target: Shared) -> None:
    """The copy of a box, which comes in later."""
    if list(target.t.shape) != source.box or target.t.dtype != source.dtype:
        raise Fault(f"a box of {source.dtype} {source.box} to {target.t.dtype} {[*target.t.shape]}")
    first = [int(i) for i in at]
    if first[-1] * source.dtype.itemsize % 16:  # an H200 raises "illegal instruction"
        raise Fault(f"a box of {source.dtype} that begins at column {first[-1]}, no multiple of 16 bytes")

    def arrive() -> None:
        target.t.view(torch.uint8).zero_()
        there, here = source.tensor, target.t
        for dim, (i, n, size) in enumerate(zip(first, source.box, source.tensor.shape, strict=True)):
            begin, end = min(max(i, 0), size), min(max(i + n, 0), size)
            there = there.narrow(dim, begin, end - begin)
            here = here.narrow(dim, min(max(begin - i, 0), n) if end > begin else 0, end - begin)
        here.copy_(there)
        barrier.change(expected=-target.t.numel() * target.t.itemsize)

    role = _role()
    role.program.copies.append(arrive)
    role.pause()


def _load_elements(target: Shared, ptr: Pointer, mask: Any = None) -> None:
    """A copy by the threads of a role (cp.async), which comes in later; zeros where it is masked."""
    if ptr.tensor.dtype != target.t.dtype:
        raise Fault(f"a copy of {ptr.tensor.dtype} to {target.t.dtype}")
    at = Pointer(ptr.tensor, ptr.at.broadcast_to(target.t.shape))
    role = _role()
    role.copies.append(lambda: target.t.copy_(_load(at, mask, 0).t))


def _copies_arrive(barrier: Barrier, *, increment_count: bool = True) -> None:
    """An arrival of each thread of the role, once all copies that it issued before are in."""
    if increment_count:
        raise NotEmulated("async_copy.mbarrier_arrive with increment_count")
    role = _role()
    issued, role.copies = role.copies, []
    threads = 32 * role.warps

    def arrive() -> None:
        for copy in issued:
            copy()
        barrier.change(pending=-threads)

    role.arrivals.append(arrive)
    role.program.copies.append(lambda: role.arrivals.pop(0)())  # in the order in which they were issued
    role.pause()


def _commit_copies() -> None:
    role = _role()
    group, role.copies = role.copies, []
    if role.program.random.random() < 0.5:  # they come in at once
        for copy in group:
            copy()
        group = []
    role.groups.append(group)


def _wait_for_copies(pending: int) -> None:
    """Copies in no group are waited for too: those of a kernel whose threads wait for their own only."""
    role = _role()
    if role.arrivals:
        raise NotEmulated("async_copy.wait_group after async_copy.mbarrier_arrive")
    role.pause()
    if not pending:
        _commit_copies()
    while len(role.groups) > pending:
        for copy in role.groups.pop(0):
            copy()


# Barriers


class Barrier:
    """An mbarrier."""

    def __init__(self) -> None:
        self.count = self.pending = self.expected = self.phase = 0

    def change(self, pending: int = 0, expected: int = 0) -> None:
        if not self.count:
            raise Fault("a barrier that was not initialised")
        self.pending += pending
        self.expected += expected
        if self.pending < 0:
            raise Fault(f"more arrivals at a barrier than its {self.count}")
        if self.pending == 0 and self.expected == 0:
            self.phase += 1
            self.pending = self.count


class Barriers:
    """An array of mbarriers."""

    def __init__(self, size: int) -> None:
        self.all = [Barrier() for _ in range(size)]

    def index(self, i: Any) -> Barrier:
        at = int(i)
        if not 0 <= at < len(self.all):
            raise Fault(f"barrier {at} of {len(self.all)}")
        return self.all[at]


def _init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.pending = int(count)
    barrier.expected = barrier.phase = 0


def _expect(barrier: Barrier, size: Any, pred: Any = True) -> None:
    if pred:
        _role().pause()
        barrier.change(pending=-1, expected=int(size))


def _arrive(barrier: Barrier, *, count: int = 1, pred: Any = True) -> None:
    if pred:
        _role().pause()
        barrier.change(pending=-count)


def _wait(barrier: Barrier, parity: Any, pred: Any = True) -> None:
    if pred:
        odd = int(parity)
        _role().pause(lambda: barrier.phase & 1 != odd)


# Products


class Product:
    """A product on the tensor cores. Its operands are read at any time until it is waited for."""

    def __init__(self, a: Value | Shared, b: Shared, added: Value | Product | None) -> None:
        self.operands, self.added = (a, b), added
        self.seen = a.t.clone(), b.t.clone()
        self.done: Value | None = None

    def finish(self) -> None:
        a, b = (_factor(t) for t in self.seen)
        total = a @ b
        if isinstance(self.added, Product):
            assert self.added.done is not None, "products finish in order"
            total += self.added.done.t
        elif self.added is not None:
            total += self.added.t
        if any(not _same_bytes(now.t, seen) for now, seen in zip(self.operands, self.seen, strict=True)):
            total.fill_(float("nan"))
        self.done = Value(total)


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(*(t.contiguous().view(torch.uint8) for t in (a, b)))


def _factor(t: Tensor) -> Tensor:
    """An operand as the tensor cores read it: of fp32, the last 13 bits are dropped."""
    if t.dtype == torch.float32:
        return (t.view(torch.int32) & -(1 << 13)).view(torch.float32)
    return t.float()


def _mma(
    a: Value | Shared, b: Shared, acc: Value | Product, *, use_acc: bool = True, is_async: bool = False
) -> Product:
    if not is_async:
        raise NotEmulated("a warpgroup_mma that is not asynchronous")
    if a.t.dtype != b.t.dtype:
        raise Fault(f"a product of {a.t.dtype} and {b.t.dtype}")
    role = _role()
    product = Product(a, b, acc if use_acc else None)
    role.products.append(product)
    return product


def _mma_wait(pending: int, deps: Sequence[Product]) -> Any:
    role = _role()
    role.pause(reads=True)
    while len(role.products) > pending:
        role.products.pop(0).finish()
    # One that is still pending stays a product, with which nothing can be computed.
    values = tuple(one if one.done is None else one.done for one in deps)
    return values[0] if len(values) == 1 else values


# Roles


_here = threading.local()


def _role() -> Role:
    role: Role = _here.role
    return role


class Role:
    """A thread of a program, which runs only while it has the turn."""

    def __init__(
        self, program: Program, name: str, warps: int, function: Callable[..., Any], arguments: Sequence[Any]
    ) -> None:
        self.program, self.name, self.warps = program, name, warps
        self.copies: list[Callable[[], Any]] = []  # cp.async in no group, and that no arrival waits for yet
        self.groups: list[list[Callable[[], Any]]] = []
        self.arrivals: list[Callable[[], None]] = []
        self.products: list[Product] = []
        self.ready: Callable[[], bool] = lambda: True
        self.finished = self.late = False
        self.error: BaseException | None = None
        self.turn = threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run, args=(function, arguments), name=name, daemon=True)
        self.speed = 4.0 ** program.random.randrange(4)  # one role is often far behind another
        self.thread.start()

    def _run(self, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
        _here.role = self
        try:
            self._take_turn()
            function(*arguments)
            if self.products or self.copies or any(self.groups):
                raise Fault(f"{self.name} ends before its products and copies were waited for")
        except _Stopped:
            pass
        except BaseException as error:
            self.error = error
        self.finished = True
        self.program.back.release()

    def _take_turn(self) -> None:
        self.turn.acquire()
        if self.program.stopped:
            raise _Stopped

    def pause(self, ready: Callable[[], bool] = lambda: True, *, reads: bool = False) -> None:
        """Others may run, until ``ready``. A role that reads shared memory next is late half of the time: it goes on
        when nobody else can. By then a slot that it released too early has been filled again."""
        self.ready = ready
        self.late = reads and self.program.random.random() < 0.5
        self.program.back.release()
        self._take_turn()

    def where(self) -> str:
        """The lines of the kernel at which it is."""
        frames = traceback.extract_stack(sys._current_frames()[self.thread.ident or 0])
        lines = [f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in frames if "dsv4_backend_triton" in f.filename]
        return f"{self.name} at {' > '.join(lines)}"


class Program:
    """One block of the grid."""

    def __init__(self, emulation: Emulation, launch: Launch, place: tuple[int, ...]) -> None:
        self.emulation, self.launch, self.place = emulation, launch, place
        self.random = emulation.random
        self.roles: list[Role] = []
        self.copies: list[Callable[[], None]] = []  # boxes on their way
        self.copies_speed = 4.0 ** self.random.randrange(4)
        self.back = threading.Semaphore(0)
        self.stopped = False

    def run(self, kernel: Callable[..., Any], arguments: Sequence[Any]) -> None:
        try:
            self.start("all", self.launch.options["num_warps"], kernel, arguments)
            while any(not role.finished for role in self.roles):
                self._step()
            if self.copies:
                raise Fault(f"program {self.place} ends while {len(self.copies)} boxes are on their way")
        finally:
            self.stopped = True
            for role in self.roles:
                role.turn.release()
                role.thread.join()

    def start(self, name: str, warps: int, function: Callable[..., Any], arguments: Sequence[Any]) -> Role:
        role = Role(self, name, warps, function, arguments)
        self.roles.append(role)
        return role

    def _step(self) -> None:
        """One turn, of a role or of a box that comes in."""
        ready = [role for role in self.roles if not role.finished and role.ready()]
        able = [role for role in ready if not role.late] or ([] if self.copies else ready)
        speeds = [role.speed for role in able]
        if self.copies and self.random.random() * (sum(speeds) + self.copies_speed) >= sum(speeds):
            self.copies.pop(self.random.randrange(len(self.copies)))()
            return
        if not able:
            waiting = [role.where() for role in self.roles[1:] or self.roles if not role.finished]
            raise Deadlock(f"program {self.place}: {'; '.join(waiting)}")
        (role,) = self.random.choices(able, speeds)
        role.turn.release()
        self.back.acquire()
        if role.error is not None:
            raise role.error


def _warp_specialize(
    parts: Sequence[tuple[Any, Sequence[Any]]], warps: Sequence[int], registers: Sequence[int]
) -> None:
    role = _role()
    if not len(parts) - 1 == len(warps) == len(registers):
        raise Fault(f"{len(parts)} roles, of which {len(warps)} have warps and {len(registers)} registers")
    started = [
        role.program.start(f"{f.__name__} {i}", count, f, args)
        for i, (count, (f, args)) in enumerate(zip((role.warps, *warps), parts, strict=True))
    ]
    role.pause(lambda: all(one.finished for one in started))


def _program_id(axis: int) -> Value:
    return Value(_tensor(_role().program.place[axis]))


def _num_programs(axis: int) -> Value:
    return Value(_tensor(_role().program.launch.grid[axis]))


# What kernels call, by Triton's names


def _range(*bounds: Any) -> Iterator[Value]:
    return (Value(_tensor(i)) for i in range(*map(int, bounds)))


def _where(condition: Any, a: Any, b: Any) -> Value | Pointer:
    if isinstance(a, Pointer) and isinstance(b, Pointer):
        return a if condition else b
    return Value(torch.where(_tensor(condition), *_promoted(a, b)))


def _reduced(function: Callable[[Tensor, int], Tensor]) -> Callable[[Value, int], Value]:
    return lambda x, axis: Value(function(x.t, axis).to(x.t.dtype))


def _times_144(raw: Tensor) -> Tensor:
    values = raw.contiguous().view(torch.float8_e4m3fn).float() * 144
    infinite = torch.where(raw > 127, -math.inf, math.inf)
    return torch.where(values.isnan(), infinite, values).half()


def _assembly(text: str, constraints: str, arguments: Sequence[Any], *_: Any, **__: Any) -> Value | tuple[Value, ...]:
    if found := re.fullmatch(r"mov\.u32 \$0, %ctaid\.([xyz]);", text):
        return _program_id("xyz".index(found[1]))
    if text == "fma.rn.f32 $0, $1, $2, $3;":
        a, b, c = arguments
        return Value((a * b + c).t)
    if text == "mov.b32 $0, $1;":
        return Value(arguments[0].t)
    if text == "and.b32 $0, $1, 0;":
        return Value(_tensor(0))
    if text == bits.BF16_TIMES_2_60TH.value:
        return Value((arguments[0].t.contiguous().view(torch.bfloat16) * 2.0**-60).view(torch.int32))
    if text == bits.scaled_e4m3(4, shared=True)[0]:
        raw, factor = (x.t.contiguous() for x in arguments)
        # A NaN code makes its own element NaN here, and all that are decoded with it on the GPU.
        values = raw.view(torch.float8_e4m3fn).double().view(*raw.shape, 2, 2)
        scaled = values * 2.0**-120 * factor.view(torch.bfloat16).double().view(*raw.shape, 1, 2)
        low, high = scaled.bfloat16().view(torch.int32).squeeze(-1).unbind(-1)
        return Value(low), Value(high)
    if text == bits.E4M3X4_TIMES_144:
        return Value(_times_144(arguments[0].t))
    if text == bits.E4M3X4_TIMES_144_AND:
        return Value(_times_144(arguments[0].t) * arguments[1].t)
    if text == bits.RELU_TERM:
        x, w, added = arguments
        return Value(((x + Value(x.t.abs())) * w + added).t)
    if text.startswith("griddepcontrol.launch_dependents;"):
        return Value(_tensor(0))
    raise NotEmulated(f"the assembly {text!r}")


_CALLS: dict[str, Callable[..., Any]] = {
    "abs": lambda x: Value(x.t.abs()),
    "allocate_shared_memory": _allocate,
    "arange": lambda start, end, layout=None: Value(torch.arange(start, end, dtype=torch.int32)),
    "async_copy.async_copy_global_to_shared": _load_elements,
    "async_copy.async_load": _load_elements,
    "async_copy.commit_group": _commit_copies,
    "async_copy.mbarrier_arrive": _copies_arrive,
    "async_copy.wait_group": _wait_for_copies,
    "barrier": lambda: None,
    "broadcast": lambda a, b: tuple(Value(t) for t in torch.broadcast_tensors(a.t, b.t)),
    "cdiv": lambda a, b: (a + b - 1) // b,
    "convert_layout": lambda x, layout: x,
    "cumsum": _reduced(torch.cumsum),
    "exp": lambda x: Value(torch.exp(x.t)),
    "exp2": lambda x: Value(torch.exp2(x.t)),
    "fence_async_shared": lambda: None,
    "fma": lambda a, b, c: a * b + c,
    "full": lambda shape, value, dtype, layout=None: Value(torch.full(shape, value, dtype=dtype)),
    "gdc_wait": lambda: None,
    "inline_asm_elementwise": _assembly,
    "join": lambda a, b: Value(torch.stack((a.t, b.t), -1)),
    "load": _load,
    "log2": lambda x: Value(torch.log2(x.t)),
    "max": _reduced(torch.amax),
    "maximum": lambda a, b: Value(torch.maximum(*_promoted(a, b))),
    "mbarrier.arrive": _arrive,
    "mbarrier.expect": _expect,
    "mbarrier.init": _init,
    "mbarrier.wait": _wait,
    "min": _reduced(torch.amin),
    "mma_v2": lambda a, b, acc: Value(acc.t + _factor(a.t) @ _factor(b.t)),
    "minimum": lambda a, b: Value(torch.minimum(*_promoted(a, b))),
    "multiple_of": lambda x, n: x,
    "num_programs": _num_programs,
    "num_warps": lambda: _role().warps,
    "permute": lambda x, order: Value(x.t.permute(*order)),
    "pointer_type": lambda dtype: dtype,
    "program_id": _program_id,
    "reinterpret": _reinterpret,
    "reshape": lambda x, shape: Value(x.t.reshape(list(shape))),
    "split": lambda x: (Value(x.t[..., 0]), Value(x.t[..., 1])),
    "static_range": range,
    "store": _store,
    "sum": _reduced(torch.sum),
    "thread_barrier": lambda: None,
    "to_tensor": lambda x: x,
    "tma.async_copy_global_to_shared": _load_box,
    "tma.async_load": _load_box,
    "warp_specialize": _warp_specialize,
    "warpgroup_mma": _mma,
    "warpgroup_mma_wait": _mma_wait,
    "where": _where,
    "zeros": lambda shape, dtype, layout=None: Value(torch.zeros(shape, dtype=dtype)),
}
_LAYOUTS = gl._layouts.DistributedLayout, gl._layouts.SharedLayout
_ANNOTATED = {"int32": torch.int32, "int64": torch.int64, "float32": torch.float32}
_BUILTINS = {"range": _range, "len": len, "max": max, "min": min, "float": float}


def _emulated(called: Any) -> Callable[..., Any]:
    name = called.__name__.lstrip("_")
    file = called.__module__.rpartition(".")[2]
    if file in ("mbarrier", "tma", "async_copy"):
        name = f"{file}.{name}"
    if name not in _CALLS:
        raise NotEmulated(f"{called.__module__}.{called.__name__}")
    return _CALLS[name]


class _Names:
    """A module of kernels or of Triton, as the emulated kernel sees it."""

    def __init__(self, emulation: Emulation, module: ModuleType) -> None:
        self._emulation, self._module = emulation, module

    def __getattr__(self, name: str) -> Any:
        return self._emulation.translated(f"{self._module.__name__}.{name}", getattr(self._module, name))


class Emulation:
    """Runs launches on the CPU.

    Args:
        seed: Of the order in which roles run.
        edit: Changes the source of every function before it runs, to see that a fault is found.
    """

    def __init__(self, seed: int = 0, edit: Callable[[str], str] = lambda source: source) -> None:
        self.random = random.Random(seed)
        self.launched: list[str] = []  # the file of each kernel
        self._edit = edit
        self._functions: dict[Any, Callable[..., Any]] = {}
        self._written: dict[int, Tensor] = {}
        self._kept: list[Tensor] = []  # their storages are not used again for others

    def __call__(self, launch: Launch) -> None:
        """Run a launch, one program after the other."""
        self.launched.append(launch.kernel.fn.__module__.rpartition(".")[2])
        given: list[Any] = []
        for parameter in launch.kernel.params:
            value = launch.arguments[parameter.name]
            if isinstance(value, Tensor):
                given.append(Pointer(value, torch.tensor(0)))
            elif isinstance(value, TensorDescriptor):
                given.append(Boxes(value))
            elif parameter.is_constexpr or value is None:
                given.append(value)
            else:
                number = _tensor(value)
                given.append(Value(number.to(_ANNOTATED.get(parameter.annotation[3:], number.dtype))))
        kernel = self.function(launch.kernel)
        for place in itertools.product(*(range(n) for n in reversed(launch.grid))):
            Program(self, launch, place[::-1]).run(kernel, given)

    def written(self, t: Tensor) -> Tensor:
        """How often each element of a tensor was written."""
        counts = self._written.get(t.untyped_storage()._cdata)
        if counts is None:
            return torch.zeros(t.shape, dtype=torch.int32)
        return counts.as_strided(t.shape, t.stride(), t.storage_offset())

    def _count(self, t: Tensor, at: Tensor) -> None:
        storage = t.untyped_storage()
        if storage._cdata not in self._written:
            self._written[storage._cdata] = torch.zeros(storage.nbytes() // t.itemsize, dtype=torch.int32)
            self._kept.append(t)
        counts = self._written[storage._cdata]
        counts += torch.bincount((at + int(t.storage_offset())).flatten(), minlength=len(counts))

    def function(self, jit: Any) -> Callable[..., Any]:
        """A kernel, or a function of one, as a function of Python."""
        if jit not in self._functions:
            lines, first = inspect.getsourcelines(jit.fn)
            tree = ast.parse(self._edit(textwrap.dedent("".join(lines))))
            (made,) = tree.body
            assert isinstance(made, ast.FunctionDef)
            made.decorator_list = []
            ast.increment_lineno(tree, first - 1)
            names: dict[str, Any] = {"__builtins__": _BUILTINS}
            # With this file's `from __future__ import annotations`: theirs are not evaluated.
            exec(compile(tree, jit.fn.__code__.co_filename, "exec"), names)
            function: Callable[..., Any] = names[made.name]
            for used in dis.get_instructions(function.__code__):
                if used.opname == "LOAD_GLOBAL" and used.argval in jit.fn.__globals__:
                    names[used.argval] = self.translated(used.argval, jit.fn.__globals__[used.argval])
            self._functions[jit] = function
        return self._functions[jit]

    def translated(self, name: str, value: Any) -> Any:
        """What a name of a kernel's file stands for."""
        if isinstance(value, tl.constexpr):
            return self.translated(name, value.value)
        if value is None or isinstance(value, (bool, int, float, str, *_LAYOUTS)):
            return value
        if isinstance(value, tl.dtype):
            if value.name not in _DTYPES:
                raise NotEmulated(f"the type {value.name}")
            return _DTYPES[value.name]
        if isinstance(value, type) and issubclass(value, _LAYOUTS):
            return value
        if isinstance(value, ModuleType):
            return _Names(self, value)
        if callable(value) and value.__module__.startswith("triton."):
            return _emulated(value)
        if isinstance(value, JITFunction):
            return self.function(value)
        if isinstance(value, ConstexprFunction):
            return value.fn  # of constants only, a layout for example
        raise NotEmulated(f"{name}, which is {value!r}")
