"""Coordinate descent: one coordinate a trial, or a block of them by parabolas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kizzasi.eml.search.optimizer import hashed_uniform, require, sweep_block, usable

_MARGIN = 1e-12


class DescentState(NamedTuple):
    """x (R, n), best (R), trial (R) the next trial of each problem, accepts (R), seed."""

    x: Tensor
    best: Tensor
    trial: Tensor
    accepts: Tensor
    seed: int


@dataclass(frozen=True)
class CoordinateDescent:
    """Random coordinate descent: change a few coordinates, keep the change if the loss falls.

    Trial k adds uniform steps in [-sigma_k, sigma_k) to `block` random coordinates, with sigma_k
    falling geometrically from step_init to step_final over `trials`. Candidates are asked
    speculatively, as if all failed; the first that succeeds is kept and the later ones are asked
    again, so the path equals that of one candidate at a time.

    Args:
        trials: length of the schedule, after which the search ends.
        step_init, step_final: largest change at the start and the end.
        block: coordinates changed together.
        batch: candidates per ask; the path does not depend on it.
    """

    trials: int
    step_init: float = 0.5
    step_final: float = 0.01
    block: int = 1
    batch: int = 16

    def __post_init__(self) -> None:
        require(min(self.trials, self.block, self.batch) >= 1, f"{self}: counts must be >= 1")

    def init(self, x: Tensor, loss: Tensor, seed: int) -> DescentState:
        zero = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return DescentState(x, usable(loss), zero, zero, seed)

    def ask(self, state: DescentState) -> Tensor:
        x, n = state.x, state.x.shape[1]
        batch = min(self.batch, self.trials - int(state.trial.min()))
        trial = state.trial[:, None] + torch.arange(batch, device=x.device)  # (R, P)
        keys = (
            torch.arange(len(x), device=x.device)[:, None, None],
            trial[..., None],
            torch.arange(self.block, device=x.device),
        )
        index = (hashed_uniform(state.seed, *keys) * n).long()
        step = self.step_init * (self.step_final / self.step_init) ** (trial.double() / self.trials)
        step = step.float().double()  # powers differ in the last bit between batch sizes
        change = (2 * hashed_uniform(state.seed + 1, *keys) - 1) * step[..., None]
        candidates = x[:, None].repeat(1, batch, 1)
        return candidates.scatter_add_(2, index, change.to(x.dtype))

    def tell(self, state: DescentState, candidates: Tensor, losses: Tensor) -> DescentState:
        trial = state.trial[:, None] + torch.arange(losses.shape[1], device=losses.device)
        better = (losses + _MARGIN < state.best[:, None]) & (trial < self.trials)
        any_better = better.any(1)
        first = torch.where(any_better, better.int().argmax(1), losses.shape[1] - 1)
        chosen = candidates[torch.arange(len(first), device=first.device), first]
        return DescentState(
            torch.where(any_better[:, None], chosen, state.x),
            torch.where(any_better, losses.gather(1, first[:, None])[:, 0], state.best),
            (state.trial + first + 1).clamp(max=self.trials),
            state.accepts + any_better,
            state.seed,
        )


class BlockState(NamedTuple):
    """x (R, n), best (R), step (R, n) probe sizes, move (R, n) or None while probing, at, seed."""

    x: Tensor
    best: Tensor
    step: Tensor
    move: Tensor | None
    at: int
    seed: int


@dataclass(frozen=True)
class BlockDescent:
    """Block coordinate descent by parabolas.

    Each coordinate of a block is probed on both sides; the parabola through the three losses gives
    its own best change. All changes of the block are then tried together, at several lengths, along
    with the best single probe, and the best candidate is kept if it is better.

        d_i = -h_i (f+ - f-) / (2 (f+ + f- - 2 f)),   |d_i| <= reach h_i

    A probe size h_i follows the change it found, within [min_step, max_step].

    Args:
        block: coordinates per step; 1 is Gauss-Seidel, n is a whole gradient and curvature.
        step, min_step, max_step: first probe size, and its bounds.
        reach: longest change, in probe sizes.
        lengths: multiples of the joint change that are tried.
    """

    block: int
    step: float = 0.1
    min_step: float = 1e-3
    max_step: float = 0.5
    reach: float = 3.0
    lengths: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1, 0.03)

    def __post_init__(self) -> None:
        require(self.block >= 1, f"{self}: block must be >= 1")
        require(0 < self.min_step <= self.step <= self.max_step, f"{self}: steps must rise")

    def init(self, x: Tensor, loss: Tensor, seed: int) -> BlockState:
        return BlockState(x, usable(loss), torch.full_like(x, self.step), None, 0, seed)

    def ask(self, state: BlockState) -> Tensor:
        x = state.x[:, None]
        if state.move is not None:
            lengths = torch.tensor(self.lengths, dtype=x.dtype, device=x.device)
            return x + lengths[:, None] * state.move[:, None]
        chosen = sweep_block(state.seed, state.at, self.block, state.x)
        size = len(chosen)
        probes = torch.zeros(len(x), 2, size, x.shape[-1], dtype=x.dtype, device=x.device)
        each = torch.arange(size, device=x.device)
        probes[:, 0, each, chosen] = state.step[:, chosen]
        probes[:, 1, each, chosen] = -state.step[:, chosen]
        return x + probes.flatten(1, 2)

    def tell(self, state: BlockState, candidates: Tensor, losses: Tensor) -> BlockState:
        losses = usable(losses)
        low, where = losses.min(1)
        better = low < state.best
        rows = torch.arange(len(low), device=low.device)
        best_candidate = candidates[rows, where]
        if state.move is not None:
            x = torch.where(better[:, None], best_candidate, state.x)
            best = torch.where(better, low, state.best)
            return state._replace(x=x, best=best, move=None, at=state.at + 1)
        chosen = sweep_block(state.seed, state.at, self.block, state.x)
        plus, minus = losses.unflatten(1, (2, -1)).unbind(1)
        centre, h = state.best[:, None], state.step[:, chosen]
        bend = plus + minus - 2 * centre
        # Without a usable parabola, walk as far as allowed towards the lower side.
        walk = torch.sign(minus - plus) * self.reach * h
        bowl = (bend > 0) & bend.isfinite()
        change = torch.where(bowl, h * (minus - plus) / (2 * bend), walk).nan_to_num(0.0)
        change = change.clamp(-self.reach * h, self.reach * h)
        step = state.step.clone()
        step[:, chosen] = change.abs().clamp(h / 2, h * 2).clamp(self.min_step, self.max_step)
        move = torch.zeros_like(state.x)
        move[:, chosen] = change
        # A kept probe moves x at once; the joint change then starts from there, without its own
        # coordinate, which has already moved.
        x = torch.where(better[:, None], best_candidate, state.x)
        moved = x != state.x
        best = torch.where(better, low, state.best)
        return state._replace(x=x, best=best, step=step, move=torch.where(moved, 0.0, move))
