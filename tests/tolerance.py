"""The one tolerance table: what 'equal' means per dtype, for outputs, gradients and states."""

import torch

TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-10},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2},
}


def assert_close(actual, expected, dtype=None, msg=""):
    """Compare two tensors under the table's row for `dtype` (default: the actual's dtype)."""
    tolerance = TOLERANCE[dtype or actual.dtype]
    torch.testing.assert_close(
        actual, expected, **tolerance, msg=(lambda m: f"{msg}: {m}") if msg else None
    )
