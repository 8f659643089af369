"""A space whose moves are the best of several draws, by a judge that costs less than training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from kizzasi.nas.spaces.rng import Xorshift64
from kizzasi.nas.spaces.space import Space

C = TypeVar("C")

# Of the draws for one place and their parent: the score of each, higher is better.
Judge = Callable[[Sequence[Any], Any], Sequence["float | None"]]


def one_at_a_time(score: Callable[[Any, Any], float | None]) -> Judge:
    """A judge of a function of one draw and its parent."""
    return lambda draws, parent: [score(draw, parent) for draw in draws]


class Screened(Generic[C]):
    """A space whose moves return the best of several draws; itself a space, for any searcher.

    A draw that was returned before comes after those that were not, a draw that cannot be judged
    after those that can; of equals, the first. `build` and `iterate` leave nothing to choose.

    Args:
        space: to draw from.
        judge: gives each draw a score; None where it cannot.
        width: draws for each place, at least 1.
    """

    def __init__(self, space: Space[C], judge: Judge, width: int) -> None:
        self.space, self.judge, self.width = space, judge, width
        self.given: set[C] = set()

    @property
    def size(self) -> int:
        return self.space.size

    def sample(self, rng: Xorshift64) -> C:
        """The best of several samples."""
        return self._best(lambda: self.space.sample(rng), None)

    def build(self, decide: Callable[[str, int], int]) -> C:
        return self.space.build(decide)

    def mutate(self, candidate: C, rng: Xorshift64, prob: float) -> C:
        """The best of several mutants of one parent."""
        return self._best(lambda: self.space.mutate(candidate, rng, prob), candidate)

    def crossover(self, a: C, b: C, rng: Xorshift64) -> C:
        """The best of several children of two parents; weights are inherited from `a`."""
        return self._best(lambda: self.space.crossover(a, b, rng), a)

    def iterate(self, limit: int | None = None) -> Sequence[C]:
        return self.space.iterate(limit)

    def contains(self, candidate: C) -> bool:
        return self.space.contains(candidate)

    def _best(self, draw: Callable[[], C], parent: C | None) -> C:
        draws = list(dict.fromkeys(draw() for _ in range(self.width)))
        new = [d for d in draws if d not in self.given and d != parent] or draws
        chosen = new[0]
        if len(new) > 1:
            scores = [_number(score) for score in self.judge(new, parent)]
            chosen = new[max(range(len(new)), key=scores.__getitem__)]
        self.given.add(chosen)
        return chosen


def _number(score: float | None) -> float:
    return -math.inf if score is None or math.isnan(score) else score
