"""The regression tasks that EML attention is measured on, and the one honest score.

Inputs are uniform in [-1, 1). A constant predictor scores 0 in `r_squared`, a perfect one 1.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Task = Callable[[Tensor], Tensor]


def position_mean(x: Tensor) -> Tensor:
    """Replace every value of a position by the position's mean: (..., d_model) to the same."""
    return x.mean(-1, keepdim=True).expand_as(x).contiguous()


def identity(x: Tensor) -> Tensor:
    """Return x: what attention cannot do when d_k < d_model."""
    return x.clone()


def draw(
    task: Task,
    n_samples: int,
    seq_len: int,
    d_model: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Draw inputs and targets, (n_samples, seq_len, d_model) each; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n_samples, seq_len, d_model, generator=generator, dtype=torch.float64) * 2 - 1
    x = x.to(device, dtype)
    return x, task(x)


def r_squared(prediction: Tensor, target: Tensor) -> float:
    """Compute 1 - mse / variance, the variance being taken over all of `target`."""
    prediction, target = prediction.double(), target.double()
    return float(1.0 - (prediction - target).square().mean() / target.var(correction=0))
