"""What every synthetic task offers, and how its examples are drawn.

`loss_mask` marks the positions that are scored; there the target follows from the inputs up to and
including that position, and everywhere else the target is IGNORE, which `cross_entropy` skips, so
no unscored position can leak an answer.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kizzasi.errors import SpecError
from kizzasi.train.task import IGNORE


class TaskBatch(NamedTuple):
    """inputs (b, t) long, targets (b, t) long with IGNORE where loss_mask (b, t) bool is False."""

    inputs: Tensor
    targets: Tensor
    loss_mask: Tensor


class Examples(Protocol):
    """What every generator offers: its vocabulary, its guessing accuracy, and seeded examples."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def chance(self) -> float: ...

    def sample(self, batch_size: int, seed: int) -> TaskBatch:
        """Draw fresh examples; equal arguments give equal examples."""
        ...


def asked_at(inputs: Tensor, answers: Tensor, asked: Tensor) -> TaskBatch:
    """A batch with the answers (b, t) where `asked` (b, t) is True, and IGNORE elsewhere."""
    return TaskBatch(inputs, torch.where(asked, answers, IGNORE), asked)


def check(task: Examples, name: str, value: int, least: int, reason: str) -> None:
    if value < least:
        raise SpecError(
            f"{type(task).__name__}: {name}={value} must be at least {least}, to hold {reason}"
        )


def seeded(batch_size: int, seed: int) -> torch.Generator:
    if batch_size < 1:
        raise SpecError(f"batch_size={batch_size} must be at least 1")
    return torch.Generator().manual_seed(seed)


def distinct(
    batch_size: int,
    n_choices: int,
    n_drawn: int,
    generator: torch.Generator,
    weights: Tensor | None = None,
) -> Tensor:
    """(b, n_drawn) distinct indices below n_choices, drawn one by one with these weights.

    The first arrivals of independent exponential clocks with those rates have exactly that law.
    """
    arrivals = torch.empty(batch_size, n_choices, dtype=torch.float64)
    arrivals.exponential_(generator=generator)
    if weights is not None:
        arrivals /= weights
    return arrivals.topk(n_drawn, largest=False).indices
