"""Ask and tell: a search in progress, its history, and the loop that runs one to its end.

A searcher is a generator: it yields batches of candidates whose choice does not depend on each
other's scores, and is sent their scores. So a search is a function of its seed and its history.

A score is a float, higher is better; or, for searchers of several objectives, a tuple of floats,
each lower is better.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, Generic, Protocol, TypeAlias, TypeVar, overload

import numpy as np
from numpy.typing import ArrayLike

from kizzasi.errors import SpecError, StudyError
from kizzasi.nas.spaces.space import Space

C = TypeVar("C")

Score: TypeAlias = "float | tuple[float, ...]"
Proposals: TypeAlias = Generator[Sequence[C], Sequence[Any], None]  # is sent one Score for each


class Searcher(Protocol):
    """Settings of a search strategy; all its state lives in the generator it starts."""

    def proposals(self, space: Space[C]) -> Proposals[C]:
        """Yield non-empty batches of candidates; receive one score for each.

        Raises:
            SpecError: a setting is out of range (at the first batch).
        """
        ...


def require_at_least(least: int, **settings: int) -> None:
    """Raise a SpecError that names the first of `settings` that is below `least`."""
    for name, value in settings.items():
        if value < least:
            raise SpecError(f"{name}: {value} is too small; give at least {least}")


def require_chance(**settings: float) -> None:
    """Raise a SpecError that names the first of `settings` that is no probability."""
    for name, value in settings.items():
        if not 0 <= value <= 1:
            raise SpecError(f"{name}: {value} is not in 0 .. 1; give a chance")


class History(Sequence[tuple[C, Any]], Generic[C]):
    """Every (candidate, score) of a search in the order asked; candidates stay as lazy as given."""

    def __init__(self) -> None:
        self.batches: list[Sequence[C]] = []
        self.starts: list[int] = []
        self.scores: list[Any] = []

    def __len__(self) -> int:
        return len(self.scores)

    @overload
    def __getitem__(self, index: int) -> tuple[C, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[C, Any]]: ...
    def __getitem__(self, index: int | slice) -> tuple[C, Any] | list[tuple[C, Any]]:
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

        Raises:
            StudyError: the scores are tuples, which have a front and no best.
        """
        assert self.scores, "best() of a search without a trial"
        if isinstance(self.scores[0], tuple):
            raise StudyError("best: several objectives have no best trial; use pareto_front")
        scores = np.array(self.scores)
        scores[np.isnan(scores)] = -math.inf
        return self[len(scores) - 1 - int(np.argmax(scores[::-1]))]


class AskTell(Generic[C]):
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
        self._proposed = 0

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
            scores: (n,) floats, higher is better, or (n, objectives), lower is better; NaN is
                recorded, and ranks below every number.

        Raises:
            StudyError: there is no score, or more of them than candidates to be scored.
        """
        rows = np.asarray(scores, dtype=np.float64).tolist()
        new = [tuple(row) if isinstance(row, list) else row for row in rows]
        waiting = self._start + len(self._batch) - len(self.history)
        if not 0 < len(new) <= waiting:
            raise StudyError(
                f"tell: {len(new)} scores, but {waiting} candidates wait for one; "
                "ask() first, and tell one score for each candidate that was evaluated"
            )
        self.history.scores += new

    def propose(self) -> C | None:
        """One more of the candidates that wait for a score; None if all of them were proposed."""
        waiting = self.ask()
        ahead = self._proposed - len(self.history)
        if ahead >= len(waiting):
            return None
        self._proposed += 1
        return waiting[ahead]

    @property
    def over(self) -> bool:
        """Whether there will be no more candidates."""
        return not self.ask()

    def amend(self, number: int, score: Any) -> None:
        """Replace a score told before, as long as its batch is not complete."""
        if self._start <= number < len(self.history):
            self.history.scores[number] = score

    def replay(self, history: Iterable[tuple[C, Score]]) -> None:
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
                self._batch = self._proposals.send([without_nan(score) for score in told])
        except StopIteration:
            self._batch = ()
            return
        assert len(self._batch), "a searcher proposed an empty batch"
        self.history.batches.append(self._batch)
        self.history.starts.append(self._start)


def without_nan(score: Any) -> Any:
    """What a searcher is told: a failure is the worst there is."""
    if isinstance(score, tuple):
        return tuple(math.inf for _ in score) if any(map(math.isnan, score)) else score
    return -math.inf if math.isnan(score) else score


def fresh(draw: Callable[[], C], known: set[C], n: int, tries: int = 100) -> list[C]:
    """Draw `n` candidates that are not `known` and add them to it.

    Fewer come, or none, when `tries` draws in a row bring nothing new.
    """
    found: list[C] = []
    misses = 0
    while len(found) < n and misses < tries:
        candidate = draw()
        misses = misses + 1 if candidate in known else 0
        if candidate not in known:
            known.add(candidate)
            found.append(candidate)
    return found


def one_by_one(evaluate: Callable[[C], Score]) -> Callable[[Sequence[C]], list[Score]]:
    """Turn a function of one candidate into a function of a batch."""
    return lambda batch: [evaluate(candidate) for candidate in batch]


def run(
    searcher: Searcher,
    space: Space[C],
    evaluate_batch: Callable[[Sequence[C]], ArrayLike],
    history: Iterable[tuple[C, Score]] = (),
) -> History[C]:
    """Run a search to its end and return all its trials.

    The trials depend on the searcher, the space and the scores only; not on how the evaluator
    works through a batch, nor on where an earlier run was cut off.

    Args:
        searcher: strategy and seed.
        space: where it searches.
        evaluate_batch: scores a batch; `one_by_one(f)` makes one of any f.
        history: trials of an earlier run of the same search, not evaluated again.
    """
    search = AskTell(searcher, space)
    search.replay(history)
    while batch := search.ask():
        search.tell(evaluate_batch(batch))
    return search.history
