"""NSGA-II: evolution towards the front of several objectives, all of them minimised.

front   candidates that no other dominates: none is as good in all objectives and better in one.
rank    0 on the front, 1 on the front of the others, and so on.
crowding  how far apart a candidate's neighbours on its front are, summed over objectives.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike

from kizzasi.errors import ShapeError
from kizzasi.nas.searchers.ask_tell import Proposals, fresh, require_at_least, require_chance
from kizzasi.nas.spaces.rng import Xorshift64
from kizzasi.nas.spaces.space import Space

C = TypeVar("C")


@dataclass(frozen=True)
class NSGA2:
    """Breed by tournaments of rank and crowding; the best of parents and children survive.

    Scores are tuples, one number per objective, lower is better; NaN and infinity count as the
    worst.

    Args:
        population_size: N, at least 2; the founders are random samples.
        n_generations: at least 0; each proposes N children in one batch.
        crossover_prob: chance that a child has two parents, 0 .. 1.
        mutation_prob: chance per gene, 0 .. 1.
        seed: 0 .. 2^64 - 1.

    Source: Deb et al. 2002, "A fast and elitist multiobjective genetic algorithm: NSGA-II", IEEE
        Trans. Evol. Comput. 6(2), section III.
    Differs: a candidate is proposed once; a child that was there before is drawn again, and the
        search ends when 100 draws bring nothing new. Candidates must be hashable.
    """

    population_size: int
    n_generations: int
    crossover_prob: float
    mutation_prob: float
    seed: int

    def proposals(self, space: Space[C]) -> Proposals[C]:
        """Yield the founders in one batch, then each generation in one."""
        require_at_least(2, population_size=self.population_size)
        require_at_least(0, n_generations=self.n_generations)
        require_chance(crossover_prob=self.crossover_prob, mutation_prob=self.mutation_prob)
        rng = Xorshift64(self.seed)
        known: set[C] = set()
        people: list[C] = []
        scores = rank = crowding = np.empty(0)

        def child() -> C:
            def parent() -> C:
                a, b = (rng.choice(range(len(people))) for _ in range(2))
                return people[min(a, b, key=lambda i: (rank[i], -crowding[i]))]

            born = parent()
            if rng.next_f64() < self.crossover_prob:
                born = space.crossover(born, parent(), rng)
            return space.mutate(born, rng, self.mutation_prob)

        for _ in range(self.n_generations + 1):
            draw = child if people else partial(space.sample, rng)
            batch = fresh(draw, known, self.population_size)
            if not batch:
                return
            told = _objectives((yield batch))
            scores = np.concatenate([scores, told]) if people else told
            people += batch
            rank, crowding = rank_and_crowding(scores)
            kept = np.lexsort((-crowding, rank))[: self.population_size]
            people = [people[i] for i in kept]
            scores, rank, crowding = scores[kept], rank[kept], crowding[kept]


def rank_and_crowding(scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Sort candidates into fronts and measure how lonely each is on its own.

    Args:
        scores: (n, objectives), lower is better; no NaN.

    Returns:
        (n,) int64 ranks from 0, and (n,) float64 crowding distances, infinite at the ends.
    """
    scores = np.asarray(scores, dtype=np.float64)
    no_worse = (scores[:, None] <= scores[None]).all(-1)
    dominates = no_worse & ~no_worse.T  # [i, j]: i dominates j
    n_above = dominates.sum(0)
    rank = np.full(len(scores), -1)
    crowding = np.zeros(len(scores))
    level = 0
    while (front := np.flatnonzero((rank < 0) & (n_above == 0))).size:
        rank[front] = level
        crowding[front] = _crowding(scores[front])
        n_above = n_above - dominates[front].sum(0)
        level += 1
    return rank, crowding


def pareto_front(scores: ArrayLike) -> list[int]:
    """The positions of the scores that no other dominates; equal scores are all in.

    Args:
        scores: (n, objectives), lower is better; NaN counts as infinity.
    """
    rows, front = _objectives(scores), []
    for place in np.lexsort(rows.T[::-1]).tolist():  # who dominates another comes before it
        others = rows[front]
        no_worse, better = others <= rows[place], others < rows[place]
        if not (no_worse.all(1) & better.any(1)).any():
            front.append(place)
    return sorted(front)


def _objectives(scores: ArrayLike) -> np.ndarray:
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 2:
        raise ShapeError(
            f"scores: shape {array.shape}, expected (candidates, objectives); "
            "give a tuple for each candidate, one number per objective"
        )
    return np.where(np.isnan(array), np.inf, array)


def _crowding(scores: np.ndarray) -> np.ndarray:
    n, total = len(scores), np.zeros(len(scores))
    finite = np.where(np.isinf(scores), np.sign(scores) * np.finfo(np.float64).max / 4, scores)
    for column in finite.T:
        order = np.argsort(column, kind="stable")
        spread = column[order[-1]] - column[order[0]]
        total[order[[0, -1]]] = np.inf
        if spread > 0 and n > 2:
            total[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / spread
    return total
