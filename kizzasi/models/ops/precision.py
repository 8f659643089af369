"""Which precision sums and statistics are computed in."""

import torch
from torch import Tensor

LOW_PRECISION = (torch.bfloat16, torch.float16)


def full_precision(x: Tensor) -> Tensor:
    """float32 for bfloat16 and float16 tensors; float32 and float64 pass unchanged."""
    return x.float() if x.dtype in LOW_PRECISION else x
