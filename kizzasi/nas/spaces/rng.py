"""`Xorshift64`: the one source of chance in every search, the same on every machine.

state = x, a 64-bit word that is never 0; shifts 13, 7, 17.
"""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence
from typing import Any, TypeVar

from kizzasi.errors import SpecError

T = TypeVar("T")

_MASK = 2**64 - 1


class Xorshift64:
    """A 64-bit xorshift generator; equal seeds give equal searches.

        x ^= x << 13;  x ^= x >> 7;  x ^= x << 17     (mod 2^64)

    Args:
        seed: 0 .. 2^64 - 1. Zero is the generator's fixed point, so 0 means 1.

    Raises:
        SpecError: the seed is not an integer in that range.

    Source: Marsaglia 2003, "Xorshift RNGs", J. Stat. Software 8(14), section 3.
    """

    def __init__(self, seed: int) -> None:
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= _MASK:
            raise SpecError(f"seed: {seed!r} is not an integer in 0 .. 2^64 - 1; give one that is")
        self.state = seed or 1

    def next_u64(self) -> int:
        """Advance the state and return it: an integer in 1 .. 2^64 - 1."""
        x = self.state
        x ^= (x << 13) & _MASK
        x ^= x >> 7
        x ^= (x << 17) & _MASK
        self.state = x
        return x

    def next_f64(self) -> float:
        """Return a float in [0, 1) made of the top 53 bits."""
        return (self.next_u64() >> 11) / 2**53

    def choice(self, options: Sequence[T]) -> T:
        """Return options[next_u64() % len(options)].

        Raises:
            SpecError: there are no options.
        """
        if not options:
            raise SpecError("choice: no options to choose from; give at least one")
        return options[self.next_u64() % len(options)]

    def shuffle(self, items: MutableSequence[Any]) -> None:
        """Shuffle `items` in place (Fisher-Yates, from the last item down)."""
        for i in range(len(items) - 1, 0, -1):
            j = self.next_u64() % (i + 1)
            items[i], items[j] = items[j], items[i]
