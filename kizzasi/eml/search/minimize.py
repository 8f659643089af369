"""Run a gradient-free optimiser: budget, early stop, progress, and a state that can be resumed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from kizzasi.eml.search.objective import Loss
from kizzasi.eml.search.optimizer import Optimizer


@dataclass(frozen=True)
class Minimum:
    """Where `minimize` got to.

    x            (R, n) best points.
    loss         (R) their losses.
    evaluations  candidates per problem, the first point included.
    history      (evaluations, mean best loss) after every step.
    state        resume with it, or save it with torch.save.
    """

    x: Tensor
    loss: Tensor
    evaluations: int
    history: list[tuple[int, float]] = field(repr=False)
    state: Any = field(repr=False)


@torch.no_grad()
def minimize(
    objective: Loss,
    optimizer: Optimizer,
    start: Tensor,
    *,
    evaluations: int,
    seed: int = 0,
    target: float | None = None,
    patience: int | None = None,
    min_improvement: float = 1e-4,
    progress: bool = False,
    resume: Minimum | None = None,
) -> Minimum:
    """Search for low losses without gradients.

    The result is a function of the objective, the optimiser, the start and the seed; stopping and
    resuming changes nothing.

    Args:
        objective: losses (R, P) of candidates (R, P, n).
        optimizer: from `optimizers.py` or `evolution.py`.
        start: (R, n) first points; ignored on resume.
        evaluations: candidates per problem in all, the resumed ones included; the last ask may
            overshoot.
        seed: of every random number.
        target: stop once every problem's loss is at or below it.
        patience: stop after this many steps in which the mean best loss fell by no more than
            the fraction min_improvement; None never does.
        progress: show a bar.
        resume: what an earlier call returned.
    """
    if resume is None:
        loss = objective(start[:, None])[:, 0]
        state, used, history = optimizer.init(start, loss, seed), 1, []
    else:
        state, used, history = resume.state, resume.evaluations, list(resume.history)
    with tqdm(total=evaluations, initial=used, disable=not progress, unit="eval") as bar:
        while used < evaluations:
            if target is not None and bool((state.best <= target).all()):
                break
            if patience is not None and _stalled(history, patience, min_improvement):
                break
            candidates = optimizer.ask(state)
            if candidates.shape[1] == 0:
                break
            state = optimizer.tell(state, candidates, objective(candidates))
            used += candidates.shape[1]
            history.append((used, float(state.best.mean())))
            bar.update(candidates.shape[1])
            bar.set_postfix(loss=f"{history[-1][1]:.4g}")
    return Minimum(state.x, state.best, used, history, state)


def _stalled(history: list[tuple[int, float]], patience: int, fraction: float) -> bool:
    if len(history) <= patience:
        return False
    before, now = history[-1 - patience][1], history[-1][1]
    return before - now <= fraction * abs(before)
