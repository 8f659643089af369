"""ASHA in its stopping form: a candidate goes on at once or is stopped for good.

r = min_budget;  R = max_budget;  eta as in the paper
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from kizzasi.nas.schedulers.schedule import FAILED, Results, Told, geometric_budgets
from kizzasi.nas.searchers.ask_tell import require_at_least


@dataclass(frozen=True)
class StoppingASHA:
    """Judge a candidate once at each rung, against whoever got there before it.

        goes on  <=>  fewer than max(1, floor(n / eta)) of the n scores at its rung, its own
                      included, are better than its own

    Nothing is paused, so a checkpoint lives no longer than its training. The price: early
    candidates meet no competition, and who starts slowly among early good starters is lost;
    see ASHA for the form that reconsiders.

    Args:
        n_candidates: how many to start, at least 1.
        min_budget: r, at least 1.
        max_budget: R; the last rung is the largest r * eta^k that is not above it.
        eta: at least 2.

    Source: the rule that popular tuners run under the name ASHA (Li et al. 2020,
        arXiv:1810.05934, describe promotion only); Salinas et al. 2022, "Syne Tune", type
        "stopping".
    Differs: counts with the floor of promotion ASHA where Syne Tune interpolates a quantile. Failed
        candidates count in n, as the worst.
    """

    n_candidates: int
    min_budget: int
    max_budget: int
    eta: int = 3

    def check(self) -> None:
        """Raises SpecError naming the setting and the rule."""
        require_at_least(1, n_candidates=self.n_candidates)
        geometric_budgets(self.min_budget, self.max_budget, self.eta)

    def budgets(self, candidate: int) -> Sequence[int]:
        if candidate >= self.n_candidates:
            return ()
        return geometric_budgets(self.min_budget, self.max_budget, self.eta)

    def survivors(self, results: Results) -> Sequence[int]:
        """Return who passed its last rung and has not trained on, in the order they passed."""
        last = len(self.budgets(0)) - 1

        def judge(state: _Judged, told: Told) -> None:
            candidate, rung, score = told
            state.going_on.pop(candidate, None)
            seen = state.seen[rung]
            insort(seen, -score)
            better = bisect_left(seen, -score)
            if score != FAILED and rung < last and better < max(1, len(seen) // self.eta):
                state.going_on[candidate] = None

        return list(results.fold(self, _Judged, judge).going_on)


@dataclass
class _Judged:
    """Losses by rung, best first, and who passed its last rung."""

    seen: defaultdict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    going_on: dict[int, None] = field(default_factory=dict)
