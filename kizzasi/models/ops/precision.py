"""Which precision sums and statistics are computed in."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

LOW_PRECISION = (torch.bfloat16, torch.float16)


def full_precision(x: Tensor) -> Tensor:
    """float32 for bfloat16 and float16 tensors; float32 and float64 pass unchanged."""
    return x.float() if x.dtype in LOW_PRECISION else x


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Keep autocast from lowering what is computed inside; the meta device has no autocast."""
    kind = x.device.type
    on = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


def in_full_precision(op: Callable[P, R]) -> Callable[P, R]:
    """Have an op take tensors of any dtype, whose first one says where they are, and compute in at
    least float32, out of autocast's reach. Its results are in what it computed in."""

    def wide(x: Any) -> Any:
        return full_precision(x) if isinstance(x, Tensor) else x

    @wraps(op)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        with without_autocast(first):
            return op(*map(wide, args), **{name: wide(x) for name, x in kwargs.items()})  # pyright: ignore[reportCallIssue]

    return run
