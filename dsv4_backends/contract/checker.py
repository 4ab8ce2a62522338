"""The check of a call's arguments: straight-line source that is generated from a contract's table of arguments.

``python -m dsv4_backends.contract OP`` prints it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import linecache
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeGuard

from ..errors import ContractError, DSV4Error
from .arguments import Form, ScalarArg, TensorArg

if TYPE_CHECKING:
    import torch

    from .spec import OpContract


def check(contract: OpContract) -> Callable[..., torch.device]:
    """``OpContract.check``."""
    function: Callable[..., torch.device] = checked_function(contract, (), (_device(contract),), {})
    return function


def check_source(contract: OpContract) -> str:
    """The source of ``OpContract.check``; a public call runs the same lines."""
    return _Checker(contract, (), (_device(contract),), "").source


def _device(contract: OpContract) -> str:
    return f"return {next(name for name, arg in contract.args.items() if isinstance(arg, TensorArg))}.device"


def checked_function(
    contract: OpContract,
    before: Sequence[str],
    after: Sequence[str],
    namespace: Mapping[str, Any],
    foreign: str = "",
    *,
    what: str = "check",
) -> Callable[..., Any]:
    """A function with the contract's signature whose body is ``before``, the check, then ``after``.

    ``before`` and ``after`` are source lines, since a function call would cost as much as the check. ``foreign`` is a
    line for calls with tensors of another class, or under a dispatch mode of PyTorch; without it they are checked like
    others. ``what`` is the function's name in stack traces.

    ``after`` can use the arguments by name, and ``where`` and ``guard``. ``where`` is a key for the device: the index
    of a GPU, else the ``torch.device``. ``guard`` is the matching guard, or None; calls with equal dtypes, shapes,
    strides, devices and numbers share one.
    """
    import torch

    def wrong(argument: str, value: object, names: Mapping[str, Any]) -> ContractError:
        return ContractError(_describe(contract, argument, value, names))

    def explain(error: Exception, names: Mapping[str, Any]) -> Exception:
        if isinstance(error, DSV4Error):
            return error
        for name, arg in contract.args.items():
            if isinstance(arg, TensorArg) and not _may_be(contract, name, names[name]):
                return wrong(name, names[name], names)
        return error

    def broken(index: int, names: Mapping[str, Any]) -> ContractError:
        rule = contract.rules[index]
        named = set(re.findall(r"\w+", rule.expression))
        sizes = ", ".join(f"{k} {v}" for k, v in names.items() if isinstance(v, int) and k in named)
        got = f", got {sizes}" if sizes else ""
        return ContractError(f"{contract.name}: argument {rule.argument}: expected {rule.expected}{got}")

    def number(argument: str, names: Mapping[str, Any]) -> int | float:
        arg = contract.args[argument]
        assert isinstance(arg, ScalarArg)
        made = _number(names[argument], arg.kind)
        if made is None:
            raise wrong(argument, names[argument], names)
        return made

    source = _Checker(contract, before, after, foreign).source
    filename = f"<{what} of {contract.name}>"
    # A traceback and a debugger can then show the generated lines.
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    scope: dict[str, Any] = {"torch": torch, "Tensor": torch.Tensor, "wrong": wrong, "broken": broken}
    seen = _Seen()
    scope |= {"explain": explain, "seen": seen.signatures, "remember": seen.remember, "number": number}
    scope |= {"grad_on": torch.is_grad_enabled, "strided": torch.strided, "usual": _usual()}
    scope |= {"modes": _dispatch_modes(), "transforms": _transforms(), "forward_ad": forward_ad()}
    for ask in (is_foreign, not_nested, not_transformed, needs_no_grad, needs_no_tangent, own_memory):
        scope[ask.__name__] = functools.partial(ask, contract)
    # Each replaces one argument that is None. Complex64 is a dtype of no contract.
    optional = [name for name in contract.args if contract.is_optional(name)]
    scope |= {f"no_{name}": torch.empty((), dtype=torch.complex64, device="cpu") for name in optional}
    scope["ceil"] = lambda a, b: -(-a // b)
    scope |= {f"torch_{dtype}": getattr(torch, dtype) for dtype in _DTYPES} | dict(namespace)
    exec(compile(source, filename, "exec"), scope)
    function: Callable[..., Any] = scope[contract.name]
    return function


class _Seen:
    """The guards of recent calls that passed the check.

    A check is a pure function of the types, dtypes, shapes, strides and devices of a call's tensors, and of its
    numbers. PyTorch's ``TensorGuards`` compare the tensors in one call, at a tenth of the cost of reading them from
    Python; ``torch.compile`` uses them to see that a compiled graph is valid for a call. The class is private to
    PyTorch. If it is missing, every call runs the whole check.
    """

    SIZE = 4
    """Guards kept: a model alternates between layers of two or three kinds."""

    def __init__(self) -> None:
        self.signatures: list[tuple[Callable[..., bool], tuple[Any, ...]]] = []
        self.last: tuple[object, ...] = ()
        self.guards = _tensor_guards()

    def remember(self, numbers: tuple[Any, ...], *tensors: Any) -> Callable[..., bool] | None:
        """Called after a call that passed. Making a guard is expensive, so it is made at the second call of a shape."""
        made = None
        shape = (numbers, *(tensor.shape for tensor in tensors))
        # A guard never matches a call that passes one tensor twice.
        distinct = len({id(tensor) for tensor in tensors}) == len(tensors)
        if shape == self.last and distinct and self.guards is not None:
            sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
            made = self.guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
            if any(tensor.requires_grad for tensor in tensors):
                made = _without_grad_mode(made)
            self.signatures.insert(0, (made, numbers))
            del self.signatures[self.SIZE :]
        self.last = shape
        return made


def _without_grad_mode(check: Callable[..., bool]) -> Callable[..., bool]:
    """A guard compares ``requires_grad`` but not grad mode: it may match only while grad mode is off."""
    import torch

    return lambda *tensors: not torch.is_grad_enabled() and check(*tensors)


def _tensor_guards() -> Any:
    """PyTorch's ``TensorGuards``, or None if it is missing or does not do what ``_Seen`` needs."""
    import torch

    try:
        guards: Any = importlib.import_module("torch._C._dynamo.guards").TensorGuards
        # The caller's settings must not change the trial.
        with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
            x, y = (torch.empty(2, 3, dtype=torch.float32) for _ in range(2))
            guard = guards(x, dynamic_dims_sizes=[[2, 3]], dynamic_dims_strides=[[3, 1]])
            others = (x.new_empty(3, 2), x.new_empty(3, 2).T, x.double(), x.to("meta"), x[0], None)
            usable = guard.check(y) and not any(guard.check(other) for other in others)
            usable = usable and not guard.check(y.requires_grad_())
    except Exception:  # it is private and may change: calls are then checked in full
        return None
    return guards if usable else None


_INT_MAX = 2**31 - 1
_FLOAT_MAX = (2 - 2.0**-23) * 2.0**127


def _number(value: Any, kind: str) -> int | float | None:
    """The value as a Python number of a ``ScalarArg``'s kind; None if it is not one."""
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        value = value.item()  # a bool stays one
    if kind == "bool":
        return value if isinstance(value, bool) else None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    if kind == "int":
        return int(value) if isinstance(value, numbers.Integral) else None
    try:
        return float(value)
    except OverflowError:
        return float("inf")


def _shown(value: object) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 2**128 else f"an int of {value.bit_length()} bits"
    return text if len(text) <= 200 else f"{text[:200]}..."


@functools.cache
def _usual() -> frozenset[type]:
    """The common types of arguments, exactly: another subclass may redefine every operation."""
    import torch

    return frozenset({torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, type(None)})


def _is_plain(value: object) -> TypeGuard[torch.Tensor]:
    import torch

    return isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_nested


def _dispatch_modes() -> Callable[[], int]:
    """A function that returns the number of active dispatch modes, such as FakeTensorMode."""
    import torch

    return getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)


def _transforms() -> Callable[[], Any]:
    """A function that returns None if no transform of ``torch.func`` is active."""
    import torch

    return getattr(torch._C._functorch, "peek_interpreter_stack", lambda: None)


def not_nested(contract: OpContract, names: Mapping[str, Any]) -> None:
    """Raise for the argument that is a nested tensor."""
    for name, arg in contract.args.items():
        if isinstance(arg, TensorArg) and names[name] is not None and names[name].is_nested:
            raise ContractError(_describe(contract, name, names[name], names))


def needs_no_grad(contract: OpContract, names: Mapping[str, Any]) -> None:
    """Raise for the argument that requires grad: the ops have no backward, and no provider detaches silently."""
    import torch

    for name in contract.args:
        if isinstance(value := names[name], torch.Tensor) and value.requires_grad:
            hint = "the op has no backward: call it under torch.no_grad() or torch.inference_mode(), or pass"
            raise ContractError(f"{contract.name}: argument {name}: requires grad, and {hint} {name}.detach()")


def forward_ad() -> Any:
    """A namespace with ``_current_level``, which is at least 0 within a ``dual_level`` of PyTorch."""
    from torch.autograd import forward_ad

    # It is private: without it, every call is inspected.
    return forward_ad if hasattr(forward_ad, "_current_level") else SimpleNamespace(_current_level=0)


def needs_no_tangent(contract: OpContract, names: Mapping[str, Any]) -> None:
    """Raise for the argument that is a dual tensor of forward-mode AD: its tangent would be dropped silently.

    Inference mode turns forward-mode AD off: the tangent is then None.
    """
    import torch
    from torch.autograd.forward_ad import unpack_dual

    for name in contract.args:
        value = names[name]
        if not isinstance(value, torch.Tensor) or torch._C._functorch.is_functorch_wrapped_tensor(value):
            continue
        if unpack_dual(value).tangent is not None:
            hint = "the op has no derivative: call it under torch.inference_mode(), or pass"
            raise ContractError(
                f"{contract.name}: argument {name}: is a dual tensor, and {hint} forward_ad.unpack_dual({name}).primal"
            )


def not_transformed(contract: OpContract, names: Mapping[str, Any]) -> None:
    """Raise for an argument that a transform of ``torch.func`` has wrapped."""
    import torch

    for name in contract.args:
        value = names[name]
        if isinstance(value, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value):
            kind = "vmap" if torch._C._functorch.is_batchedtensor(value) else "a transform"
            raise ContractError(transformed(contract, name, kind))


def transformed(contract: OpContract, argument: str, kind: str) -> str:
    outside = "outside, with the dimension as part of the batch" if kind == "vmap" else "outside the transform"
    hint = f"the op has no rule for it: call it {outside}"
    return f"{contract.name}: argument {argument}: comes from {kind} of torch.func, and {hint}"


def is_foreign(contract: OpContract, names: Mapping[str, Any]) -> bool:
    """Whether PyTorch's dispatcher has to see a call: a tensor is of a subclass, or a dispatch mode is active.

    Sizes may then be symbols. So only ranks are checked, and that FakeTensors are not mixed with tensors with values.
    """
    import torch
    from torch._subclasses import FakeTensor

    tensors = {name: names[name] for name, arg in contract.args.items() if isinstance(arg, TensorArg)}
    if _dispatch_modes()() == 0 and not any(
        isinstance(value, torch.Tensor) and type(value) not in _usual() for value in tensors.values()
    ):
        return False
    fakes = [value for value in tensors.values() if isinstance(value, FakeTensor)]
    mixed = bool(fakes) and not fakes[0].fake_mode.allow_non_fake_inputs
    for name, value in tensors.items():
        if not _may_be(contract, name, value):
            raise ContractError(_describe(contract, name, value, names))
        if mixed and value is not None and not isinstance(value, FakeTensor):
            expected = "expected a FakeTensor, as others of this call are"
            raise ContractError(f"{contract.name}: argument {name}: {expected}, got a tensor with values")
    return True


def _may_be(contract: OpContract, argument: str, value: object) -> bool:
    """Whether a value is a tensor with one of an argument's ranks, or None for an optional argument."""
    arg = contract.args[argument]
    assert isinstance(arg, TensorArg)
    if value is None:
        return contract.is_optional(argument)
    return _is_plain(value) and any(value.dim() == len(form.dims) for form in arg.forms)


def overlaps_itself(x: torch.Tensor) -> bool:
    """Whether two elements of x may share an address, by sizes and strides."""
    reach = 1
    for stride, size in sorted((s, n) for n, s in zip(x.shape, x.stride(), strict=True) if n > 1):
        if stride < reach:
            return x.numel() > 0
        reach = stride * (size - 1) + reach
    return False


def _is_paged(arg: TensorArg | ScalarArg | None) -> bool:
    return isinstance(arg, TensorArg) and arg.layout == "page"


def own_memory(contract: OpContract, buffer: str, names: Mapping[str, Any]) -> None:
    """Raise if a result buffer overlaps itself or, as far as addresses show, another argument.

    Paged arguments may share a pool: an engine keeps caches of several kinds in one, each with its own pages.
    """
    out = names[buffer]
    start = out.data_ptr() if type(out) in _usual() and not out.is_meta else 0
    if not (dense := out.is_contiguous()) and overlaps_itself(out):
        hint = f"expected rows that do not overlap, got {list(out.shape)} with strides {list(out.stride())}"
        raise ContractError(f"{contract.name}: argument {buffer}: {hint}")
    if start == 0:  # a tensor without memory
        return
    end = start + out.nbytes
    for name, arg in contract.args.items():
        other = names[name]
        if name == buffer or other is None or isinstance(arg, ScalarArg) or (there := other.data_ptr()) == 0:
            continue
        if arg.layout == "page" and _is_paged(contract.args.get(buffer)):
            continue
        # A tensor may lie in the gaps of another without overlapping it.
        if there == start or (dense and there < end and start < there + other.nbytes and other.is_contiguous()):
            raise ContractError(
                f"{contract.name}: argument {buffer}: expected memory of its own, shares that of {name}"
            )


_DTYPES = (
    "bfloat16",
    "float32",
    "int32",
    "int64",
    "uint8",
    "int8",
    "float8_e4m3fn",
    "float8_e8m0fnu",
)


class _Checker:
    """Writes the source of a contract's check: straight-line code, since it runs before every call."""

    def __init__(self, contract: OpContract, before: Sequence[str], after: Sequence[str], foreign: str) -> None:
        self.contract = contract
        self.bound: set[str] = set()
        self.lines: list[str] = []
        parameters = contract.signature.parameters.values()
        # Annotations are dropped: their names do not exist in the generated namespace.
        bare = inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters])
        self.emit(0, f"def {contract.name}{bare}:")
        for line in before:
            self.emit(1, line)
        self.emit(1, "try:")
        first = next(name for name, arg in contract.args.items() if isinstance(arg, TensorArg))
        # Numbers first: shapes may depend on them.
        scalars = {name: arg for name, arg in contract.args.items() if isinstance(arg, ScalarArg)}
        for name, scalar in scalars.items():
            given = f"{name} is not None and " if contract.is_optional(name) else ""
            self.emit(2, f"if {given}type({name}) is not {scalar.kind}: {name} = number({name!r}, locals())")
        # A CUDA index is cheaper to read, compare and look up than a device, and every call does this.
        self.emit(2, f"on_gpu = {first}.is_cuda; where = {first}.get_device() if on_gpu else {first}.device")
        # A guard goes with the numbers: an int may decide shapes, and a provider may refuse any number.
        tensors = {name: arg for name, arg in contract.args.items() if isinstance(arg, TensorArg)}
        passed = [f"{n} if {n} is not None else no_{n}" if contract.is_optional(n) else n for n in tensors]
        numbers = f"({', '.join(scalars)},)" if scalars else "()"
        # A guard that gets a nested tensor ends the process.
        nested = [
            f"({n} is not None and {n}.is_nested)" if contract.is_optional(n) else f"{n}.is_nested" for n in tensors
        ]
        self.emit(2, f"if {' or '.join(nested)}: not_nested(locals())")
        # A guard accepts dual tensors. This comparison costs 0.03 us.
        self.emit(2, "if forward_ad._current_level >= 0: needs_no_tangent(locals())")
        self.emit(2, "for guard, numbers in seen:")
        self.emit(3, f"if guard({', '.join(passed)})" + (f" and numbers == {numbers}: break" if scalars else ": break"))
        self.emit(2, "else:")
        # From here on only for calls that match no guard.
        for name, scalar in scalars.items():
            self.bounds(name, scalar, contract.is_optional(name))
        if foreign:
            kinds = f"not {{{', '.join(f'type({name})' for name in tensors)}}} <= usual"
            self.emit(3, f"if ({kinds} or modes()) and is_foreign(locals()): on = True; {foreign}")
        self.emit(3, "if transforms() is not None: not_transformed(locals())")
        differentiable = [
            f"({n} is not None and {n}.requires_grad)" if contract.is_optional(n) else f"{n}.requires_grad"
            for n, arg in tensors.items()
            if any("float" in form.dtypes for form in arg.forms)
        ]
        self.emit(3, f"if grad_on() and ({' or '.join(differentiable)}): needs_no_grad(locals())")
        vectors = [name for name, arg in tensors.items() if arg.layout == "vector"]
        if vectors:
            self.emit(3, "copy = False")
        for name, arg in contract.args.items():
            if isinstance(arg, TensorArg):
                self.tensor(name, arg, contract.is_optional(name), is_first=name == first)
            for index, rule in enumerate(contract.rules):
                if rule.argument == name:  # here, so that the error names this argument and not a later one
                    self.emit(3, f"if not ({rule.expression}): raise broken({index}, locals())")
        for name in contract.buffers:
            self.emit(3, f"if {name} is not None: own_memory({name!r}, locals())")
        if vectors:  # again with the copies; that call usually matches a guard
            call = {name: name for name in contract.args}
            for name in vectors:
                call[name] = f"{name}.contiguous()"
                if contract.is_optional(name):
                    call[name] += f" if {name} is not None else None"
            again = ", ".join(f"{n}={v}" if contract.is_keyword(n) else v for n, v in call.items())
            self.emit(3, f"if copy: on = True; return {contract.name}({again})")
        self.emit(3, f"guard = remember({numbers}, {', '.join(passed)})")
        # A list, a None or a tensor of other dimensions raises one of these. Testing for each would cost more.
        self.emit(1, "except (AttributeError, ValueError, RuntimeError, TypeError) as error:")
        self.emit(2, "if 'on' in locals(): raise")  # raised after the check
        self.emit(2, "raise explain(error, locals()) from None")
        for line in after:
            self.emit(1, line)

    @property
    def source(self) -> str:
        return "\n".join(self.lines) + "\n"

    def emit(self, depth: int, line: str) -> None:
        self.lines.append("    " * depth + line)

    def bounds(self, name: str, arg: ScalarArg, optional: bool) -> None:
        if arg.kind == "bool":
            return
        low, high = (-_FLOAT_MAX, _FLOAT_MAX) if arg.kind == "float" else (arg.minimum or 0, _INT_MAX)
        guard = f"{name} is not None and " if optional else ""
        self.emit(3, f"if {guard}not {low!r} <= {name} <= {high!r}: raise wrong({name!r}, {name}, locals())")

    def tensor(self, name: str, arg: TensorArg, optional: bool, *, is_first: bool) -> None:
        depth = 3
        if optional:
            self.emit(depth, f"if {name} is not None:")
            depth += 1
        elsewhere = f"({name}.get_device() if on_gpu else {name}.device) != where"
        failure = f"raise wrong({name!r}, {name}, locals())"
        if len(arg.forms) == 1 and len(arg.forms[0].dims) == 1 and self._known(arg.forms[0]) and arg.layout == "vector":
            # One condition is enough.
            (size,) = arg.forms[0].dims
            others = " and ".join(f"{name}.dtype is not torch_{dtype}" for dtype in arg.forms[0].dtypes.split())
            test = f"{others} or {name}.shape != ({size},) or {elsewhere}"
            self.emit(depth, f"if {test} or {name}.layout is not strided: {failure}")
            self.emit(depth, f"if not {name}.is_contiguous(): copy = True")
            return
        self.emit(depth, f"if {name}.layout is not strided: {failure}")
        self.emit(depth, f"_dtype = {name}.dtype; _shape = {name}.shape")
        new: set[str] = set()
        for index, form in enumerate(arg.forms):
            # If all sizes are bound, they select the form: forms of one rank differ in nothing else.
            dtypes = " or ".join(f"_dtype is torch_{dtype}" for dtype in form.dtypes.split())
            known = self._known(form)
            shape = self._comparison(form) if known else f"len(_shape) == {len(form.dims)}"
            condition = " and ".join(filter(None, (f"({dtypes})" if " or " in dtypes else dtypes, shape, form.when)))
            if len(arg.forms) == 1:
                # Unpacking the sizes finds a wrong number of dimensions.
                self.emit(depth, f"if not ({condition if known else dtypes}): {failure}")
            else:
                self.emit(depth, f"{'if' if index == 0 else 'elif'} {condition}:")
            inner = depth + (len(arg.forms) > 1)
            if known:
                if inner > depth:
                    self.emit(inner, "pass")
            else:
                self._bind(inner, form, failure, new)
        if len(arg.forms) > 1:
            self.emit(depth, f"else: {failure}")
        self.bound |= new
        if not is_first:
            self.emit(depth, f"if {elsewhere}: {failure}")
        if arg.layout in ("last", "vector"):
            scattered = f"not {name}.is_contiguous() and {name}.stride()[-1] != 1 and _shape[-1] > 1"
            self.emit(depth, f"if {scattered}: {failure if arg.layout == 'last' else 'copy = True'}")
        elif arg.layout == "page":  # pages are usually padded, so the strides are needed
            self.emit(depth, f"_stride = {name}.stride()")
            scattered = "_stride[-1] != 1 or (_stride[1] != _shape[-1] and _shape[1] > 1)"
            self.emit(depth, f"if {scattered}: {failure}")

    def _known(self, form: Form) -> bool:
        return all(not dim.isidentifier() or dim in self.bound or self._is_scalar(dim) for dim in form.dims)

    def _is_scalar(self, name: str) -> bool:
        return isinstance(self.contract.args.get(name), ScalarArg)

    def _comparison(self, form: Form) -> str:
        return f"_shape == ({', '.join(form.dims)}{',' if len(form.dims) == 1 else ''})"

    def _bind(self, depth: int, form: Form, failure: str, new: set[str]) -> None:
        targets, tests, seen = [], [], set()
        for index, dim in enumerate(form.dims):
            if dim.isidentifier() and dim not in self.bound and not self._is_scalar(dim) and dim not in seen:
                targets.append(dim)
                seen.add(dim)
            else:
                targets.append(f"_{index}")
                tests.append(f"_{index} != {dim}")
        self.emit(depth, f"{', '.join(targets)}, = _shape")
        if tests:
            self.emit(depth, f"if {' or '.join(tests)}: {failure}")
        new |= seen

    # `locals()` in the failures passes the sizes that were bound so far to the message.


def _describe(contract: OpContract, argument: str, value: object, names: Mapping[str, Any]) -> str:
    """The text of a ContractError for one argument."""
    import torch

    arg = contract.args[argument]
    if isinstance(arg, ScalarArg):
        bound = "" if arg.minimum is None else f" of at least {arg.minimum}"
        expected = {"int": "an int", "float": "a number", "bool": "True or False"}[arg.kind] + bound
        if isinstance(value, torch.Tensor):
            got = f"a tensor {list(value.shape)}, whose value a call would have to wait for: pass {argument}.item()"
        elif (number := _number(value, arg.kind)) is None or (arg.kind == "int" and number < (arg.minimum or 0)):
            got = _shown(value)
        else:
            expected = f"an int of at most {_INT_MAX}" if arg.kind == "int" else "a number that is finite in fp32"
            got = _shown(value)
        return f"{contract.name}: argument {argument}: expected {expected}, got {got}"

    def size(dim: str) -> str:
        known = {k: v for k, v in names.items() if isinstance(v, int) and not k.startswith("_")}
        if dim.isdigit():
            return dim
        try:
            number = eval(dim, {"ceil": lambda a, b: -(-a // b), "__builtins__": {}}, known)
        except NameError:
            return dim
        return f"{dim}={number}"

    forms = " or ".join(f"{form.dtypes.replace(' ', '/')} [{', '.join(map(size, form.dims))}]" for form in arg.forms)
    first = next(name for name, a in contract.args.items() if isinstance(a, TensorArg))
    device = getattr(names.get(first), "device", None)
    where = f" on {device}" if device is not None and argument != first else ""
    layout = {
        "last": ", last dimension contiguous",
        "page": ", contiguous within a page",
        "any": "",
        "vector": "",
    }[arg.layout]
    if not isinstance(value, torch.Tensor):
        return f"{contract.name}: argument {argument}: expected a tensor {forms}, got {type(value).__name__}"
    dtype = str(value.dtype).removeprefix("torch.")
    if not _is_plain(value):
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.").lstrip("_")
        return (
            f"{contract.name}: argument {argument}: expected a strided tensor {forms}{where}, got a {kind} one, {dtype}"
        )
    return (
        f"{contract.name}: argument {argument}: expected {forms}{where}{layout}, "
        f"got {dtype} {list(value.shape)} with strides {list(value.stride())} on {value.device}"
    )
