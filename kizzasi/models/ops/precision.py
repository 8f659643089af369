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
    kind = x.device.type
    on = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()
