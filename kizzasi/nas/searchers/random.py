"""Random search: the baseline that every other searcher has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from kizzasi.nas.searchers.ask_tell import Proposals, fresh, require_at_least
from kizzasi.nas.spaces.rng import Xorshift64
from kizzasi.nas.spaces.space import Space

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


@dataclass(frozen=True)
class Samples:
    """Random search without repeats, in batches, so that it may end at any time.

    Args:
        n_candidates: proposed in all.
        batch_size: drawn at once.
        seed: 0 .. 2^64 - 1.
    """

    n_candidates: int
    batch_size: int
    seed: int

    def proposals(self, space: Space[C]) -> Proposals[C]:
        """Yield batches; the search ends early when 100 draws bring nothing new."""
        rng, known = Xorshift64(self.seed), set[C]()
        while (left := self.n_candidates - len(known)) > 0:
            batch = fresh(partial(space.sample, rng), known, min(self.batch_size, left))
            if not batch:
                return
            yield batch
