"""A power law through trainings of one design at several sizes, and what it says of the next.

N = parameters;  L = loss;  log2 L = a - b log2 N + noise
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from kizzasi.errors import SpecError
from kizzasi.nas.results.noise import t_quantile


@dataclass(frozen=True)
class ScalingLaw:
    """A line through logarithms, by least squares.

    Args:
        a, b: L = 2^a N^-b.
        spread: standard deviation of log2 L around the line; seeds and bends alike.
        n: points.
        centre: mean of their log2 N.
        width: sum of squared distances of log2 N from it.
    """

    a: float
    b: float
    spread: float
    n: int
    centre: float
    width: float

    @classmethod
    def fit(cls, sizes: Sequence[float], losses: Sequence[float]) -> ScalingLaw:
        """The law of these points, one for each training.

        Raises:
            SpecError: fewer than three points, fewer than two sizes, or a loss that is not above 0.
        """
        if len(losses) < 3 or len(sizes) != len(losses) or len(set(sizes)) < 2:
            raise SpecError(
                f"sizes: {len(losses)} losses at {len(set(sizes))} sizes make no law; give three "
                "or more, at two sizes or more"
            )
        if min(*losses, *sizes) <= 0:
            raise SpecError(f"losses: {min(losses)} is not above 0, so it has no logarithm")
        x, y = [math.log2(n) for n in sizes], [math.log2(loss) for loss in losses]
        slope, a = statistics.linear_regression(x, y)
        rest = sum((v - a - slope * u) ** 2 for u, v in zip(x, y, strict=True))
        centre = statistics.fmean(x)
        width = sum((u - centre) ** 2 for u in x)
        return cls(a, -slope, math.sqrt(rest / (len(x) - 2)), len(x), centre, width)

    def predict(self, n_params: float, seeds: int = 1) -> tuple[float, float, float]:
        """The loss at a size, and where the mean of so many trainings lies in 95 % of cases.

            t[0.975, n - 2] spread sqrt(1 / seeds + 1 / n + (x - centre)^2 / width)

        It holds where the law does: no further bend, one more size of the same design.

        Source: Draper & Smith 1998, "Applied Regression Analysis", section 3.1.
        """
        x = math.log2(n_params)
        y = self.a - self.b * x
        reach = math.sqrt(1 / seeds + 1 / self.n + (x - self.centre) ** 2 / self.width)
        half = t_quantile(0.975, self.n - 2) * self.spread * reach
        return 2**y, 2 ** (y - half), 2 ** (y + half)

    def exponent(self) -> tuple[float, float, float]:
        """b with its 95 % interval."""
        half = t_quantile(0.975, self.n - 2) * self.spread / math.sqrt(self.width)
        return self.b, self.b - half, self.b + half
