"""Moves between models that take whole layers: insert, delete, exchange, swap, and cross over.

A gene at a time, a model of equal layers becomes one with another layer last only if its pattern,
its depth and the layer's own genes change together. As a move of layers it is one step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

from kizzasi.errors import SpecError
from kizzasi.models import LayerSpec
from kizzasi.nas.spaces.model_space import Candidate, ModelSpace
from kizzasi.nas.spaces.rng import Xorshift64

TRIES = 8  # moves that may lead out of the space before genes are moved instead


class LayerMoves:
    """A space of models that moves layers as often as genes; itself a space, for any searcher.

    A mutation inserts, deletes, exchanges or swaps a layer; a new layer comes from a random
    candidate or, as often, from one of those given. A crossover takes the first layers of one
    parent and the last ones of the other. What leads out of the space is tried again, and at last
    left to the genes.

    Args:
        space: of models.
        given: candidates whose layers are known to be good, such as presets.
        share: of moves that take layers, 0 .. 1.
    """

    def __init__(
        self, space: ModelSpace, given: Sequence[Candidate] = (), share: float = 0.5
    ) -> None:
        self.space, self.given, self.share = space, given, share

    @property
    def size(self) -> int:
        return self.space.size

    def sample(self, rng: Xorshift64) -> Candidate:
        return self.space.sample(rng)

    def build(self, decide: Callable[[str, int], int]) -> Candidate:
        return self.space.build(decide)

    def mutate(self, candidate: Candidate, rng: Xorshift64, prob: float) -> Candidate:
        """Change a layer, or each gene with probability `prob`; with 0, nothing."""
        if prob and rng.next_f64() < self.share:
            for _ in range(TRIES):
                child = self._made(candidate, self._edited(candidate.spec.blocks, rng))
                if child is not None:
                    return child
        return self.space.mutate(candidate, rng, prob)

    def crossover(self, a: Candidate, b: Candidate, rng: Xorshift64) -> Candidate:
        """The first layers of `a` and the last ones of `b`, or genes of both."""
        if a != b and rng.next_f64() < self.share:
            first, last = a.spec.blocks, b.spec.blocks
            n, m = rng.choice(range(1, len(first) + 1)), rng.choice(range(1, len(last) + 1))
            child = self._made(a, (*first[:n], *last[len(last) - m :]))
            if child is not None:
                return child
        return self.space.crossover(a, b, rng)

    def sizes(self, candidate: Candidate) -> Sequence[Callable[[], Candidate | None]]:
        return self.space.sizes(candidate)

    def iterate(self, limit: int | None = None) -> Sequence[Candidate]:
        return self.space.iterate(limit)

    def contains(self, candidate: object) -> bool:
        return self.space.contains(candidate)

    def _edited(self, layers: Sequence[LayerSpec], rng: Xorshift64) -> list[LayerSpec]:
        edited = list(layers)
        move = rng.choice(("insert", "exchange", "delete", "swap"))
        at = rng.choice(range(len(edited) + (move == "insert")))
        if move == "insert":
            edited.insert(at, self._layer(rng))
        elif move == "exchange":
            edited[at] = self._layer(rng)
        elif move == "delete":
            del edited[at]
        else:
            other = rng.choice(range(len(edited)))
            edited[at], edited[other] = edited[other], edited[at]
        return edited

    def _layer(self, rng: Xorshift64) -> LayerSpec:
        known = self.given and rng.next_f64() < 0.5
        source = rng.choice(self.given) if known else self.space.sample(rng)
        return rng.choice(source.spec.blocks)

    def _made(self, parent: Candidate, layers: Sequence[LayerSpec]) -> Candidate | None:
        """The parent with these layers, if that is another candidate of the space."""
        if not layers or tuple(layers) == parent.spec.blocks:
            return None
        with suppress(SpecError):
            return self.space.encode(parent.spec.replace(blocks=tuple(layers)))
        return None
