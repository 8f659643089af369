"""ASHA: successive halving that never waits, by pausing candidates and promoting them later.

r = min_budget;  R = max_budget;  eta and k as in the paper;  s = 0 (fold it into min_budget)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kizzasi.nas.schedulers.schedule import Results, geometric_budgets
from kizzasi.nas.searchers.ask_tell import require_at_least


@dataclass(frozen=True)
class ASHA:
    """Promote whoever is in the best 1 / eta of its rung now; if there is none, start a new one.

        promotable[k] = best floor(|rung k| / eta) of rung k, less those promoted before

    Everyone pauses at its rung and may be promoted at any later time, so a slow starter has its
    chance as the rung fills with worse ones. The study ends when no one can be promoted.

    Args:
        n_candidates: how many to start, at least 1.
        min_budget: r, at least 1.
        max_budget: R; the last rung is the largest r * eta^k that is not above it.
        eta: at least 2.

    Source: Li et al. 2020, arXiv:1810.05934, algorithm 2.
    Differs: failed candidates count in |rung k|, as the worst there, and are never promoted.
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
        """Return all promotable candidates, highest rung first, best first."""
        return promotable(results, len(self.budgets(0)) - 1, self.eta)


def promotable(results: Results, top: int, eta: int) -> list[int]:
    """Return who can be promoted into a rung up to `top`, highest rung first, best first."""
    found = []
    for k in reversed(range(top)):
        found += results.resting(k, len(results.rung(k)) // eta)
    return found
