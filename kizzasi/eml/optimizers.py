"""Optimisers that see losses only, as pure functions of an explicit state: init, ask, tell.

All of them run R independent problems side by side: restarts of one model, or parameters that touch
separate parts of a loss. What an optimiser asks next is a function of its state alone; its random
numbers are hashed from (seed, problem, counter), so they are the same on any device and for any
batch.

Glossary:
    R, P, n    problems, candidates per problem, parameters per problem
    x          (R, n) the current point
    best       (R) its loss
    sigma      size of a step or of the search distribution
    g          estimated gradient
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kizzasi.errors import SpecError

_MARGIN = 1e-12


class Optimizer(Protocol):
    """What `minimize` needs. States are NamedTuples with at least `x` and `best`."""

    def init(self, x: Tensor, loss: Tensor, /, seed: int) -> Any:
        """Start from points (R, n) whose losses (R) are known."""
        ...

    def ask(self, state: Any, /) -> Tensor:
        """Return (R, P, n) candidates; P = 0 ends the search."""
        ...

    def tell(self, state: Any, candidates: Tensor, losses: Tensor, /) -> Any:
        """Return the state after the candidates' losses (R, P); nan and inf count as bad."""
        ...


def _mix(bits: Tensor) -> Tensor:
    """Scramble int64 numbers: the finaliser of splitmix64, with logical shifts."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        bits = (bits ^ ((bits >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return bits ^ ((bits >> 31) & ((1 << 33) - 1))


def hashed_uniform(seed: int, *counters: Tensor) -> Tensor:
    """Return float64 numbers in [0, 1), one per combination of the broadcast int64 counters."""
    bits = torch.tensor(seed, dtype=torch.int64, device=counters[0].device)
    for counter in counters:
        bits = _mix(bits * 0x5851F42D4C957F2D + counter + 1)
    return ((bits >> 11) & ((1 << 53) - 1)).double() / 2.0**53


def hashed_normal(seed: int, *counters: Tensor) -> Tensor:
    """Return standard normal numbers (Box-Muller), one per combination of counters.

    They are rounded to float32, where the last bits of logarithm and cosine do not show.
    """
    radius = torch.sqrt(-2.0 * torch.log1p(-hashed_uniform(seed, *counters)))
    return (radius * torch.cos(2.0 * math.pi * hashed_uniform(seed + 1, *counters))).float()


def _noise(seed: int, step: int, count: int, x: Tensor) -> Tensor:
    """Return (R, count, n) standard normals for one iteration."""
    problems, width = (torch.arange(size, device=x.device) for size in x.shape)
    draws = torch.arange(count, device=x.device) + step * count
    return hashed_normal(seed, problems[:, None, None], draws[:, None], width).to(x.dtype)


def _usable(losses: Tensor) -> Tensor:
    return torch.where(losses.isfinite(), losses, torch.inf)


def _require(rule: bool, message: str) -> None:
    if not rule:
        raise SpecError(message)


def sweep_block(seed: int, at: int, block: int, x: Tensor) -> Tensor:
    """Return step `at`'s coordinates: a slice of a random order of all n, new for every sweep."""
    n = x.shape[1]
    block = min(block, n)
    sweep, part = divmod(at, math.ceil(n / block))
    keys = torch.arange(n, device=x.device)
    order = hashed_uniform(seed, torch.full_like(keys, sweep), keys).argsort()
    return order[part * block : (part + 1) * block]


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
        _require(min(self.trials, self.block, self.batch) >= 1, f"{self}: counts must be >= 1")

    def init(self, x: Tensor, loss: Tensor, seed: int) -> DescentState:
        zero = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return DescentState(x, _usable(loss), zero, zero, seed)

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
        _require(self.block >= 1, f"{self}: block must be >= 1")
        _require(0 < self.min_step <= self.step <= self.max_step, f"{self}: steps must rise")

    def init(self, x: Tensor, loss: Tensor, seed: int) -> BlockState:
        return BlockState(x, _usable(loss), torch.full_like(x, self.step), None, 0, seed)

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
        losses = _usable(losses)
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


class PatternState(NamedTuple):
    """x (R, n), best (R), sigma (R), at the number of polls so far, seed."""

    x: Tensor
    best: Tensor
    sigma: Tensor
    at: int
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

    directions: int = 16
    block: int = 8
    step: float = 0.2
    grow: float = 1.5
    shrink: float = 0.9

    def init(self, x: Tensor, loss: Tensor, seed: int) -> PatternState:
        sigma = torch.full((len(x),), self.step, dtype=x.dtype, device=x.device)
        return PatternState(x, _usable(loss), sigma, 0, seed)

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
        low, where = _usable(losses).min(1)
        better = low < state.best
        chosen = candidates[torch.arange(len(low), device=low.device), where]
        sigma = state.sigma * torch.where(better, self.grow, self.shrink).to(state.sigma)
        x = torch.where(better[:, None], chosen, state.x)
        best = torch.where(better, low, state.best)
        return PatternState(x, best, sigma, state.at + 1, state.seed)
