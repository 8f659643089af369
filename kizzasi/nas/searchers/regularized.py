"""Regularised evolution: the oldest member dies, not the worst.

P = population_size, S = sample_size.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from kizzasi.nas.searchers.ask_tell import Proposals, fresh, require_at_least, require_chance
from kizzasi.nas.searchers.stream import Stream
from kizzasi.nas.spaces.rng import Xorshift64
from kizzasi.nas.spaces.space import Space

C = TypeVar("C")


@dataclass(frozen=True)
class RegularizedEvolution:
    """Breed by mutation from the best of a few; each child pushes out the oldest member.

    A lucky score dies with its age: only a design that stays good when its children are trained
    stays in the population.

    Args:
        population_size: P, at least 1; the founders are random samples.
        sample_size: S, at least 1: members drawn without repetition, whose best is the parent;
            clipped to P.
        n_evaluations: candidates proposed in all, at least 1.
        mutation_prob: chance per gene, 0 .. 1; about 1 / genes changes one gene at a time.
        seed: 0 .. 2^64 - 1.
        n_children: bred from one population at once, as one batch; the algorithm has 1.

    Source: Real et al. 2018, arXiv:1802.01548, algorithm 1.
    Differs: members are drawn without repetition. A candidate is proposed once; a child that was
        there before is drawn again, and the search ends when 100 draws bring nothing new.
        Candidates must be hashable.
    """

    population_size: int
    sample_size: int
    n_evaluations: int
    mutation_prob: float
    seed: int
    n_children: int = 1

    def proposals(self, space: Space[C]) -> Proposals[C]:
        """Yield the founders in one batch, then the children."""
        self._check()
        rng = Xorshift64(self.seed)
        known: set[C] = set()
        size = min(self.population_size, self.n_evaluations)
        founders = fresh(lambda: space.sample(rng), known, size)
        population = deque(zip(founders, (yield founders), strict=True), maxlen=len(founders))
        while (left := self.n_evaluations - len(known)) > 0:
            draw = partial(self._child, population, space, rng)
            children = fresh(draw, known, min(self.n_children, left))
            if not children:
                return
            population.extend(zip(children, (yield children), strict=True))

    def stream(self, space: Space[C]) -> Stream[C]:
        """Yield founders until a population of them has scores, then a child at every call.

        Members enter in the order of their first scores. Who is trained further while it is a
        member is compared by its last score.
        """
        self._check()
        rng, known, proposed = Xorshift64(self.seed), set[C](), list[C]()
        scores, members = dict[int, float](), deque[int](maxlen=self.population_size)
        full = min(self.population_size, self.n_evaluations)
        while len(proposed) < self.n_evaluations:
            draw = partial(space.sample, rng)
            if len(members) >= full:
                population = deque((proposed[i], scores[i]) for i in members)
                draw = partial(self._child, population, space, rng)
            new = fresh(draw, known, 1)
            if not new:
                return
            proposed += new
            for number, score in (yield new[0]):
                if number not in scores:
                    members.append(number)
                scores[number] = score

    def _check(self) -> None:
        require_at_least(1, population_size=self.population_size, sample_size=self.sample_size)
        require_at_least(1, n_evaluations=self.n_evaluations, n_children=self.n_children)
        require_chance(mutation_prob=self.mutation_prob)

    def _child(self, population: deque[tuple[C, float]], space: Space[C], rng: Xorshift64) -> C:
        """Mutate the best of S members; of equals, the youngest."""
        ages = list(range(len(population)))
        rng.shuffle(ages)
        parent = max(sorted(ages[: self.sample_size], reverse=True), key=lambda i: population[i][1])
        return space.mutate(population[parent][0], rng, self.mutation_prob)
