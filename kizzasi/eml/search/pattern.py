"""Directional direct search along random sign vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from kizzasi.eml.search.optimizer import hashed_uniform, keep_best, require, usable


class PatternState(NamedTuple):
    """x (R, n), best (R), sigma (R), at the number of polls so far; used, seed."""

    x: Tensor
    best: Tensor
    sigma: Tensor
    at: int
    used: int
    seed: int


@dataclass(frozen=True)
class PatternSearch:
    """Directional direct search: poll random orthogonal-ish signs, move or shrink.

    Each poll tries +-sigma along `directions` random sign vectors restricted to `block` random
    coordinates; the best improvement is taken and sigma grows, otherwise it shrinks.

    Args:
        directions: pairs of candidates per poll.
        block: coordinates a direction changes.
        step: first sigma.
        grow, shrink: factors of sigma after success and failure.

    Source: Kolda, Lewis & Torczon 2003, SIAM Review 45(3), section 3.
    """

    residuals: ClassVar[bool] = False
    speculative: ClassVar[bool] = False
    directions: int = 16
    block: int = 8
    step: float = 0.2
    grow: float = 1.5
    shrink: float = 0.9

    def __post_init__(self) -> None:
        require(min(self.directions, self.block) >= 1, f"{self}: counts must be >= 1")
        require(self.step > 0, f"{self}: step must be above 0")

    def init(self, x: Tensor, loss: Tensor, seed: int, evaluations: int) -> PatternState:
        sigma = torch.full((len(x),), self.step, dtype=x.dtype, device=x.device)
        return PatternState(x, usable(loss), sigma, 0, 1, seed)

    def ask(self, state: PatternState) -> Tensor:
        x, n = state.x, state.x.shape[1]
        keys = (
            torch.arange(len(x), device=x.device)[:, None, None],
            torch.arange(self.directions, device=x.device)[:, None] + state.at * self.directions,
            torch.arange(min(self.block, n), device=x.device),
        )
        index = (hashed_uniform(state.seed, *keys) * n).long()
        signs = torch.where(hashed_uniform(state.seed + 1, *keys) < 0.5, -1.0, 1.0).to(x.dtype)
        move = torch.zeros(len(x), self.directions, n, dtype=x.dtype, device=x.device)
        move.scatter_(2, index, signs * state.sigma[:, None, None])
        return x[:, None] + torch.cat((move, -move), 1)

    def tell(self, state: PatternState, candidates: Tensor, losses: Tensor) -> PatternState:
        x, best, better = keep_best(state.x, state.best, candidates, usable(losses))
        sigma = state.sigma * torch.where(better, self.grow, self.shrink).to(state.sigma)
        return PatternState(x, best, sigma, state.at + 1, state.used + losses.shape[1], state.seed)

    def renew(self, state: PatternState, loss: Tensor) -> PatternState:
        return state._replace(best=usable(loss))
