"""`Extrapolated`: any scheduler, led by where learning curves go instead of where they are.

t = budget of the last rung reached, t' = that of the next;  L = loss at t;  l(u) = training loss
at u
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kizzasi.errors import SpecError
from kizzasi.nas.schedulers.schedule import FAILED, Results, Scheduler

LAST = 0.5  # share of a curve, from its end, that its slope is read off
STEEPEST = 1.0


@dataclass(frozen=True)
class Extrapolated:
    """Show a scheduler, in place of each score, the one that its curve promises at the next budget.

        L(t') = L(t) (t' / t)^(-trust b),   b = - slope of log l(u) over log u,  t / 2 <= u <= t

    with b between 0 and 1. So who falls fast at an early rung may be promoted before who stands
    lower and has come to rest. Scores at the last budget stay, and so does a score that is no loss
    above 0, or that has no curve.

    Args:
        scheduler: who decides.
        trust: in the slope, 0 .. 1; with 0 nothing changes.

    Source: power laws of loss over data, Hestness et al. 2017, arXiv:1712.00409; promotions by
        predicted scores, Domhan et al. 2015, "Speeding up Automatic Hyperparameter Optimization of
        Deep Neural Networks by Extrapolation of Learning Curves".
        Differs: one local slope, and no posterior over curve families.
    """

    scheduler: Scheduler
    trust: float = 1.0

    def check(self) -> None:
        """Raises SpecError naming the setting and the rule."""
        if not 0 <= self.trust <= 1:
            raise SpecError(f"trust: {self.trust} is outside 0 .. 1")
        self.scheduler.check()

    def budgets(self, candidate: int) -> Sequence[int]:
        return self.scheduler.budgets(candidate)

    def survivors(self, results: Results) -> Sequence[int]:
        """Return who should train on by expected scores, as the inner scheduler decides."""
        return self.scheduler.survivors(results.view(self, self._expected))

    def _expected(self, results: Results, candidate: int, rung: int, score: float) -> float:
        budgets = self.budgets(candidate)
        if rung + 1 >= len(budgets):
            return score
        curve = results.curve(candidate, rung)
        return expected(score, curve, budgets[rung], budgets[rung + 1], self.trust)


def expected(
    score: float,
    curve: Sequence[tuple[float, float | None]],
    budget: float,
    later: float,
    trust: float = 1.0,
) -> float:
    """The score that a curve promises at a later budget.

    Args:
        score: higher is better: minus the loss.
        curve: (budget, training loss) pairs, rising; None where a loss was not finite.
        budget: of the score.
        later: of the wanted one.
        trust: see `Extrapolated`.
    """
    slope = steepness(curve)
    if score == FAILED or score >= 0 or slope is None:
        return score
    return score * (later / budget) ** (-trust * slope)


def steepness(curve: Sequence[tuple[float, float | None]]) -> float | None:
    """b of the curve's end, by least squares in logarithms; None with fewer than two points."""
    sound = [(t, loss) for t, loss in curve if loss is not None and 0 < loss < math.inf and t > 0]
    if len(sound) < 2:
        return None
    end = sound[-1][0]
    late = [point for point in sound if point[0] >= LAST * end]
    late = late if len(late) > 1 else sound[-2:]
    x, y = [math.log(t) for t, _ in late], [math.log(loss) for _, loss in late]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    width = sum((u - mean_x) ** 2 for u in x)
    if width == 0:
        return None
    slope = sum((u - mean_x) * (v - mean_y) for u, v in zip(x, y, strict=True)) / width
    return min(STEEPEST, max(0.0, -slope))
