"""Triton's interpreter, in which kernels are tested without a GPU: whether it runs here, and its repeated work."""

from __future__ import annotations

import functools
import os
from importlib import metadata
from types import FunctionType
from typing import Any

from packaging.version import Version

ON = os.environ.get("TRITON_INTERPRET", "0") == "1"


def trouble(triton: str, numpy: str) -> str:
    """Why the interpreter of this Triton cannot run with this NumPy; empty if it can."""
    if Version(triton) < Version("3.7") and Version(numpy) >= Version("2.4.dev0"):
        return (
            f"the interpreter of Triton {triton} reads scalars in a way that NumPy {numpy} refuses: "
            "install 'numpy<2.4', or Triton 3.7 or newer"
        )
    return ""


def trouble_here() -> str:
    import triton

    return trouble(triton.__version__, metadata.version("numpy"))


def remember() -> None:
    """Let Triton's interpreter do once what it does again for every call and every value, with the same result.

    A kernel computes what it computed before, in half the time: what is kept are the functions that a launch has put in
    place of the language's, and the shapes and types of values. No value is kept.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    _patch_once_per_launch(interpreter, tl)
    _keep_numpy_types(interpreter, tl)
    _keep_block_types(tl)
    _keep_shapes(tl)


def _patch_once_per_launch(interpreter: Any, tl: Any) -> None:
    """A launch replaces the language's functions; then every call of a function within the kernel does so again."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[bool] | None = None

    @functools.cache
    def has_language(fn: FunctionType) -> bool:  # else it has triton.language.core alone
        return any(value is tl for value in fn.__globals__.values())

    def patch_lang(fn: FunctionType) -> Any:
        if patched is None:
            return patch(fn)
        if has_language(fn) in patched:
            return interpreter._LangPatchScope()
        patched.add(has_language(fn))
        return patch(fn)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal patched
        patched = set()
        try:
            return launch(self, *args, **kwargs)
        finally:
            patched = None

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_lang, call


def _keep_numpy_types(interpreter: Any, tl: Any) -> None:
    """It makes a table of 18 types to look up one."""
    find, found = interpreter._get_np_dtype, {}

    def get_np_dtype(kind: Any) -> Any:
        scalar = kind.scalar
        if type(scalar) is not tl.dtype:
            return find(kind)
        if scalar.name not in found:
            found[scalar.name] = find(scalar)
        return found[scalar.name]

    interpreter._get_np_dtype = get_np_dtype


def _sizes(shape: Any) -> tuple[int, ...] | None:
    """A shape as a key; None if a size is a constant that has yet to be unwrapped."""
    sizes = tuple(getattr(shape, "values", shape))  # Triton's own tuple compares and hashes by converting
    return sizes if all(type(size) is int for size in sizes) else None


def _keep_block_types(tl: Any) -> None:
    """The type of every value checks its shape and writes its name."""
    make, made = tl.block_type.__init__, {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        # A pointer's name says whether it is one to constants, and not which memory it points to.
        where = (element_ty.address_space, element_ty.const) if element_ty.is_ptr() else ()
        key = (type(element_ty), element_ty.name, where, _sizes(shape))
        if key[-1] is None:
            make(self, element_ty, shape)
        elif key in made:
            self.__dict__ |= made[key]
        else:
            make(self, element_ty, shape)
            made[key] = dict(self.__dict__)

    tl.block_type.__init__ = init


def _keep_shapes(tl: Any) -> None:
    """Every value makes a constant of every size, a tuple of them, and a type for that tuple."""
    make, made = tl.tensor.__init__, {}

    def init(self: Any, handle: Any, kind: Any) -> None:
        key = _sizes(kind.shape) if kind.is_block() else ()
        if key in made:
            self.__dict__ |= made[key]
            self.handle, self.type, self.dtype = handle, kind, kind.scalar
            return
        make(self, handle, kind)
        if key is not None:
            assert self.__dict__.keys() == {"handle", "type", "dtype", "shape", "numel"}, "Triton's tensor has changed"
            made[key] = {"shape": self.shape, "numel": self.numel}

    tl.tensor.__init__ = init
