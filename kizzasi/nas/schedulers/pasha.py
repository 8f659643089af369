"""PASHA: ASHA whose largest budget grows only while longer training still changes the ranking.

r = min_budget;  R = max_budget;  epsilon, eta as in the paper;  top = the paper's K_t
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from kizzasi.errors import SpecError
from kizzasi.nas.schedulers.asha import promotable
from kizzasi.nas.schedulers.schedule import FAILED, Results, Told, geometric_budgets, ranked
from kizzasi.nas.searchers.ask_tell import require_at_least

NOISY = 90  # percentile of the distances between candidates that swap back and forth


@dataclass(frozen=True)
class PASHA:
    """Begin with two rungs; open the next one when the two top rungs rank differently.

    The rankings of those in the top rung agree when the i-th best there is, on the rung below,
    within epsilon of the i-th best there, for every i. Checked at each result of the top rung.

        epsilon = 90th percentile of |score of a - score of b| on the top rung, over the pairs there
                  whose order on the rungs up to it changed at least twice

    It is 0 at first, and stays as it is while there is no such pair.

    Args:
        n_candidates: how many to start, at least 1.
        min_budget: r, at least 1.
        max_budget: R; the top rung never grows past the largest r * eta^k not above it.
        eta: at least 2.
        epsilon: scores that differ by no more are equal; 0 or more, such as the spread of a score
            over seeds. With 0 any swap opens a rung. None: estimated, as above.

    Source: Bohdal et al. 2023, arXiv:2207.06940, algorithm 1, its soft ranking and the estimate of
        epsilon.
    Differs: candidates are scored at rungs alone, so a curve has one point at each rung and the
        third rung opens with epsilon = 0. Of equal scores neither is ahead. Failed candidates count
        in a rung's size, and in no ranking.
    """

    n_candidates: int
    min_budget: int
    max_budget: int
    eta: int = 3
    epsilon: float | None = None

    def check(self) -> None:
        """Raises SpecError naming the setting and the rule."""
        require_at_least(1, n_candidates=self.n_candidates)
        geometric_budgets(self.min_budget, self.max_budget, self.eta)
        if self.epsilon is not None and not self.epsilon >= 0:
            raise SpecError(
                f"epsilon: {self.epsilon} is not a distance of scores; give 0 or more, or None"
            )

    def budgets(self, candidate: int) -> Sequence[int]:
        if candidate >= self.n_candidates:
            return ()
        return geometric_budgets(self.min_budget, self.max_budget, self.eta)

    def survivors(self, results: Results) -> Sequence[int]:
        """Return all promotable candidates below the top rung, highest rung first."""
        return promotable(results, self.top(results), self.eta)

    def top(self, results: Results) -> int:
        """Return the highest rung that is open after these results."""
        return self._state(results).top

    def tolerance(self, results: Results) -> float:
        """Return the epsilon that stands after these results, given or estimated."""
        state = self._state(results)
        return _estimate(state.noisy, state.epsilon)

    def _state(self, results: Results) -> _State:
        last = len(self.budgets(0)) - 1

        def begin() -> _State:
            return _State(min(1, last), self.epsilon or 0.0, [{} for _ in range(last + 1)])

        def step(state: _State, told: Told) -> None:
            candidate, rung, score = told
            rungs, top = state.rungs, state.top
            rungs[rung][candidate] = score
            if rung != top or score == FAILED:
                return
            if self.epsilon is None and top > 1:  # nobody swaps twice on two rungs
                state.noisy += _noisy_distances(rungs[: top + 1], candidate)
            gap = _disagreement(rungs[top - 1], rungs[top]) if top < last else 0.0
            if gap and gap > (now := _estimate(state.noisy, state.epsilon)):
                state.top, state.epsilon, state.noisy = top + 1, now, []

        return results.fold(self, begin, step)


@dataclass
class _State:
    """The open rungs, what counts as equal, the scores by rung, and the noisy distances."""

    top: int
    epsilon: float
    rungs: list[dict[int, float]]
    noisy: list[float] = field(default_factory=list)  # of those in the top rung


def _disagreement(below: Mapping[int, float], above: Mapping[int, float]) -> float:
    """The farthest that two who share a place, one on each rung, are apart on the lower one."""
    now = ranked(above)
    before = {candidate: below[candidate] for candidate in now}
    places = zip(now, ranked(before), strict=True)
    return max(abs(before[candidate] - before[then]) for candidate, then in places)


def _estimate(noisy: Sequence[float], epsilon: float) -> float:
    return float(np.percentile(noisy, NOISY)) if noisy else epsilon


def _noisy_distances(rungs: Sequence[Mapping[int, float]], candidate: int) -> list[float]:
    """How far a candidate is, on the last of these rungs, from each with whom it swaps twice."""
    found = []
    for other, score in rungs[-1].items():
        gaps = [scores[candidate] - scores[other] for scores in rungs]
        ahead = [gap > 0 for gap in gaps if gap]
        swaps = sum(a != b for a, b in pairwise(ahead))
        if swaps > 1 and gaps[-1] and score != FAILED:
            found.append(abs(gaps[-1]))
    return found
