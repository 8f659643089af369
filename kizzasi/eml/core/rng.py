"""eml-core's linear congruential generator, with its fault and without.

    state <- 6364136223846793005 * state + 1442695040888963407   (mod 2^64),   raw = state >> 33

raw has 31 bits. eml-core divides it by 2^32, so its "unit" lies in [0, 0.5) and its "signed" number
in [-1, 0): every step is negative and only the first half of the parameters is ever chosen.
`rng="fixed"` divides by 2^31; `rng="seed"` keeps the fault, to reproduce eml-core's figures.
"""

from typing import Literal, get_args

from kizzasi.errors import SpecError

Rng = Literal["fixed", "seed"]

_MULTIPLIER, _INCREMENT, _MASK = 6364136223846793005, 1442695040888963407, (1 << 64) - 1
# The two faulty divisors of eml-core differ in the last digit; both matter for exact parity.
_UNIT_DIVISOR = {"fixed": 2.0**31, "seed": 2.0**32}
_SAMPLE_DIVISOR = {"fixed": 2.0**30, "seed": (2**32 - 1) / 2.0}


class Lcg:
    """A stream of pseudo-random numbers: `unit` in [0, 1), `signed` in [-1, 1), and test data.

    Args:
        state: any integer; taken modulo 2^64.
        rng: "fixed" covers the whole range, "seed" only its lower half (see the file's top).
    """

    def __init__(self, state: int, rng: Rng = "fixed") -> None:
        if rng not in get_args(Rng):
            raise SpecError(f"rng is {rng!r}; it must be one of {get_args(Rng)}")
        self.state = state & _MASK
        self.rng = rng

    def raw(self) -> int:
        """Advance, and return 31 random bits."""
        self.state = (self.state * _MULTIPLIER + _INCREMENT) & _MASK
        return self.state >> 33

    def unit(self) -> float:
        """Return the next number in [0, 1), or in [0, 0.5) under "seed"."""
        return self.raw() / _UNIT_DIVISOR[self.rng]

    def signed(self) -> float:
        """Return the next number in [-1, 1), or in [-1, 0) under "seed"."""
        return self.unit() * 2.0 - 1.0

    def sample(self, count: int) -> list[float]:
        """Return `count` benchmark inputs in [-1, 1), or in [-1, 0) under "seed"."""
        return [self.raw() / _SAMPLE_DIVISOR[self.rng] - 1.0 for _ in range(count)]
