"""Which precision sums and statistics are computed in."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

LOW_PRECISION = (torch.bfloat16, torch.float16)


def full_precision(x: Tensor) -> Tensor:
    """float32 for bfloat16 and float16 tensors; float32 and float64 pass unchanged."""
    return x.float() if x.dtype in LOW_PRECISION else x


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Keep autocast from lowering what is computed inside; the meta device has no autocast."""
    on_meta = x.device.type == "meta"
    return nullcontext() if on_meta else torch.autocast(x.device.type, enabled=False)
