"""Random search: the baseline that every other searcher has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from kizzasi.nas.rng import Xorshift64
from kizzasi.nas.searchers.search import Proposals, require_at_least
from kizzasi.nas.space import Space

C = TypeVar("C")


@dataclass(frozen=True)
class Random:
    """Propose `n_candidates` independent samples, in one batch.

    Args:
        n_candidates: how many, at least 1; repeats are kept.
        seed: 0 .. 2^64 - 1.
    """

    n_candidates: int
    seed: int

    def proposals(self, space: Space[C]) -> Proposals[C]:
        """Yield one batch of samples."""
        require_at_least(1, n_candidates=self.n_candidates)
        rng = Xorshift64(self.seed)
        yield [space.sample(rng) for _ in range(self.n_candidates)]
