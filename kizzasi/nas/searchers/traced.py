"""A space that remembers from whom its candidates were made."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Generic, TypeVar

from kizzasi.nas.spaces.rng import Xorshift64
from kizzasi.nas.spaces.space import Space

C = TypeVar("C")


class Traced(Generic[C]):
    """A space that knows, until the next `forget`, from whom each candidate was made. Its first
    samples are given."""

    def __init__(self, space: Space[C], first: Sequence[C] = ()) -> None:
        self.space = space
        self.left = list(reversed(first))
        self.origins: dict[C, tuple[C, ...]] = {}

    def sample(self, rng: Xorshift64) -> C:
        return self.left.pop() if self.left else self.space.sample(rng)

    def build(self, decide: Callable[[str, int], int]) -> C:
        return self._made(self.space.build(decide))

    def mutate(self, candidate: C, rng: Xorshift64, prob: float) -> C:
        return self._made(self.space.mutate(candidate, rng, prob), candidate)

    def crossover(self, a: C, b: C, rng: Xorshift64) -> C:
        return self._made(self.space.crossover(a, b, rng), a, b)

    def iterate(self, limit: int | None = None) -> Sequence[C]:
        return self.space.iterate(limit)

    def contains(self, candidate: C) -> bool:
        return self.space.contains(candidate)

    @property
    def size(self) -> int:
        return self.space.size

    def sampled(self, candidate: C) -> bool:
        """Whether the candidate was drawn at random."""
        return candidate not in self.origins

    def parents(self, candidate: C, known: Collection[C]) -> list[C]:
        """The nearest `known` candidates that it was made from; what lay between is skipped."""
        found: dict[C, None] = {}
        for origin in self.origins.get(candidate, ()):
            nearest = [origin] if origin in known else self.parents(origin, known)
            found.update(dict.fromkeys(nearest))
        return list(found)

    def forget(self) -> None:
        self.origins.clear()

    def _made(self, child: C, *origins: C) -> C:
        if child not in origins:
            self.origins.setdefault(child, origins)
        return child
