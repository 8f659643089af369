"""Grid search: the whole space in order, up to a cap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from kizzasi.nas.searchers.ask_tell import Proposals, require_at_least
from kizzasi.nas.searchers.stream import Stream
from kizzasi.nas.spaces.space import Space

C = TypeVar("C")


@dataclass(frozen=True)
class Grid:
    """Propose the first `max_candidates` members of the space, in one batch.

    Args:
        max_candidates: the cap, at least 1.
    """

    max_candidates: int

    def proposals(self, space: Space[C]) -> Proposals[C]:
        """Yield one batch, as lazy as the space makes it."""
        require_at_least(1, max_candidates=self.max_candidates)
        yield space.iterate(self.max_candidates)

    def stream(self, space: Space[C]) -> Stream[C]:
        """Yield the same one by one."""
        require_at_least(1, max_candidates=self.max_candidates)
        candidates = space.iterate(self.max_candidates)
        for i in range(len(candidates)):
            yield candidates[i]
