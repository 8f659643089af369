"""Ask and tell: a search in progress, its history, and the loop that runs one to its end.

A searcher is a generator: it yields batches of candidates whose choice does not depend on each
other's scores, and is sent their scores. So a search is a function of its seed and its history.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Generic, Protocol, TypeAlias, TypeVar, overload

import numpy as np
from numpy.typing import ArrayLike

from kizzasi.errors import SpecError, StudyError
from kizzasi.nas.space import Space

C = TypeVar("C")

Proposals: TypeAlias = Generator[Sequence[C], Sequence[float], None]


class Searcher(Protocol):
    """Settings of a search strategy; all its state lives in the generator it starts."""

    def proposals(self, space: Space[C]) -> Proposals[C]:
        """Yield non-empty batches of candidates; receive one score for each, higher is better.

        Raises:
            SpecError: a setting is out of range (at the first batch).
        """
        ...


def require_at_least(least: int, **settings: int) -> None:
    """Raise a SpecError that names the first of `settings` that is below `least`."""
    for name, value in settings.items():
        if value < least:
            raise SpecError(f"{name}: {value} is too small; give at least {least}")


class History(Sequence[tuple[C, float]], Generic[C]):
    """Every (candidate, score) of a search in the order asked; candidates stay as lazy as given."""

    def __init__(self) -> None:
        self.batches: list[Sequence[C]] = []
        self.starts: list[int] = []
        self.scores: list[float] = []

    def __len__(self) -> int:
        return len(self.scores)

    @overload
    def __getitem__(self, index: int) -> tuple[C, float]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[C, float]]: ...
    def __getitem__(self, index: int | slice) -> tuple[C, float] | list[tuple[C, float]]:
        positions = range(len(self.scores))[index]
        if isinstance(positions, range):
            return [self[position] for position in positions]
        batch = bisect_right(self.starts, positions) - 1
        return self.batches[batch][positions - self.starts[batch]], self.scores[positions]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    def best(self) -> tuple[C, float]:
        """Return the highest score and its candidate: the last one if several share it.

        NaN ranks below every number, so a failed trial never wins.
        """
        assert self.scores, "best() of a search without a trial"
        scores = np.array(self.scores)
        scores[np.isnan(scores)] = -math.inf
        return self[len(scores) - 1 - int(np.argmax(scores[::-1]))]


class Search(Generic[C]):
    """A search in progress: ask for candidates, evaluate them in any manner, tell their scores.

    Args:
        searcher: the strategy and its seed.
        space: where it searches.
    """

    def __init__(self, searcher: Searcher, space: Space[C]) -> None:
        self.history: History[C] = History()
        self._proposals = searcher.proposals(space)
        self._batch: Sequence[C] = ()
        self._start = 0

    def ask(self, n: int | None = None) -> Sequence[C]:
        """Return the next candidates, at most `n`, that may be evaluated side by side.

        Asking again before telling returns the same ones. Empty when the search is over.
        """
        if len(self.history) == self._start + len(self._batch):
            self._next_batch()
        told = len(self.history) - self._start
        return self._batch[told : None if n is None else told + n]

    def tell(self, scores: ArrayLike) -> None:
        """Record the scores of the first len(scores) candidates of the last `ask`, in its order.

        Args:
            scores: (n,) floats, higher is better; NaN is recorded, and ranks below every number.

        Raises:
            StudyError: there is no score, or more of them than candidates to be scored.
        """
        new = np.asarray(scores, dtype=np.float64).tolist()
        waiting = self._start + len(self._batch) - len(self.history)
        if not 0 < len(new) <= waiting:
            raise StudyError(
                f"tell: {len(new)} scores, but {waiting} candidates wait for one; "
                "ask() first, and tell one score for each candidate that was evaluated"
            )
        self.history.scores += new

    def replay(self, history: Iterable[tuple[C, float]]) -> None:
        """Continue a recorded search: take its scores as told, without evaluating anything.

        Raises:
            StudyError: the record is of another searcher, seed or space.
        """
        for candidate, score in history:
            asked = self.ask(1)
            if not asked or asked[0] != candidate:
                raise StudyError(
                    f"history: trial {len(self.history)} is {candidate}, but this search asks for "
                    f"{asked[0] if asked else 'nothing more'}; "
                    "resume with the searcher, seed and space that made the history"
                )
            self.tell([score])

    def _next_batch(self) -> None:
        told = self.history.scores[self._start :]
        self._start = len(self.history)
        try:
            if not self.history.batches:
                self._batch = next(self._proposals)
            else:
                ranked = [-math.inf if math.isnan(score) else score for score in told]
                self._batch = self._proposals.send(ranked)
        except StopIteration:
            self._batch = ()
            return
        assert len(self._batch), "a searcher proposed an empty batch"
        self.history.batches.append(self._batch)
        self.history.starts.append(self._start)


def one_by_one(evaluate: Callable[[C], float]) -> Callable[[Sequence[C]], list[float]]:
    """Turn a function of one candidate into a function of a batch."""
    return lambda batch: [evaluate(candidate) for candidate in batch]


def run(
    searcher: Searcher,
    space: Space[C],
    evaluate_batch: Callable[[Sequence[C]], ArrayLike],
    history: Iterable[tuple[C, float]] = (),
) -> History[C]:
    """Run a search to its end and return all its trials.

    The trials depend on the searcher, the space and the scores only; not on how the evaluator
    works through a batch, nor on where an earlier run was cut off.

    Args:
        searcher: strategy and seed.
        space: where it searches.
        evaluate_batch: scores a batch, higher is better; `one_by_one(f)` makes one of any f.
        history: trials of an earlier run of the same search, not evaluated again.
    """
    search = Search(searcher, space)
    search.replay(history)
    while batch := search.ask():
        search.tell(evaluate_batch(batch))
    return search.history
