"""A sweep in two halves: ASHA for breadth, and its survivors over hurdles for depth.

r, R, eta as in `ASHA`;  h_k = hurdle k, between stages k and k + 1 of the depth
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from kizzasi.errors import SpecError
from kizzasi.nas.schedulers.asha import promotable
from kizzasi.nas.schedulers.schedule import Results, geometric_budgets, ranked
from kizzasi.nas.searchers.ask_tell import require_at_least


@dataclass(frozen=True)
class Sweep:
    """Halve many candidates, then train those at the last rung on, as long as they clear hurdles.

        h_k = mean score of all that were trained to depth k (to R, if k = 0)
        to depth k + 1 go those above h_k; at least the best one goes

    Everyone trains on from its own checkpoint. The depth begins when the breadth has ended, and a
    hurdle is set when all that were to reach its depth have: so the last stage is always reached,
    unless everyone fails.

    Args:
        n_candidates: how many take part, at least 1.
        min_budget, max_budget, eta: of the breadth; see `ASHA`.
        stages: of the depth: rising budgets above the last rung of the breadth. () ends there.

    Source: Li et al. 2020, arXiv:1810.05934, algorithm 2; So et al. 2019, arXiv:1901.11117, on
        progressive dynamic hurdles.
    Differs: ASHA's survivors are the population, which is complete when its hurdles are set, where
        the paper's is bred while they rise. Where fewer than eta reach a rung, its best goes on.
    """

    n_candidates: int
    min_budget: int
    max_budget: int
    eta: int = 3
    stages: tuple[int, ...] = ()

    def check(self) -> None:
        """Raises SpecError naming the setting and the rule."""
        require_at_least(1, n_candidates=self.n_candidates)
        last = self.breadth[-1]
        rising = all(a < b for a, b in zip((last, *self.stages), self.stages, strict=False))
        if not rising:
            raise SpecError(f"stages: {self.stages} must be rising budgets above {last}")

    @property
    def breadth(self) -> tuple[int, ...]:
        """The budgets of ASHA's rungs."""
        return geometric_budgets(self.min_budget, self.max_budget, self.eta)

    def budgets(self, candidate: int) -> Sequence[int]:
        return (*self.breadth, *self.stages) if candidate < self.n_candidates else ()

    def survivors(self, results: Results) -> Sequence[int]:
        """Return who is promoted by ASHA, or when all has settled, who clears the hurdles."""
        top = len(self.breadth) - 1
        if promoted := promotable(results, top, self.eta):
            return promoted
        n = self.n_candidates if results.n_candidates is None else results.n_candidates
        if len(results.rung(0)) < min(n, self.n_candidates):
            return ()
        for rung in range(top):  # too few for one in eta: the best goes on
            here, above = ranked(results.rung(rung)), results.rung(rung + 1)
            if here and not above:
                return here[:1]
        expected: set[int] = set(results.rung(top))
        for rung in range(top, top + len(self.stages)):
            cleared = self.cleared(results.rung(rung))
            here, above = results.rung(rung), results.rung(rung + 1)
            if expected - here.keys():
                return ()
            if waiting := [candidate for candidate in cleared if candidate not in above]:
                return waiting
            expected = set(cleared)
        return ()

    def cleared(self, scores: Mapping[int, float]) -> list[int]:
        """Who is above the mean of these scores, best first; the best alone if nobody is."""
        order = ranked(scores)
        if not order:
            return []
        hurdle = fmean(scores[candidate] for candidate in order)
        return [candidate for candidate in order if scores[candidate] > hurdle] or order[:1]
