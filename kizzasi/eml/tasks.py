"""The regression tasks that EML attention is measured on, and the one honest score.

Sequence tasks have inputs uniform in [-1, 1); formulas have ranges of their own. A constant
predictor scores 0 in `r_squared`, a perfect one 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

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
    x = _uniform(seed, n_samples, seq_len, d_model) * 2 - 1
    x = x.to(device, dtype)
    return x, task(x)


def _uniform(seed: int, *shape: int) -> Tensor:
    """Draw float64 numbers in [0, 1) on the CPU, so that they are the same for any device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class Formula:
    """An equation of physics, as a regression task.

    Args:
        name: its number in the lectures.
        function: of one tensor per variable, in the order of `ranges`.
        ranges: lowest and highest value of each variable.

    Source: Feynman lectures; numbers and ranges of the Feynman Symbolic Regression Database,
        Udrescu & Tegmark 2020, arXiv:1905.11481, table 4.
    """

    name: str
    function: Callable[..., Tensor]
    ranges: tuple[tuple[float, float], ...]

    def draw(
        self,
        n_samples: int,
        seed: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> tuple[Tensor, Tensor]:
        """Draw variables (n_samples, k), uniform in their ranges, and values (n_samples)."""
        unit = _uniform(seed, n_samples, len(self.ranges)).to(device)
        low, high = torch.tensor(self.ranges, dtype=torch.float64, device=device).unbind(1)
        x = low + (high - low) * unit
        return x.to(dtype), self.function(*x.unbind(1)).to(dtype)


def _gaussian(sigma: Tensor, theta: Tensor) -> Tensor:
    return torch.exp(-((theta / sigma) ** 2) / 2) / (math.sqrt(2 * math.pi) * sigma)


def _distance(x1: Tensor, x2: Tensor, y1: Tensor, y2: Tensor) -> Tensor:
    return torch.hypot(x2 - x1, y2 - y1)


def _coulomb_force(q1: Tensor, q2: Tensor, epsilon: Tensor, r: Tensor) -> Tensor:
    return q1 * q2 / (4 * math.pi * epsilon * r**2)


def _lorentz_force(q: Tensor, e: Tensor, b: Tensor, v: Tensor, theta: Tensor) -> Tensor:
    return q * (e + b * v * torch.sin(theta))


def _relativistic_momentum(m0: Tensor, v: Tensor, c: Tensor) -> Tensor:
    return m0 * v / torch.sqrt(1 - (v / c) ** 2)


def _centre_of_mass(m1: Tensor, m2: Tensor, r1: Tensor, r2: Tensor) -> Tensor:
    return (m1 * r1 + m2 * r2) / (m1 + m2)


def _focal_length(d1: Tensor, d2: Tensor, n: Tensor) -> Tensor:
    return 1 / (1 / d1 + n / d2)


def _wave_sum(x1: Tensor, x2: Tensor, theta1: Tensor, theta2: Tensor) -> Tensor:
    return torch.sqrt(x1**2 + x2**2 - 2 * x1 * x2 * torch.cos(theta1 - theta2))


def _barometric(n0: Tensor, m: Tensor, x: Tensor, t: Tensor, g: Tensor, kb: Tensor) -> Tensor:
    return n0 * torch.exp(-m * g * x / (kb * t))


def _distortion(x1: Tensor, omega: Tensor, t: Tensor, alpha: Tensor) -> Tensor:
    wave = torch.cos(omega * t)
    return x1 * (wave + alpha * wave**2)


_USUAL, _SMALL = (1.0, 5.0), (1.0, 3.0)
FEYNMAN = (
    Formula("I.6.2", _gaussian, (_SMALL,) * 2),
    Formula("I.8.14", _distance, (_USUAL,) * 4),
    Formula("I.12.2", _coulomb_force, (_USUAL,) * 4),
    Formula("I.12.11", _lorentz_force, (_USUAL,) * 5),
    Formula("I.15.10", _relativistic_momentum, (_USUAL, (1.0, 2.0), (3.0, 10.0))),
    Formula("I.18.4", _centre_of_mass, (_USUAL,) * 4),
    Formula("I.27.6", _focal_length, (_USUAL,) * 3),
    Formula("I.29.16", _wave_sum, (_USUAL,) * 4),
    Formula("I.40.1", _barometric, (_USUAL,) * 6),
    Formula("I.50.26", _distortion, (_SMALL,) * 4),
)


def r_squared(prediction: Tensor, target: Tensor) -> float:
    """Compute 1 - mse / variance, the variance being taken over all of `target`."""
    prediction, target = prediction.double(), target.double()
    return float(1.0 - (prediction - target).square().mean() / target.var(correction=0))
