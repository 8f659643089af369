"""How far a program is: one line that a terminal shows anew, and elsewhere one line a minute.

A log of a night has a few hundred lines, not a few hundred thousand, and a person at a terminal
reads what is going on, how long it will take, and the best so far.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

EVERY_SECONDS = 60.0  # between lines where nothing is shown anew
NARROW = 60  # columns below which words are worth more than a bar
CLEAR = "\r\x1b[K"
MEASURED = 0.01, 10.0  # of the work, or seconds of it, before the time left is told


class _Bar(tqdm):
    """A bar whose time left is told by its line."""

    def __init__(self, left: Callable[[], str], **settings: Any) -> None:
        self.left = left
        super().__init__(**settings)

    @property
    def format_dict(self) -> dict[str, Any]:
        told = self.left()
        return {**super().format_dict, "left": told and f" {told}"}


class Line:
    """One line of progress on stderr; a context manager, which takes the line away at the end.

    Args:
        name: of the program, in front of the line.
        total: of what is counted; None as long as nobody knows.
        unit: of it: "tok".
        done: of it, before this line began.
        at_most: nobody knows how much there is, only that it is no more than the total.
        hidden: show nothing at all.
        stream: where to; stderr if left out.
        clock: seconds that pass.
    """

    def __init__(
        self,
        name: str,
        total: int | None = None,
        unit: str = "tok",
        *,
        done: int = 0,
        at_most: bool = False,
        hidden: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stream = stream or sys.stderr
        self.name, self.unit, self.clock = name, unit, clock
        self.alive = not hidden and self.stream.isatty()
        self.logs = not hidden and not self.alive
        self.text, self.last = "", float("-inf")
        self._begin(total, done, at_most)

    def _begin(self, total: int | None, done: int, at_most: bool) -> None:
        self.most, columns = "at most " if at_most else "", self._columns()
        self.total, self.n = total, done
        self.first: tuple[int, float] | None = None  # the first count, and when it came
        self.bar = _Bar(
            self._left,
            total=total,
            desc=self.name,
            initial=done,
            unit=self.unit,
            unit_scale=True,
            disable=not self.alive,
            file=self.stream,
            ncols=columns,
            nrows=20,  # tqdm shows nothing on a terminal that says it has none
            leave=False,
            miniters=1,  # a pace that was fast once hides no slow step
            bar_format=_format(total, columns or NARROW),
        )
        self.bar.set_postfix_str(self.text)

    def count_to(
        self, total: int | None, done: int = 0, unit: str = "tok", *, at_most: bool = False
    ) -> None:
        """What is counted from now on: so much or at most so much, of which so much is there."""
        self.bar.close()
        self.unit = unit
        self._begin(total, done, at_most)

    def say(self, text: str, *, now: bool = True) -> None:
        """What is going on; shown at once on a terminal, or else with the next count."""
        if text != self.text:
            self.text = text
            self.bar.set_postfix_str(text, refresh=now)

    def update(self, n: int) -> None:
        """Count; where the line is not shown anew, print it once a minute."""
        self.n += n
        if self.first is None:
            self.first = self.n, self.clock()
        self.bar.update(n)
        if self.logs and self.clock() - self.last >= EVERY_SECONDS:
            self.last = self.clock()
            self._put(f"{self._head()}{self._counts()}\n")

    def write(self, text: str) -> None:
        """Print a line that stays, above this one."""
        if self.alive:
            self.bar.write(text, file=self.stream)
        else:
            self._put(f"{text}\n")

    def _put(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()

    def _columns(self) -> int | None:
        """A terminal that does not say how wide it is, as in some containers, has 80 columns."""
        try:
            return (os.get_terminal_size(self.stream.fileno()).columns or 80) - 1
        except (OSError, ValueError):  # no terminal, or no file
            return None

    def _head(self) -> str:
        return f"{self.name}: {self.text}" if self.text else self.name

    def _counts(self) -> str:
        """Counts and the time that is left, for a log."""
        told = f", {tqdm.format_sizeof(self.n)} {self.unit}"
        if self.total:
            told += f" of {self.most}{tqdm.format_sizeof(self.total)}"
        return f"{told}, {left}" if (left := self._left()) else told

    def _left(self) -> str:
        """The time left at the pace since the first count: what came before is no work, such as the
        start of processes. Nothing until that pace is known."""
        if not self.total or self.first is None or self.n > self.total:
            return ""
        (n, began), (share, least) = self.first, MEASURED
        gained, seconds = self.n - n, self.clock() - began
        if gained <= 0 or (gained < share * (self.total - n) and seconds < least):
            return ""
        return f"{self.most}{tqdm.format_interval(seconds * (self.total - self.n) / gained)} left"

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()


def _format(total: int | None, columns: int) -> str:
    if total is None:
        return "{desc}{postfix}, {elapsed}"
    bar = "|{bar:10}|" if columns >= NARROW else ""
    return f"{{desc}} {{percentage:3.0f}}%{bar}{{left}}{{postfix}}"


@contextmanager
def starting(text: str) -> Iterator[None]:
    """Show a text on a terminal meanwhile, so that a slow import is no silence; elsewhere none."""
    stream = sys.stderr
    shown = bool(text) and stream.isatty()
    if shown:
        stream.write(text)
        stream.flush()
    try:
        yield
    finally:
        if shown:
            stream.write(CLEAR)
            stream.flush()
