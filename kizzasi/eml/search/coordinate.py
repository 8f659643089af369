"""Coordinate descent: one random coordinate a trial, or a block of them by parabolas.

`CoordinateDescent` is the trainer that eml-core uses; `BlockDescent` needs fewer evaluations and is
what `minimize` takes for a loss unless it is told otherwise. Names are those of `optimizer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from kizzasi.eml.search.optimizer import (
    hashed_uniform,
    keep_best,
    require,
    sweep_block,
    usable,
)

MARGIN = 1e-12  # by how much a loss must fall, so that rounding is no success
_FIRST_BATCH, _MAX_BATCH = 16, 256


class DescentState(NamedTuple):
    """x (R, n), best (R), trial (R) the next trial of each problem, accepts (R).

    trials    length of the sequence
    size      candidates of the next ask
    done      trials decided in every problem
    """

    x: Tensor
    best: Tensor
    trial: Tensor
    accepts: Tensor
    trials: int
    size: int
    done: int
    used: int
    seed: int


def _begin(x: Tensor, loss: Tensor, trials: int, batch: int | None, seed: int) -> DescentState:
    zero = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    return DescentState(x, usable(loss), zero, zero, trials, batch or _FIRST_BATCH, 0, 1, seed)


def _next_trials(state: DescentState) -> Tensor:
    """Return (R, P) the trials that come next, as if none of them succeeds."""
    size = max(0, min(state.size, state.trials - state.done))
    return state.trial[:, None] + torch.arange(size, device=state.x.device)


def _decide(
    state: DescentState, candidates: Tensor, losses: Tensor, margin: float, batch: int | None
) -> DescentState:
    """Keep each problem's first success; the trials after it are asked again.

    No problem goes further than the slowest could have.
    """
    count = losses.shape[1]
    end = state.done + count
    trial = state.trial[:, None] + torch.arange(count, device=losses.device)
    better = (losses + margin < state.best[:, None]) & (trial < end)
    any_better = better.any(1)
    first = torch.where(any_better, better.int().argmax(1), count - 1)
    chosen = candidates[torch.arange(len(first), device=first.device), first]
    then = (state.trial + first + 1).clamp(max=end).maximum(state.trial)
    furthest, succeeded, done = torch.stack((first.max(), any_better.sum(), then.min())).tolist()
    size = max(2, 2 * (furthest + 1)) if succeeded else 2 * count
    return DescentState(
        torch.where(any_better[:, None], chosen, state.x),
        torch.where(any_better, losses.gather(1, first[:, None])[:, 0], state.best),
        then,
        state.accepts + any_better,
        state.trials,
        batch or min(size, _MAX_BATCH),
        done,
        state.used + done - state.done,
        state.seed,
    )


@dataclass(frozen=True)
class CoordinateDescent:
    """Random coordinate descent: change a few coordinates, keep the change if the loss falls.

    Trial k adds uniform steps in [-sigma_k, sigma_k) to `block` random coordinates, with sigma_k
    falling geometrically from step_init to step_final over `trials`. Candidates are asked
    speculatively, as if all failed; the first that succeeds is kept and the later ones are asked
    again, so the path equals that of one candidate at a time.

    An evaluation is a trial that was decided. Those asked in vain are not counted as such, so the
    result at a budget does not depend on `batch`; `Minimum.asked` counts them too.

    Args:
        trials: length of the schedule, after which the search ends; None for the budget that
            `minimize` is given.
        step_init, step_final: largest change at the start and the end.
        block: coordinates changed together.
        batch: candidates per ask; None follows the rate at which trials succeed, 1 asks none in
            vain. The path does not depend on it.
    """

    residuals: ClassVar[bool] = False
    speculative: ClassVar[bool] = True
    trials: int | None = None
    step_init: float = 0.5
    step_final: float = 0.01
    block: int = 1
    batch: int | None = None

    def __post_init__(self) -> None:
        counts = (self.trials or 1, self.block, self.batch or 1)
        require(min(counts) >= 1 and self.trials != 0, f"{self}: counts must be >= 1")
        require(min(self.step_init, self.step_final) > 0, f"{self}: steps must be above 0")

    def init(self, x: Tensor, loss: Tensor, seed: int, evaluations: int) -> DescentState:
        return _begin(x, loss, self.trials or max(1, evaluations - 1), self.batch, seed)

    def ask(self, state: DescentState) -> Tensor:
        x, n = state.x, state.x.shape[1]
        trial = _next_trials(state)
        keys = (
            torch.arange(len(x), device=x.device)[:, None, None],
            trial[..., None],
            torch.arange(self.block, device=x.device),
        )
        index = (hashed_uniform(state.seed, *keys) * n).long()
        share = trial.double() / state.trials
        step = self.step_init * (self.step_final / self.step_init) ** share
        step = step.float().double()  # powers differ in the last bit between batch sizes
        change = (2 * hashed_uniform(state.seed + 1, *keys) - 1) * step[..., None]
        candidates = x[:, None].repeat(1, trial.shape[1], 1)
        return candidates.scatter_add_(2, index, change.to(x.dtype))

    def tell(self, state: DescentState, candidates: Tensor, losses: Tensor) -> DescentState:
        return _decide(state, candidates, losses, MARGIN, self.batch)

    def renew(self, state: DescentState, loss: Tensor) -> DescentState:
        return state._replace(best=usable(loss))


@dataclass(frozen=True, eq=False)
class ListedDescent:
    """`CoordinateDescent` along a given sequence of trials, the same for every problem.

    Args:
        index: (trials) int64, the coordinate that each trial changes.
        change: (trials) float64, by how much.
        margin: by how much the loss must fall.
        batch: as for `CoordinateDescent`.
    """

    residuals: ClassVar[bool] = False
    speculative: ClassVar[bool] = True
    index: Tensor = field(repr=False)
    change: Tensor = field(repr=False)
    margin: float = MARGIN
    batch: int | None = None

    def init(self, x: Tensor, loss: Tensor, seed: int, evaluations: int) -> DescentState:
        return _begin(x, loss, len(self.index), self.batch, seed)

    def ask(self, state: DescentState) -> Tensor:
        trial = _next_trials(state)
        here = trial.clamp(max=state.trials - 1)
        index = self.index.to(trial.device)[here][..., None]
        change = self.change.to(state.x.device, state.x.dtype)[here][..., None]
        candidates = state.x[:, None].repeat(1, trial.shape[1], 1)
        return candidates.scatter_add_(2, index, change)

    def tell(self, state: DescentState, candidates: Tensor, losses: Tensor) -> DescentState:
        return _decide(state, candidates, losses, self.margin, self.batch)

    def renew(self, state: DescentState, loss: Tensor) -> DescentState:
        return state._replace(best=usable(loss))


class BlockState(NamedTuple):
    """x (R, n), best (R), step (R, n) probe sizes, move (R, n) or None while probing; counters."""

    x: Tensor
    best: Tensor
    step: Tensor
    move: Tensor | None
    at: int
    used: int
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

    residuals: ClassVar[bool] = False
    speculative: ClassVar[bool] = False
    block: int = 16
    step: float = 0.1
    min_step: float = 1e-3
    max_step: float = 0.5
    reach: float = 3.0
    lengths: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1, 0.03)

    def __post_init__(self) -> None:
        require(self.block >= 1, f"{self}: block must be >= 1")
        require(0 < self.min_step <= self.step <= self.max_step, f"{self}: steps must rise")

    def init(self, x: Tensor, loss: Tensor, seed: int, evaluations: int) -> BlockState:
        return BlockState(x, usable(loss), torch.full_like(x, self.step), None, 0, 1, seed)

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
        x, best, _ = keep_best(state.x, state.best, candidates, losses)
        state, before = state._replace(x=x, best=best, used=state.used + losses.shape[1]), state
        if state.move is not None:
            return state._replace(move=None, at=state.at + 1)
        chosen = sweep_block(state.seed, state.at, self.block, state.x)
        plus, minus = losses.unflatten(1, (2, -1)).unbind(1)
        centre, h = before.best[:, None], state.step[:, chosen]
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
        return state._replace(step=step, move=torch.where(x != before.x, 0.0, move))

    def renew(self, state: BlockState, loss: Tensor) -> BlockState:
        return state._replace(best=usable(loss), move=None)
