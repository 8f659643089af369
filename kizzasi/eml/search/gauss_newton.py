"""Gauss-Newton without derivatives: secants of the residuals in place of the Jacobian.

Where the loss is a mean of squares, the residuals say far more than their sum does. Candidates are
asked and told as in `optimizer.py`, but `tell` is given residuals, not losses.

Glossary (Cartis & Roberts 2019):
    R, P, n, m   problems, candidates, parameters, residuals
    r            (R, m) residuals at x; the loss is their mean square
    J            (R, block, m) secants, one row per probed coordinate
    damping      (R) Levenberg-Marquardt's lambda, relative to the diagonal of J J^T
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from kizzasi.eml.search.optimizer import keep_best, require, sweep_block, usable


class GaussNewtonState(NamedTuple):
    """x (R, n), best (R), r (R, m), damping (R), moves (R, P, n), None while probing; counters."""

    x: Tensor
    best: Tensor
    r: Tensor
    damping: Tensor
    moves: Tensor | None
    at: int
    used: int
    seed: int


@dataclass(frozen=True)
class GaussNewton:
    """Block coordinate Levenberg-Marquardt on secants.

    A step probes every coordinate of a block once, then tries the damped solutions

        (J J^T + lambda diag(J J^T)) d = -J r,     lambda in damping * {1/30, 1, 30, 1000}

    and keeps the best candidate if it is better; its lambda carries over.

    Args:
        block: coordinates per step; n for the whole problem, less where block^2 is too much memory.
        step: size of a probe.
        damping: first lambda.

    Source: Cartis & Roberts 2019, Math. Prog. Comp. 11 (DFO-GN), section 2; coordinate secants as
        in Brown & Dennis 1972.
    """

    residuals: ClassVar[bool] = True
    speculative: ClassVar[bool] = False
    block: int = 64
    step: float = 1e-2
    damping: float = 1e-2

    def __post_init__(self) -> None:
        require(self.block >= 1, f"{self}: block must be >= 1")
        require(min(self.step, self.damping) > 0, f"{self}: step and damping must be above 0")

    def init(self, x: Tensor, residuals: Tensor, seed: int, evaluations: int) -> GaussNewtonState:
        """Start from points (R, n) whose residuals (R, m) are known."""
        damping = torch.full((len(x),), self.damping, dtype=torch.float64, device=x.device)
        return GaussNewtonState(x, mean_square(residuals), residuals, damping, None, 0, 1, seed)

    def ask(self, state: GaussNewtonState) -> Tensor:
        x = state.x[:, None]
        if state.moves is not None:
            return x + state.moves
        chosen = sweep_block(state.seed, state.at, self.block, state.x)
        probes = torch.zeros(1, len(chosen), x.shape[-1], dtype=x.dtype, device=x.device)
        probes[:, torch.arange(len(chosen), device=x.device), chosen] = self.step
        return x + probes

    def tell(
        self, state: GaussNewtonState, candidates: Tensor, residuals: Tensor
    ) -> GaussNewtonState:
        """Return the state after the candidates' residuals (R, P, m)."""
        state = state._replace(used=state.used + residuals.shape[1])
        if state.moves is None:
            return state._replace(moves=self._solve(state, residuals))
        losses = mean_square(residuals)
        x, best, better = keep_best(state.x, state.best, candidates, losses)
        where = losses.argmin(1)
        chosen = residuals[torch.arange(len(where), device=where.device), where]
        factor = torch.tensor(_FACTORS, dtype=torch.float64, device=where.device)
        damping = state.damping * torch.where(better, factor[where], _FACTORS[-1])
        return state._replace(
            x=x,
            best=best,
            r=torch.where(better[:, None], chosen, state.r),
            damping=damping.clamp(1e-9, 1e6),
            moves=None,
            at=state.at + 1,
        )

    def renew(self, state: GaussNewtonState, residuals: Tensor) -> GaussNewtonState:
        return state._replace(best=mean_square(residuals), r=residuals, moves=None)

    def _solve(self, state: GaussNewtonState, residuals: Tensor) -> Tensor:
        """Return one move (R, n) per damping, stacked to (R, 4, n)."""
        chosen = sweep_block(state.seed, state.at, self.block, state.x)
        secants = ((residuals - state.r[:, None]) / self.step).nan_to_num_(0.0, 0.0, 0.0)
        square = (secants @ secants.mT).double()
        slope = (secants @ state.r[..., None]).double()
        scale = square.diagonal(dim1=1, dim2=2)
        scale = scale + 1e-9 * scale.mean(1, keepdim=True) + 1e-30
        moves = state.x.new_zeros(len(scale), len(_FACTORS), state.x.shape[1])
        for i, factor in enumerate(_FACTORS):
            damped = square + torch.diag_embed((state.damping * factor)[:, None] * scale)
            factored, _ = torch.linalg.cholesky_ex(damped)
            move = -torch.cholesky_solve(slope, factored)[..., 0]
            moves[:, i, chosen] = move.nan_to_num(0.0, 0.0, 0.0).to(moves)
        return moves


_FACTORS = (1 / 30, 1.0, 30.0, 1000.0)


def mean_square(residuals: Tensor) -> Tensor:
    """Return the losses (...) of residuals (..., m)."""
    return usable(residuals.square().mean(-1))
