"""PASHA: ASHA whose largest budget grows only while longer training still changes the ranking.

r = min_budget;  R = max_budget;  epsilon, eta as in the paper;  top = the paper's K_t
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kizzasi.errors import SpecError
from kizzasi.nas.schedulers.asha import promotable
from kizzasi.nas.schedulers.schedule import Results, geometric_budgets, ranked
from kizzasi.nas.searchers.search import require_at_least


@dataclass(frozen=True)
class PASHA:
    """Begin with two rungs; open the next one when the two top rungs rank differently.

    The rankings of those in the top rung agree when the i-th best there is, on the rung below,
    within epsilon of the i-th best there, for every i. Checked at each result of the top rung.

    Args:
        n_candidates: how many to start, at least 1.
        min_budget: r, at least 1.
        max_budget: R; the top rung never grows past the largest r * eta^k not above it.
        eta: at least 2.
        epsilon: scores that differ by no more are equal; 0 or more. The noise of a score, such as
            its spread over seeds, is a good value; with 0 any swap opens a rung.

    Source: Bohdal et al. 2022, arXiv:2207.06940, algorithm 1 and its soft ranking.
    Differs: epsilon is given, not estimated from the curves between rungs, where nothing is scored
        here. Failed candidates count in a rung's size, and in no ranking.
    """

    n_candidates: int
    min_budget: int
    max_budget: int
    eta: int = 3
    epsilon: float = 0.0

    def check(self) -> None:
        """Raises SpecError naming the setting and the rule."""
        require_at_least(1, n_candidates=self.n_candidates)
        geometric_budgets(self.min_budget, self.max_budget, self.eta)
        if not self.epsilon >= 0:
            raise SpecError(f"epsilon: {self.epsilon} is not a distance of scores; give 0 or more")

    def budgets(self, candidate: int) -> Sequence[int]:
        if candidate >= self.n_candidates:
            return ()
        return geometric_budgets(self.min_budget, self.max_budget, self.eta)

    def survivors(self, results: Results) -> Sequence[int]:
        """Return all promotable candidates below the top rung, highest rung first."""
        return promotable(results, self.top(results), self.eta)

    def top(self, results: Results) -> int:
        """Return the highest rung that is open after these results."""
        last = len(self.budgets(0)) - 1
        top = min(1, last)
        rungs: list[dict[int, float]] = [{} for _ in range(last + 1)]
        for candidate, rung, score in results.told:
            rungs[rung][candidate] = score
            if rung == top < last and not self._agree(rungs[top - 1], rungs[top]):
                top += 1
        return top

    def _agree(self, below: Mapping[int, float], above: Mapping[int, float]) -> bool:
        now = ranked(above)
        before = {candidate: below[candidate] for candidate in now}
        return all(
            abs(before[candidate] - before[then]) <= self.epsilon
            for candidate, then in zip(now, ranked(before), strict=True)
        )
