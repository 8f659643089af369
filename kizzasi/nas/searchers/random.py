"""Random search: the baseline that every other searcher has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TypeVar

from kizzasi.nas.searchers.ask_tell import Proposals, fresh, require_at_least
from kizzasi.nas.searchers.stream import Stream
from kizzasi.nas.spaces.rng import Xorshift64
from kizzasi.nas.spaces.space import Space

C = TypeVar("C")


@dataclass(frozen=True)
class Random:
    """Propose `n_candidates` independent samples.

    Args:
        n_candidates: how many, at least 1.
        seed: 0 .. 2^64 - 1.
        distinct: draw what was there before again, so that none comes twice; the search ends early
            when 100 draws bring nothing new. Else repeats are kept.
        batch_size: drawn at once; None draws all.
    """

    n_candidates: int
    seed: int
    distinct: bool = False
    batch_size: int | None = None

    def proposals(self, space: Space[C]) -> Proposals[C]:
        """Yield batches of samples."""
        require_at_least(1, n_candidates=self.n_candidates)
        left, size = self.n_candidates, self.batch_size or self.n_candidates
        draws = self._draws(space)
        while left > 0:
            batch = [c for c in islice(draws, min(size, left)) if c is not None]
            if not batch:
                return
            left -= len(batch)
            yield batch

    def stream(self, space: Space[C]) -> Stream[C]:
        """Yield samples; no score changes them."""
        return self._draws(space)

    def _draws(self, space: Space[C]) -> Stream[C]:
        require_at_least(1, n_candidates=self.n_candidates)
        rng, known = Xorshift64(self.seed), set[C]()
        draw = partial(space.sample, rng)
        for _ in range(self.n_candidates):
            if not self.distinct:
                yield draw()
            elif new := fresh(draw, known, 1):
                yield new[0]
            else:
                return
