"""The tolerance of float64 and of the dtypes below, for outputs, gradients and states."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-10},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2},
}


def assert_close(
    actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None, msg: str = ""
) -> None:
    """Compare two tensors under the table's row for `dtype` (default: the actual's dtype)."""
    tolerance = TOLERANCE[dtype or actual.dtype]
    say = (lambda m: f"{msg}: {m}") if msg else None
    rtol, atol = tolerance["rtol"], tolerance["atol"]
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, msg=say)
