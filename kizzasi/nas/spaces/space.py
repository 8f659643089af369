"""`Space`: what searchers ask of a search space; `Combinations`: a grid that is not stored.

C = the type of a candidate: anything that can be compared with ==.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar, overload

import numpy as np

from kizzasi.nas.spaces.rng import Xorshift64

C = TypeVar("C")


class Space(Protocol[C]):
    """A set of candidates with the moves that searchers make in it.

    Every move returns a member of the space, draws all its chance from `rng`, and leaves its
    arguments as they were. All searchers run over any Space.
    """

    @property
    def size(self) -> int:
        """The number of distinct candidates."""
        ...

    def sample(self, rng: Xorshift64) -> C:
        """Draw a candidate at random."""
        ...

    def build(self, decide: Callable[[str, int], int]) -> C:
        """Make a candidate by asking `decide(gene, n_options)` for an option of every gene.

        Raises:
            SpecError: the options do not fit each other.
        """
        ...

    def mutate(self, candidate: C, rng: Xorshift64, prob: float) -> C:
        """Redraw each gene of `candidate` with probability `prob`."""
        ...

    def crossover(self, a: C, b: C, rng: Xorshift64) -> C:
        """Mix the genes of two candidates."""
        ...

    def iterate(self, limit: int | None = None) -> Sequence[C]:
        """Return all candidates, each once and in a fixed order, or the first `limit` of them."""
        ...

    def contains(self, candidate: C) -> bool:
        """Say whether `candidate` is a member."""
        ...


class Combinations(Sequence[C], Generic[C]):
    """Every combination of one option per axis, the last axis turning fastest.

    Candidates are made when they are looked at, so a grid of any size costs nothing to hold.

    Args:
        make: builds a candidate from one option per axis.
        axes: the options of each axis.
        numbers: which combinations, numbered from 0; a slice of this sequence keeps a slice of it.
    """

    def __init__(
        self, make: Callable[..., C], axes: tuple[Sequence[object], ...], numbers: range
    ) -> None:
        self.make = make
        self.axes = axes
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> C: ...
    @overload
    def __getitem__(self, index: slice) -> Combinations[C]: ...
    def __getitem__(self, index: int | slice) -> C | Combinations[C]:
        if isinstance(index, slice):
            return Combinations(self.make, self.axes, self.numbers[index])
        number = self.numbers[index]
        options = []
        for axis in reversed(self.axes):
            number, digit = divmod(number, len(axis))
            options.append(axis[digit])
        return self.make(*reversed(options))

    def digits(self) -> list[np.ndarray]:
        """Return, per axis, (len(self),) int64 positions in it: the whole grid as columns."""
        number = np.arange(self.numbers.start, self.numbers.stop, self.numbers.step)
        columns = []
        for axis in reversed(self.axes):
            number, digit = np.divmod(number, len(axis))
            columns.append(digit)
        return columns[::-1]
