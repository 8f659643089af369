"""Local search: climb from a random start to a local optimum, then start anew."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

from kizzasi.errors import SpecError
from kizzasi.nas.searchers.ask_tell import Proposals, fresh, require_at_least, require_chance
from kizzasi.nas.searchers.stream import Stream
from kizzasi.nas.spaces.rng import Xorshift64
from kizzasi.nas.spaces.space import Space

C = TypeVar("C")


@dataclass(frozen=True)
class LocalSearch:
    """Move to a better neighbour while there is one; else restart at a random sample.

    Neighbours are mutants that this search has not proposed before. A place with no better one
    among `n_neighbours` of them counts as a local optimum.

    Args:
        n_evaluations: candidates proposed in all, at least 1.
        n_neighbours: tried at each place, at least 1.
        improvement: "best": try all neighbours, as one batch, and move to the best;
            "first": try one at a time and move to the first that is better.
        mutation_prob: chance per gene, 0 .. 1; about 1 / genes changes one gene at a time.
        seed: 0 .. 2^64 - 1.

    Source: White et al. 2020, arXiv:2005.02960, section 3.
    Differs: neighbours are sampled, not listed, so that any space will do. Candidates must be
        hashable.
    """

    n_evaluations: int
    n_neighbours: int
    improvement: Literal["best", "first"]
    mutation_prob: float
    seed: int

    def proposals(self, space: Space[C]) -> Proposals[C]:
        """Yield a start, then batches of neighbours, until the evaluations are used up."""
        self._check()
        rng = Xorshift64(self.seed)
        batch_size = self.n_neighbours if self.improvement == "best" else 1
        known: set[C] = set()
        place: tuple[C, float] | None = None
        tried = 0  # neighbours of this place
        while (left := self.n_evaluations - len(known)) > 0:
            batch: list[C] = []
            if place is not None and tried < self.n_neighbours:
                here = partial(space.mutate, place[0], rng, self.mutation_prob)
                batch = fresh(here, known, min(batch_size, left))
            if not batch:
                place, tried = None, 0
                batch = fresh(partial(space.sample, rng), known, 1)
            if not batch:
                return
            scores = yield batch
            tried += len(batch)
            best = max(range(len(batch)), key=scores.__getitem__)
            if place is None or scores[best] > place[1]:
                place, tried = (batch[best], scores[best]), 0

    def stream(self, space: Space[C]) -> Stream[C]:
        """Yield a neighbour of the best place since the last restart, at every call.

        A neighbour whose score is better becomes the place at once; `improvement` says nothing
        here. After `n_neighbours` scores that were no better, the climb starts anew.
        """
        self._check()
        rng, known, proposed = Xorshift64(self.seed), set[C](), list[C]()
        scores, first, tried = dict[int, float](), 0, 0
        place: int | None = None
        while len(proposed) < self.n_evaluations:
            new: list[C] = []
            if place is not None and tried < self.n_neighbours:
                new = fresh(
                    partial(space.mutate, proposed[place], rng, self.mutation_prob), known, 1
                )
            if not new:
                if place is not None:
                    place, tried, first = None, 0, len(proposed)
                new = fresh(partial(space.sample, rng), known, 1)
            if not new:
                return
            proposed += new
            for number, score in (yield new[0]):
                scores[number] = score
                if number < first:
                    continue  # of a climb that is over
                if place is None or score > scores[place]:
                    place, tried = number, 0
                else:
                    tried += 1

    def _check(self) -> None:
        require_at_least(1, n_evaluations=self.n_evaluations, n_neighbours=self.n_neighbours)
        require_chance(mutation_prob=self.mutation_prob)
        if self.improvement not in ("best", "first"):
            raise SpecError(f"improvement: {self.improvement!r} is not 'best' or 'first'")
