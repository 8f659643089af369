"""Synchronous successive halving: a rung is judged when everyone in it has been scored.

n[k] = candidates that are trained to the budget rungs[k];  eta as in the paper
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from kizzasi.errors import SpecError
from kizzasi.nas.schedulers.schedule import Results, ranked


@dataclass(frozen=True)
class Halving:
    """Train everyone to the first budget, the best of them to the next, and so on.

    With keep = eta, a whole number, that is the paper's: n[k] = floor(n / eta^k). With a share,
    n[k + 1] = round(keep * n[k]), at least 2. The best preset and the best searched candidate of a
    rung are always among them, candidates from outside the band never.

    Args:
        rungs: budgets, rising; the paper's are `geometric_budgets(r, R, eta)`.
        keep: the share of a rung's members that is passed on, between 0 and 1; or eta, at least 2.
        n_candidates: how many to start; None takes all that the searcher proposes.
        group_of: the group of a candidate; a search puts in its own.

    Source: Jamieson & Talwalkar 2016, arXiv:1502.07943; Li et al. 2020, arXiv:1810.05934, alg. 1.
    Differs: a failed candidate is never kept, even if fewer than n[k] are left. A searcher that
        ends early makes n what it proposed; at least one goes on from every rung.
    """

    rungs: tuple[int, ...]
    keep: float
    n_candidates: int | None = None
    group_of: Callable[[int], str] = field(default=lambda candidate: "searched", repr=False)

    def check(self) -> None:
        """Raises SpecError naming the setting and the rule."""
        rising = all(a < b for a, b in zip((0, *self.rungs), self.rungs, strict=False))
        if not self.rungs or not rising:
            raise SpecError(f"rungs: {self.rungs} must be rising budgets above 0")
        eta = isinstance(self.keep, int)
        if not (self.keep >= 2 if eta else 0 < self.keep < 1):
            raise SpecError(f"keep: {self.keep}; give a share in (0, 1), or a whole number from 2")
        least = self.keep ** (len(self.rungs) - 1) if eta else 1
        if self.n_candidates is not None and self.n_candidates < least:
            raise SpecError(
                f"n_candidates: {self.n_candidates} leave nobody for the budget {self.rungs[-1]}; "
                f"give at least {least}, or fewer rungs"
            )

    def budgets(self, candidate: int) -> Sequence[int]:
        over = self.n_candidates is not None and candidate >= self.n_candidates
        return () if over else self.rungs

    def survivors(self, results: Results) -> Sequence[int]:
        """Return the members of the lowest unfinished rung that are not scored there yet."""
        known = [n for n in (self.n_candidates, results.n_candidates) if n is not None]
        everyone = range(min(known, default=0))
        return halve(results, everyone, len(self.rungs), self._promoted, self)

    def _promoted(self, scores: Mapping[int, float], n: int, rung: int) -> list[int]:
        inside = [c for c in ranked(scores) if self.group_of(c) != "outside"]
        keep = self.keep
        eta = isinstance(keep, int)
        most = n // keep ** (rung + 1) if eta else max(2, round(keep * len(scores)))
        kept = set(inside[:most])
        kept.update([c for c in inside if self.group_of(c) == "preset"][:1])
        kept.update([c for c in inside if self.group_of(c) != "preset"][:1])
        return [c for c in inside if c in kept]


# Of a rung's scores, n at the start, and the rung: who is passed on, best first.
Promoted = Callable[[Mapping[int, float], int, int], Sequence[int]]


def halve(
    results: Results, members: range, n_rungs: int, promoted: Promoted, key: Hashable
) -> Sequence[int]:
    """Return who of a bracket's members has to train on: those of its lowest unfinished rung, from
    the second one on, that are not scored there yet.

    Args:
        results: everything told.
        members: the candidates of the bracket.
        n_rungs: of the bracket.
        promoted: says who is passed on from a complete rung.
        key: of the scheduler.
    """
    if results.n_candidates is not None:
        members = range(members.start, min(members.stop, results.n_candidates))
    if len(results.rung(0)) < len(members):
        return []
    standing: Sequence[int] = members
    for k in range(n_rungs):
        scores, here = results.rung(k), (key, members, k)
        if here not in results.settled:
            if missing := [candidate for candidate in standing if candidate not in scores]:
                return missing if k else []
            judged = {candidate: scores[candidate] for candidate in standing}
            results.settled[here] = promoted(judged, len(members), k)
        standing = results.settled[here]
    return []
