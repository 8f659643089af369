"""Run a gradient-free optimiser: budget, early stop, progress, and a state that can be resumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from kizzasi.eml.search.coordinate import BlockDescent
from kizzasi.eml.search.gauss_newton import GaussNewton
from kizzasi.eml.search.objective import Loss
from kizzasi.eml.search.optimizer import Optimizer, require
from kizzasi.errors import ShapeError, SpecError


@dataclass(frozen=True)
class Minimum:
    """Where `minimize` got to.

    x            (R, n) best points.
    loss         (R) their losses.
    evaluations  candidates per problem, the first point included.
    asked        all candidates that were run, those that `CoordinateDescent` asked in vain too.
    history      (evaluations, mean best loss) after every step.
    optimizer    that was used.
    turn         mini-batches begun before the present one.
    state        resume with it, or save it with torch.save.
    """

    x: Tensor
    loss: Tensor
    evaluations: int
    asked: int
    history: list[tuple[int, float]] = field(repr=False)
    optimizer: Optimizer
    turn: int = field(repr=False)
    state: Any = field(repr=False)


@torch.no_grad()
def minimize(
    objective: Loss | Sequence[Loss],
    optimizer: Optimizer | None = None,
    start: Tensor | None = None,
    *,
    evaluations: int,
    seed: int = 0,
    target: float | None = None,
    patience: int | None = None,
    min_improvement: float = 1e-4,
    per_batch: int = 500,
    progress: bool = False,
    resume: Minimum | None = None,
) -> Minimum:
    """Search for low losses without gradients.

    The result is a function of the objective, the optimiser, the start, the seed and the budget;
    stopping at a budget and resuming changes nothing.

    Args:
        objective: losses (R, P), or residuals (R, P, m), of candidates (R, P, n); for example a
            `ModuleObjective`. Several of them are mini-batches: each in turn is searched for
            `per_batch` evaluations, and `loss` is that on the last one.
        optimizer: None for `BlockDescent()` on losses and `GaussNewton()` on residuals.
        start: (R, n) first points; None for the objective's own `start`. Ignored on resume.
        evaluations: the budget: candidates per problem in all, the resumed ones included; the last
            ask may overshoot. Schedules of optimisers follow it.
        seed: of every random number.
        target: stop once every problem's loss is at or below it.
        patience: stop after this many steps in which the mean best loss fell by no more than
            the fraction min_improvement; None never does.
        per_batch: evaluations on one mini-batch, the new measurement of the point included.
        progress: show a bar.
        resume: what an earlier call returned. A schedule that followed its budget stays as it was.

    Raises:
        SpecError: no budget, another optimiser's state, or an optimiser that is told residuals
            where the objective gives losses, or the other way about.
        ShapeError: start is not (R, n).
    """
    require(evaluations >= 1, f"evaluations is {evaluations}; give at least 1")
    require(per_batch >= 2, f"per_batch is {per_batch}; give at least 2")
    batches = objective if isinstance(objective, Sequence) else [objective]
    require(len(batches) > 0, "objective is an empty list; give at least one mini-batch")
    if resume is None:
        x = _first_points(batches[0], start)
        first = batches[0](x[:, None])[:, 0]
        chosen: Optimizer = optimizer or (GaussNewton() if first.ndim == 2 else BlockDescent())
        _check_kind(chosen, first)
        state: Any = chosen.init(x, first, seed, evaluations)
        turn, asked, history = 0, 1, []
    else:
        require(
            optimizer in (None, resume.optimizer),
            f"resume holds a state of {resume.optimizer}; give that optimiser, or none",
        )
        chosen, state, turn = resume.optimizer, resume.state, resume.turn
        asked, history = resume.asked, list(resume.history)
    with tqdm(total=evaluations, initial=state.used, disable=not progress, unit="eval") as bar:
        while state.used < evaluations:
            if target is not None and bool((state.best <= target).all()):
                break
            if patience is not None and _stalled(history, patience, min_improvement):
                break
            before = state.used
            if len(batches) > 1 and turn != (turn := (state.used - 1) // per_batch):
                first = batches[turn % len(batches)](state.x[:, None])[:, 0]
                state = chosen.renew(state, first)
                state, asked = state._replace(used=state.used + 1), asked + 1
            candidates = chosen.ask(state)
            if chosen.speculative:
                candidates = candidates[:, : evaluations - state.used]
            if candidates.shape[1] == 0:
                break
            values = batches[turn % len(batches)](candidates)
            state, asked = chosen.tell(state, candidates, values), asked + values.shape[1]
            history.append((state.used, float(state.best.mean())))
            bar.update(state.used - before)
            bar.set_postfix(loss=f"{history[-1][1]:.4g}")
    return Minimum(state.x, state.best, state.used, asked, history, chosen, turn, state)


def _first_points(objective: Loss, start: Tensor | None) -> Tensor:
    """Return the points (R, n) to start from."""
    if start is None:
        start = getattr(objective, "start", None)
        if start is None:
            raise SpecError("the objective has no start of its own; give start, (R, n)")
    if start.ndim != 2 or not start.numel():
        raise ShapeError(f"start is {tuple(start.shape)}; it must be (R, n): start[None] for one")
    return start


def _check_kind(optimizer: Optimizer, first: Tensor) -> None:
    name = type(optimizer).__name__
    require(
        not optimizer.residuals or first.ndim == 2,
        f"{name} needs residuals (R, P, m), and the objective gives one loss a candidate; let the "
        "criterion return (output - y).flatten(), or use BlockDescent()",
    )
    require(
        optimizer.residuals or first.ndim == 1,
        f"{name} needs one loss a candidate, and the objective gives {tuple(first.shape[1:])} "
        "values; let the criterion return a scalar, or use GaussNewton()",
    )


def _stalled(history: list[tuple[int, float]], patience: int, fraction: float) -> bool:
    if len(history) <= patience:
        return False
    before, now = history[-1 - patience][1], history[-1][1]
    return before - now <= fraction * abs(before)
