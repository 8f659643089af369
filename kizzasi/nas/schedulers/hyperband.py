"""Hyperband: brackets of successive halving, from many short trainings to few long ones.

R = max_budget;  s = rungs of a bracket - 1;  n = its candidates;  r = its first budget
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle, takewhile

from kizzasi.nas.schedulers.halving import halve
from kizzasi.nas.schedulers.schedule import Results, geometric_budgets, ranked
from kizzasi.nas.searchers.ask_tell import require_at_least


@dataclass(frozen=True)
class Hyperband:
    """Hedge successive halving's bet on early scores: run one bracket for each first budget.

        s_max = floor(log_eta(R / min_budget));  for s = s_max, ..., 0:
            n = ceil((s_max + 1) / (s + 1) * eta^s),  r = R / eta^s

    and then all of them again. Workers that have to wait for a bracket's rung begin the next
    bracket.

    Args:
        min_budget: the paper's unit of budget, at least 1.
        max_budget: R; taken down to the largest min_budget * eta^k that is not above it.
        eta: at least 2.
        n_candidates: how many to start, at least 1; the last bracket may be short of members. None:
            those of one round.

    Source: Li et al. 2018, "Hyperband", JMLR 18(185), algorithm 1.
    Differs: R is min_budget * eta^s_max, so that every budget is a whole number, in every round; a
        rung's training continues from the checkpoint of the last; failed candidates are never kept.
    """

    min_budget: int
    max_budget: int
    eta: int = 3
    n_candidates: int | None = None

    def check(self) -> None:
        """Raises SpecError naming the setting and the rule."""
        geometric_budgets(self.min_budget, self.max_budget, self.eta)
        if self.n_candidates is not None:
            require_at_least(1, n_candidates=self.n_candidates)

    def brackets(self) -> Iterator[tuple[range, tuple[int, ...]]]:
        """Yield the candidates and budgets of each bracket, round after round."""
        budgets, sizes = self._round()
        end = sum(sizes) if self.n_candidates is None else self.n_candidates
        first = 0
        for skipped, n in cycle(enumerate(sizes)):
            if first >= end:
                return
            yield range(first, min(first + n, end)), budgets[skipped:]
            first += n

    def budgets(self, candidate: int) -> Sequence[int]:
        budgets, sizes = self._round()
        total = sum(sizes)
        if candidate >= (total if self.n_candidates is None else self.n_candidates):
            return ()
        skipped = bisect_right([*accumulate(sizes)], candidate % total)
        return budgets[skipped:]

    def _round(self) -> tuple[tuple[int, ...], list[int]]:
        """All budgets, and how many candidates each bracket of a round has."""
        budgets = geometric_budgets(self.min_budget, self.max_budget, self.eta)
        sizes = [-(-len(budgets) * self.eta**s // (s + 1)) for s in reversed(range(len(budgets)))]
        return budgets, sizes

    def survivors(self, results: Results) -> Sequence[int]:
        """Return who has to train on, earlier brackets first."""
        begun = takewhile(lambda bracket: bracket[0].start < results.n_begun, self.brackets())
        return [
            candidate
            for members, own in begun
            for candidate in halve(results, members, len(own), self._promoted, self)
        ]

    def _promoted(self, scores: Mapping[int, float], n: int, rung: int) -> list[int]:
        return ranked(scores)[: n // self.eta ** (rung + 1)]
