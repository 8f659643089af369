"""Synchronous successive halving: a rung is judged when everyone in it has been scored.

n = n_candidates;  r = min_budget;  R = max_budget;  eta as in the paper;  k = the paper's i
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kizzasi.errors import SpecError
from kizzasi.nas.schedulers.schedule import Results, geometric_budgets, ranked


@dataclass(frozen=True)
class SuccessiveHalving:
    """Train n candidates to r, the best n / eta of them to r * eta, and so on up to R.

        n[k] = floor(n / eta^k) candidates are trained up to r[k] = r * eta^k

    Continuing from checkpoints, that is  n[0] r[0] + sum_k n[k] (r[k] - r[k-1])  steps.

    Args:
        n_candidates: n, at least eta^K, so that someone reaches the last rung K.
        min_budget: r, at least 1.
        max_budget: R; the last rung is the largest r * eta^k that is not above it.
        eta: at least 2.

    Source: Jamieson & Talwalkar 2016, arXiv:1502.07943; Li et al. 2020, arXiv:1810.05934, alg. 1.
    Differs: a failed candidate is never kept, even if fewer than n[k] are left. A searcher that
        ends early makes n what it proposed.
    """

    n_candidates: int
    min_budget: int
    max_budget: int
    eta: int = 3

    def check(self) -> None:
        """Raises SpecError naming the setting and the rule."""
        budgets = geometric_budgets(self.min_budget, self.max_budget, self.eta)
        least = self.eta ** (len(budgets) - 1)
        if self.n_candidates < least:
            raise SpecError(
                f"n_candidates: {self.n_candidates} leave nobody for the budget {budgets[-1]}; "
                f"give at least {least}, or a smaller max_budget"
            )

    def budgets(self, candidate: int) -> Sequence[int]:
        if candidate >= self.n_candidates:
            return ()
        return geometric_budgets(self.min_budget, self.max_budget, self.eta)

    def survivors(self, results: Results) -> Sequence[int]:
        """Return the members of the lowest unfinished rung that are not scored there yet."""
        return halve(results, range(self.n_candidates), len(self.budgets(0)), self.eta)


def halve(results: Results, members: range, n_rungs: int, eta: int) -> list[int]:
    """Return who of a bracket's members has to train on.

    Args:
        results: everything told.
        members: the candidates of the bracket.
        n_rungs: of the bracket.
        eta: see SuccessiveHalving.
    """
    if results.n_candidates is not None:
        members = range(members.start, min(members.stop, results.n_candidates))
    left, n = list(members), len(members)
    for k in range(n_rungs):
        scores = results.rung(k)
        if missing := [candidate for candidate in left if candidate not in scores]:
            return missing if k else []
        n //= eta
        left = ranked({candidate: scores[candidate] for candidate in left})[:n]
    return []


@dataclass(frozen=True)
class Halving:
    """Synchronous halving with a place for those that the result is compared with.

    A rung passes on the best `keep` of its members, at least 2; the best preset and the best
    searched candidate are always among them, candidates from outside the band never.

    Args:
        rungs: budgets, rising.
        keep: share of a rung's members, 0 .. 1.
        group_of: the group of a candidate; a search puts in its own.
    """

    rungs: tuple[int, ...]
    keep: float
    group_of: Callable[[int], str] = lambda candidate: "searched"

    def check(self) -> None:
        """The config has been checked."""

    def budgets(self, candidate: int) -> Sequence[int]:
        return self.rungs

    def survivors(self, results: Results) -> Sequence[int]:
        """Return the members of the lowest unfinished rung that are not scored there yet."""
        standing = list(range(results.n_candidates or 0))
        for k in range(len(self.rungs)):
            scores = results.rung(k)
            if missing := [candidate for candidate in standing if candidate not in scores]:
                return missing if k else []
            standing = self._promoted({c: scores[c] for c in standing})
        return []

    def _promoted(self, scores: dict[int, float]) -> list[int]:
        inside = [c for c in ranked(scores) if self.group_of(c) != "outside"]
        kept = set(inside[: max(2, round(self.keep * len(scores)))])
        kept.update([c for c in inside if self.group_of(c) == "preset"][:1])
        kept.update([c for c in inside if self.group_of(c) != "preset"][:1])
        return [c for c in inside if c in kept]
