"""Short launches: which compiled kernel is launched, and how. Triton compiles for a GPU that is not there, and the
driver's launcher notes what it is called with."""

from __future__ import annotations

import functools
import gc
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import traffic as serving
import triton
import triton.language as tl
from compile_matrix import NoGpu
from dsv4_backend_triton import ahead
from dsv4_backend_triton.arch import arch_from_capability
from dsv4_backend_triton.launch import launch_kernel
from packaging.version import Version
from traffic import Limits
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia import hopper
from triton.tools.tensor_descriptor import TensorDescriptor

from dsv4_backends import OPS
from dsv4_backends.contract.models import FLASH
from dsv4_backends.runtime import launching

FLAT = triton.__version__.startswith("3.6.")


class CudaLauncher:
    """In place of Triton's, whose C code needs a GPU's driver. Both of its forms note what is launched."""

    noted: list[tuple[str, Any, tuple[Any, ...]]] = []
    """How (by Triton or directly), the launcher of the compiled kernel, and grid, stream and arguments."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.global_scratch_size, self.profile_scratch_size = metadata.global_scratch_size, 0
        self.launch_cooperative_grid, self.launch_pdl = metadata.launch_cooperative_grid, metadata.launch_pdl
        self.arg_annotations, self.kernel_signature = "annotations", "signature"

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
        _, of_launch, enter, leave, *args = rest
        self.noted.append(("triton", self, ((x, y, z), stream, *args)))
        for hook in (enter, leave):
            if hook is not None:
                hook(of_launch)

    def launch(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
        how, nothing, metadata = (7, self.launch_cooperative_grid, self.launch_pdl), (None, None), (4, 1, 0)
        if FLAT:
            fixed: tuple[Any, ...] = (*how, *nothing, rest[5], None, None, None)
            args = rest[len(fixed) :]
        else:
            fixed = (*how, rest[3], None, None, None, *nothing, "annotations", "signature")
            (args,) = rest[len(fixed) :]
        assert rest[: len(fixed)] == fixed
        assert len(rest[5 if FLAT else 3]) == len(metadata)
        self.noted.append(("direct", self, ((x, y, z), stream, *args)))


class Driver(NoGpu):
    """Of as many GPUs as are asked for, all of capability 9.0."""

    launcher_cls: Any = CudaLauncher
    current = 0

    class utils:  # noqa: N801
        unload_module = staticmethod(lambda module: None)

        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": 227 << 10}

        @staticmethod
        def load_binary(*args: Any) -> tuple[int, ...]:
            return 1, 7, 32, 0, 1024  # module, function, registers, spilled, threads

    def get_current_device(self) -> int:
        return self.current

    def get_current_stream(self, device: int) -> int:
        return 70 + device


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    made = Driver(90)
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    monkeypatch.setattr(triton.runtime.driver, "_active", made)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 70 + device, raising=False)
    monkeypatch.setattr(CudaLauncher, "noted", [])
    for name in ("_forms", "_compiled"):
        monkeypatch.setattr(launching, name, {})
    launching._parts.cache_clear()
    yield made
    launching._parts.cache_clear()
    for kernel in KERNELS:  # unloaded while the driver is here
        kernel.device_caches.clear()
    for kept in (KERNELS, launching._forms, launching._compiled, CudaLauncher.noted):
        kept.clear()  # type: ignore[attr-defined]
    gc.collect()


KERNELS: list[Any] = []


def _kernel(fn: Any, kind: Any = triton.JITFunction, **options: Any) -> Any:
    """Compiled anew in every test."""
    KERNELS.append(kind(fn, **options))
    return KERNELS[-1]


def _body(x, y, z, maps, n, wide: tl.int64, flag, scale, what: tl.constexpr = 1, kind: tl.constexpr = tl.float32):
    tl.store(x, n)
    tl.store(y, scale)
    tl.store(z, wide)


def _of_tuple(x, n, what: tl.constexpr):
    tl.store(x, n)


def _in_gluon(x, y, z, maps, n, wide: tl.int64, flag, scale, what: tl.constexpr = 1, kind: tl.constexpr = tl.float32):
    gl.store(x, n)


def full(of: Callable[..., Any] = _body) -> Any:
    kind = GluonJITFunction if of is _in_gluon else triton.JITFunction
    numbers = ["n", "wide", "flag", "scale"]
    return _kernel(of, kind, do_not_specialize=numbers, do_not_specialize_on_alignment=["z"])


X = torch.zeros(64, dtype=torch.int32)
F = torch.zeros(64)
BASE: dict[str, Any] = {"args": (X, F, X, None, 5, 5, 1, 0.5), "options": {"what": 1, "num_warps": 4}}


def _call(at: int = -1, value: Any = None, **options: Any) -> dict[str, Any]:
    args = list(BASE["args"])
    if at >= 0:
        args[at] = value
    return {"args": tuple(args), "options": BASE["options"] | options}


@triton.jit
def _given(x):
    return x


def _map(dtype: torch.dtype = torch.bfloat16, block: int = 32) -> TensorDescriptor:
    return TensorDescriptor(torch.zeros(64, 64, dtype=dtype), [64, 64], [64, 1], [block, 32])


def _gluon_map(swizzle: int) -> Any:
    layout = NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=16, rank=2)
    return hopper.TensorDescriptor(torch.zeros(64, 64, dtype=torch.bfloat16), [64, 64], [64, 1], [32, 64], layout)


CALLS = {
    "as it is": _call(),
    "another dtype": _call(0, X.to(torch.int64)),
    "another tensor": _call(0, torch.ones(7, dtype=torch.int32)),
    "misaligned": _call(0, X[1:]),
    "another one misaligned": _call(1, F[1:]),
    "misaligned, of any alignment": _call(2, X[1:]),
    "another number": _call(4, 16),
    "the least of 32 bits": _call(4, -(2**31)),
    "64 bits": _call(4, 2**31),
    "negative, of 64 bits": _call(4, -(2**31) - 1),
    "more than 63 bits": _call(4, 2**63),
    "64 bits, declared": _call(5, 2**40),
    "a bool": _call(6, True),
    "a float": _call(6, 1.0),
    "an int for a float": _call(7, 1),
    "None": _call(1, None) | {"args": (X, F, X, None, 5, 5, None, 0.5)},
    "a map": _call(3, _map()),
    "a map of another dtype": _call(3, _map(torch.float16)),
    "a map of another box": _call(3, _map(block=16)),
    "a map of Gluon": _call(3, _gluon_map(64)),
    "a map of Gluon in another layout": _call(3, _gluon_map(128)),
    "another constant": _call(what=2),
    "a dtype": _call(kind=tl.bfloat16),
    "a tuple": _call(what=(1, 2)),
    "another tuple": _call(what=(1, 3)),
    "no constant": _call(what=None),
    "a function": _call(what=_given),
    "a layout, in Gluon": _call(what=NVMMASharedLayout(128, 16)),
    "another layout, in Gluon": _call(what=NVMMASharedLayout(64, 16)),
    "warps": _call(num_warps=8),
    "stages": _call(num_stages=1),
    "registers": _call(maxnreg=64),
    "early": _call(launch_pdl=True),
    "no fusion": _call(enable_fp_fusion=False),
}
BY_TRITON = {"64 bits", "negative, of 64 bits", "more than 63 bits"}
"""Which kernel these need is in the value."""


def _by_triton(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """The launcher of the kernel that Triton itself finds or compiles for these arguments."""
    return kernel.run(*args, grid=(1,), warmup=True, **options).run


def test_a_launch_is_of_the_kernel_that_triton_would_launch(driver: Driver) -> None:
    """In any order, on two devices: every direct launch is compared with the choice of Triton's own key."""
    kernels = {"Gluon": full(_in_gluon), "": full()}
    found: dict[tuple[str, int], Any] = {}
    order = random.Random(0)
    for turn in range(4):
        calls = [(name, device) for name in CALLS for device in (0, 1)]
        order.shuffle(calls)
        for name, driver.current in calls:
            kernel = next(kernel for kind, kernel in kernels.items() if kind in name)
            args, options = CALLS[name]["args"], CALLS[name]["options"]
            launching.launch_by_arguments(kernel, driver.current, (3, 2), args, options)
            how, launcher, (grid, stream, *given) = CudaLauncher.noted.pop()
            assert launcher is _by_triton(kernel, args, options), name
            assert (grid, stream) == ((3, 2, 1), 70 + driver.current)
            assert found.setdefault((name, driver.current), launcher) is launcher
            if turn:
                assert how == ("triton" if name in BY_TRITON else "direct"), name
            if how == "direct":
                addresses = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args]
                assert given == [*addresses, None, None], name
    assert not CudaLauncher.noted
    same = {"as it is", "another tensor", "misaligned, of any alignment", "another number", "the least of 32 bits"}
    same |= {"64 bits, declared"}
    assert len({id(found[name, 0]) for name in same}) == 1
    different = [found[name, device] for name in {*CALLS} - same | {"as it is"} for device in (0, 1)]
    # A number of 64 bits is signed, whatever it is.
    assert len({id(launcher) for launcher in different}) == len(different) - 2


@pytest.mark.parametrize(
    ("name", "other"), [("as it is", "misaligned"), ("as it is", "another dtype"), ("warps", "as it is")]
)
def test_a_key_that_lacks_something_is_found(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, name: str, other: str
) -> None:
    """The test above can fail: with one compiled kernel for everything, the second call gets that of the first."""

    class One(dict[Any, Any]):
        def get(self, key: Any, default: Any = None) -> Any:
            return next(iter(self.values()), default)

    kernel = full()
    launching.launch_by_arguments(kernel, 0, (1,), **CALLS[name])
    (form,) = launching._forms.values()
    form.compiled = One(form.compiled)
    launching.launch_by_arguments(kernel, 0, (1,), **CALLS[other])
    how, launcher, _ = CudaLauncher.noted.pop()
    assert (how, launcher is _by_triton(kernel, **CALLS[other])) == ("direct", False)


def test_a_width_that_is_not_looked_at_is_found(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_WIDE", 1 << 64)
    kernel = full()
    for name in ("as it is", "64 bits"):
        launching.launch_by_arguments(kernel, 0, (1,), **CALLS[name])
    how, launcher, _ = CudaLauncher.noted.pop()
    assert (how, launcher is _by_triton(kernel, **CALLS["64 bits"])) == ("direct", False)


def test_numbers_on_which_a_kernel_is_specialised_are_for_triton(driver: Driver) -> None:
    kernel = _kernel(_of_tuple)
    for n in (1, 16, 5, 1, 16, 5):
        launching.launch_by_arguments(kernel, 0, (1,), (X, n), {"what": 1})
        how, launcher, _ = CudaLauncher.noted.pop()
        assert (how, launcher) == ("triton", _by_triton(kernel, (X, n), {"what": 1}))


def test_constants_by_place_and_arguments_by_name(driver: Driver) -> None:
    kernel = _kernel(_of_tuple, do_not_specialize=["n"])
    for what in (1, 2, 1, 2, 1, 2):
        launching.launch_by_arguments(kernel, 0, (1,), (X, 3, what), {"num_warps": 4})
        assert CudaLauncher.noted[-1][1] is _by_triton(kernel, (X, 3, what), {"num_warps": 4})
    assert [how for how, *_ in CudaLauncher.noted] == ["triton"] * 2 + ["direct"] * 4
    for n in (3, 2**40, 3, 2**40):
        launching.launch_by_arguments(kernel, 0, (1,), (X,), {"n": n, "what": 1})
        how, launcher, _ = CudaLauncher.noted[-1]
        assert (how, launcher) == ("triton", _by_triton(kernel, (X,), {"n": n, "what": 1}))
    with pytest.raises(TypeError):
        launching.launch_by_arguments(kernel, 0, (1,), (X, 3, 1), {"what": 1})


def test_an_option_that_is_a_dictionary_is_for_triton(driver: Driver) -> None:
    kernel = full()
    for _ in range(2):
        args, options = BASE["args"], BASE["options"] | {"extern_libs": {}}
        launching.launch_by_arguments(kernel, 0, (1,), args, options)
        how, launcher, _ = CudaLauncher.noted.pop()
        assert (how, launcher) == ("triton", _by_triton(kernel, args, options))


LAUNCHERS: dict[str, Callable[[Any], None]] = {
    "by arguments": lambda kernel: launching.launch_by_arguments(kernel, 0, (1,), (X, 3), {"what": 4}),
    "short": lambda kernel: launching.launch(kernel, 0, (1, 1, 1), (X,), (3,), (4,)),
}
launchers = pytest.mark.parametrize("launch", LAUNCHERS.values(), ids=LAUNCHERS)


@pytest.fixture
def kernel(driver: Driver) -> Any:
    return _kernel(_of_tuple, do_not_specialize=["n"])


def _how(launch: Callable[[Any], None], kernel: Any) -> str:
    launch(kernel)
    how, _, (grid, stream, *given) = CudaLauncher.noted.pop()
    assert (grid, stream) == ((1, 1, 1), 70)
    assert given[:2] == [X.data_ptr() if how == "direct" else X, 3]
    return how


@launchers
@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_are_called(launch: Any, kernel: Any, hook: str) -> None:
    """Proton's, for one, which get the kernel's name."""
    assert [_how(launch, kernel) for _ in range(3)] == ["triton", "direct", "direct"]
    seen = []
    chain = getattr(triton.knobs.runtime, hook)
    called = lambda metadata: seen.append(metadata and metadata.get()["name"])  # noqa: E731
    chain.add(called)
    try:
        assert [_how(launch, kernel) for _ in range(2)] == ["triton", "triton"]
    finally:
        chain.remove(called)
    assert seen == ["_of_tuple"] * 2
    assert _how(launch, kernel) == "direct"


@launchers
def test_a_hook_in_place_of_the_chain_is_called(launch: Any, kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _how(launch, kernel)
    seen: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "launch_enter_hook", seen.append)
        assert _how(launch, kernel) == "triton"
    assert len(seen) == 1
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", None)
    assert _how(launch, kernel) == "direct"


@launchers
def test_a_hook_of_the_kernel_is_called(launch: Any, kernel: Any) -> None:
    assert [_how(launch, kernel) for _ in range(2)] == ["triton", "direct"]
    seen = []
    kernel.add_pre_run_hook(lambda *args, **options: seen.append(args))
    assert _how(launch, kernel) == "triton"
    assert len(seen) == 1


@launchers
def test_settings_that_triton_reads_at_a_launch_are_read(
    launch: Any, kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _how(launch, kernel)
    before = _by_triton(kernel, (X, 3), {"what": 4})
    with monkeypatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "debug", True)
        for _ in range(2):
            launch(kernel)
            how, launcher, _ = CudaLauncher.noted.pop()
            assert (how, launcher is before) == ("triton", False)
    assert _how(launch, kernel) == "direct"
    for settings, name in ((triton.knobs.compilation, "instrumentation_mode"), (triton.knobs.runtime, "nothing")):
        with monkeypatch.context() as patch:
            patch.setattr(settings, name, "some", raising=False)
            assert launching._observed(kernel) == (name != "nothing")


@launchers
def test_hooks_of_compilations_are_called_once(launch: Any, kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's monitor of compilations while serving."""
    seen: list[Any] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **info: seen.append(info["repr"]))
    for _ in range(3):
        _how(launch, kernel)
    assert len(seen) == 1
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **info: True)  # nothing is compiled then
    for _ in range(2):
        launching.launch_by_arguments(kernel, 0, (1,), (X, 3), {"what": 5})
    assert not CudaLauncher.noted


@launchers
@pytest.mark.parametrize("why", ["release", "scratch"])
def test_other_launchers_are_called_by_triton(
    launch: Any, kernel: Any, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """In other releases, and where a kernel needs memory of its own, but still without a look at the arguments."""
    if why == "release":
        monkeypatch.setattr(launching, "_KNOWN", ())
    else:
        own = CudaLauncher.__init__
        monkeypatch.setattr(CudaLauncher, "__init__", lambda self, *args: (own(self, *args), vars(self).update(
            global_scratch_size=8))[0])  # fmt: skip
    launch(kernel)
    own_run = type(kernel).run
    monkeypatch.setattr(type(kernel), "run", None)
    launch(kernel)
    monkeypatch.setattr(type(kernel), "run", own_run)
    (_, first, (grid, stream, *_)), (how, second, (again, *args)) = CudaLauncher.noted
    assert (how, first, grid, stream) == ("triton", second, again, 70)
    assert args[:3] == [70, X.data_ptr(), 3]


@launchers
def test_a_driver_of_another_kind_is_left_alone(launch: Any, kernel: Any, driver: Driver) -> None:
    """As of tests/engines, which counts the launches of an engine without a GPU."""
    called = []
    driver.launcher_cls = lambda *of_kernel: lambda *args: called.append(args)
    for _ in range(3):
        launch(kernel)
    assert len(called) == 3
    assert not CudaLauncher.noted


@launchers
def test_a_compiled_kernel_stays_loaded(launch: Any, kernel: Any) -> None:
    """Triton unloads its code when nobody has it."""
    _how(launch, kernel)
    made = weakref.ref(kernel.run(X, 3, what=4, grid=(1,), warmup=True, enable_fp_fusion=True))
    launch_once = functools.partial(_how, launch, kernel)
    kernel.device_caches.clear()
    gc.collect()
    assert launch_once() == "direct"
    if launch is LAUNCHERS["short"]:
        assert made() is not None


@pytest.mark.parametrize("early", [False, True])
def test_a_kernel_is_looked_up_by_what_compiles_it(driver: Driver, kernel: Any, early: bool) -> None:
    """Triton's launcher runs once for each device, set of flags and alignment; the compiled kernel runs after that."""
    for driver.current, rows, flags, aligned, expected in (
        (0, 3, (4,), True, "triton"),
        (0, 5, (4,), True, "direct"),
        (0, 5, (5,), True, "triton"),
        (0, 5, (4,), False, "triton"),
        (1, 5, (4,), True, "triton"),
        (1, 6, (4,), True, "direct"),
    ):
        launching.launch(kernel, driver.current, (rows, 1, 1), (X,), (rows,), flags, aligned, early)
        how, launcher, (grid, stream, first, *rest) = CudaLauncher.noted.pop()
        assert (how, grid, stream, rest) == (expected, (rows, 1, 1), 70 + driver.current, [rows, *flags])
        assert first is X if how == "triton" else first == X.data_ptr()
        assert launcher.launch_pdl == early


def test_nothing_is_kept_of_an_interpreted_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_forms", "_compiled"):
        monkeypatch.setattr(launching, name, {})

    class Interpreted:
        fn = object()

        def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
            return lambda *arguments, **options: calls.append(arguments)

    calls: list[Any] = []
    for _ in range(2):
        launching.launch(Interpreted(), -1, (1, 1, 1), (torch.zeros(3),), (1, 2), (4,))
        launching.launch_by_arguments(Interpreted(), -1, (1, 1, 1), (torch.zeros(3), 1, 2), {"what": 4})
    assert (len(calls), launching._compiled, launching._forms) == (4, {}, {})


@pytest.mark.parametrize("capability", ["8.0", "9.0", "12.0"])
@pytest.mark.parametrize("op", OPS)
def test_every_kernel_of_ours_is_launched_directly(op: str, capability: str) -> None:
    """From the second call on: none has arguments of which it is not known what Triton compiles for."""
    limits = Limits(max_tokens=600, max_requests=40, max_context=30000, next_n=2)
    calls = serving.calls(op, FLASH.rank(4), limits)
    launches = list(ahead.record(op, calls, arch_from_capability(Version(capability))))
    assert launches
    for launch in launches:
        named = {p.name for p in launch.kernel.params if p.is_constexpr} | {*launch.options}
        types = tuple(type(value) for name, value in launch.arguments.items() if name not in named)
        assert launching._Form(launch.kernel, types, tuple(named)).direct, launch


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is on cuda:0."""

    def get_device(self) -> int:
        return 0


def test_the_kernels_of_ours_are_launched_so(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_DEFAULT_FP_FUSION")  # 3.9 warns, unless each launch says it
    monkeypatch.setattr(launching, "_current_device", lambda: lambda: 0)
    for n in (3, 4):
        launch_kernel(kernel, (2, 3), X.as_subclass(OnGpu), n, what=4)
    (by, *_), (how, _, (grid, stream, *given)) = CudaLauncher.noted
    assert (by, how, grid, stream, given) == ("triton", "direct", (2, 3, 1), 70, [X.data_ptr(), 4, None])
