"""Searchers that propose one more at any time, whatever is still running.

Batches make workers wait: nobody knows the next batch before the last score of this one. A stream
knows a next candidate always, from the scores that are there.

Glossary
    number    of a candidate, from 0 in the order of proposal
    news      (number, score) of every result since the last proposal; a number comes again when its
              candidate was trained further, and its last score is the one that counts
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, Generic, Protocol, TypeAlias, TypeVar, runtime_checkable

from kizzasi.nas.searchers.ask_tell import without_nan
from kizzasi.nas.spaces.space import Space

C = TypeVar("C")

News: TypeAlias = "Sequence[tuple[int, Any]]"
Stream: TypeAlias = Generator["C | None", News, None]


@runtime_checkable
class Streaming(Protocol):
    """A searcher that can also be asked for one more now."""

    def stream(self, space: Space[C]) -> Stream[C]:
        """Yield a candidate, or None while there is none to propose; receive the news.

        Raises:
            SpecError: a setting is out of range (at the first candidate).
        """
        ...


class Flowing(Generic[C]):
    """A search in progress by stream: ask for one more at any time, tell scores in any order.

    Args:
        stream: begun by a searcher, over a space; its first candidate is not drawn yet.

    Attributes:
        over: whether there will be no more candidates.
    """

    def __init__(self, stream: Stream[C]) -> None:
        self.over = False
        self._stream = stream
        self._begun = False
        self._news: list[tuple[int, Any]] = []

    def propose(self) -> C | None:
        """One more candidate, if there is one now."""
        if self.over:
            return None
        news, self._news = self._news, []
        try:
            if self._begun:
                return self._stream.send(news)
            self._begun = True
            return next(self._stream)
        except StopIteration:
            self.over = True
            return None

    def tell(self, number: int, score: Any) -> None:
        """A candidate's score where it was trained furthest."""
        self._news.append((number, without_nan(score)))
