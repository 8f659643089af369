"""The compiled library: found beside its sources, or absent.

Importing this module opens it, and fails with ImportError where it was not built or is older than
its sources; `Engines` takes that for an answer. Nothing is compiled here; see build.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kizzasi.models.ops.native.build import instruction_sets, library_path

REALS = {torch.float32: "f32", torch.float64: "f64"}
ORDER = ("scalar", "avx2", "avx512", "neon")  # as in threads.c
# Numbers read or written, or multiply-adds done, below which a second thread costs more than it
# brings.
WORTH_A_THREAD = 2**18


def _open() -> ctypes.CDLL:
    path = library_path()
    if not path.exists():
        raise ImportError("no compiled kernels here: python -m kizzasi.models.ops.native.build")
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(f"{path.name} cannot be loaded: {error}") from error


_library = _open()
AVAILABLE = tuple(isa for isa in instruction_sets() if _library.kizzasi_supports(ORDER.index(isa)))
_used = AVAILABLE[-1]


def instruction_set() -> str:
    """The one that kernels run on: the widest that this processor has."""
    return _used


def of_intel() -> bool:
    return bool(_library.kizzasi_of_intel())


@contextmanager
def using(isa: str) -> Iterator[None]:
    """Run kernels on another instruction set for a while; all threads of the process do."""
    global _used
    if isa not in AVAILABLE:
        raise ValueError(f"{isa!r} is not among {AVAILABLE}")
    before, _used = _used, isa
    try:
        yield
    finally:
        _used = before


def lanes(dtype: torch.dtype) -> int:
    """Numbers of this dtype in a vector."""
    width = instruction_sets()[_used][0]
    return max(1, width * 8 // torch.finfo(dtype).bits)


def threads(numbers: int) -> int:
    """How many threads share work of this size."""
    return max(1, min(torch.get_num_threads(), numbers // WORTH_A_THREAD))


def call(name: str, dtype: torch.dtype, tensors: Sequence[Tensor | None], *sizes: int) -> None:
    """Run a kernel. Its pointers and sizes are in the order of the enums in its source."""
    pointers = [None if x is None else x.data_ptr() for x in tensors]
    _kernel(name, dtype, _used)(
        (ctypes.c_void_p * len(pointers))(*pointers), (ctypes.c_int64 * len(sizes))(*sizes)
    )


def kernel(name: str, dtype: torch.dtype) -> Any:
    """A kernel by itself, for whoever calls it again and again with the same arguments."""
    return _kernel(name, dtype, _used)


def ask(name: str, dtype: torch.dtype, count: int, *sizes: int) -> list[int]:
    """The numbers by which a kernel wants room made for it."""
    answer = (ctypes.c_int64 * count)()
    _kernel(name, dtype, _used)(
        (ctypes.c_void_p * 1)(ctypes.addressof(answer)), (ctypes.c_int64 * len(sizes))(*sizes)
    )
    return list(answer)


@cache
def _kernel(name: str, dtype: torch.dtype, isa: str) -> Any:
    kernel = getattr(_library, f"kizzasi_{name}_{REALS[dtype]}_{isa}")
    kernel.restype = None
    return kernel


def rows(x: Tensor) -> Tensor:
    """x, whose last dimension is contiguous: kernels take strides of the others."""
    return x if x.stride(-1) == 1 else x.contiguous()


def differentiable(*inputs: Tensor | None) -> bool:
    """Whether somebody may ask for a gradient."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
