"""Evolution: a steady-state (mu + 1) algorithm, one child at a time.

mu = population_size. A generation is mu children; a child may be a parent at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from kizzasi.errors import SpecError
from kizzasi.nas.searchers.ask_tell import Proposals, require_at_least
from kizzasi.nas.spaces.rng import Xorshift64
from kizzasi.nas.spaces.space import Space

C = TypeVar("C")


@dataclass(frozen=True)
class Evolution:
    """Breed a population: two tournaments, crossover, mutation; a better child ousts the worst.

    Args:
        population_size: mu, at least 1; the founders are random samples.
        n_generations: at least 0; each proposes `population_size` children.
        tournament_size: contestants for a parent's place, clipped to 1 .. mu.
        mutation_prob: chance per gene, 0 .. 1.
        seed: 0 .. 2^64 - 1.
    """

    population_size: int
    n_generations: int
    tournament_size: int
    mutation_prob: float
    seed: int

    def proposals(self, space: Space[C]) -> Proposals[C]:
        """Yield the founders in one batch, then the children one by one."""
        require_at_least(1, population_size=self.population_size)
        require_at_least(0, n_generations=self.n_generations)
        if not 0 <= self.mutation_prob <= 1:
            raise SpecError(f"mutation_prob: {self.mutation_prob} is not in 0 .. 1; give a chance")
        rng = Xorshift64(self.seed)
        founders_rng = Xorshift64(rng.next_u64())
        population = [space.sample(founders_rng) for _ in range(self.population_size)]
        scores = list((yield list(population)))
        for _ in range(self.n_generations * self.population_size):
            mother = population[self._tournament(scores, rng)]
            father = population[self._tournament(scores, rng)]
            child = space.crossover(mother, father, rng)
            child = space.mutate(child, rng, self.mutation_prob)
            (score,) = yield [child]
            worst = scores.index(min(scores))
            if score > scores[worst]:
                population[worst], scores[worst] = child, score

    def _tournament(self, scores: Sequence[float], rng: Xorshift64) -> int:
        """Return the best of a few random members; of equals, the last one drawn."""
        members = list(range(len(scores)))
        rng.shuffle(members)
        contestants = members[: max(1, self.tournament_size)]
        return max(reversed(contestants), key=scores.__getitem__)
