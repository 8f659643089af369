"""Noise: which differences of finalists' means chance explains.

Glossary
    m, n      finalists with a score, and seeds that all of them finished
    y[i, s]   bits per byte of finalist i with seed s
    floor     a difference of two means below it is noise
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kizzasi.nas.results.finals import Final

TOO_FEW = "not told apart: too few seeds"

# Quantiles 0.975 of Student's t with 1, 2, ... degrees of freedom; a series serves beyond them.
T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


@dataclass(frozen=True)
class Noise:
    """How far apart two finalists' means must be; see `noise_of`.

    Args:
        floor: in bits per byte.
        seeds: that every finalist finished.
        freedom: degrees of freedom behind the floor; few of them make it high.
    """

    floor: float
    seeds: tuple[int, ...]
    freedom: int

    def gap(self, a: Final, b: Final) -> float:
        """How far the mean of `b` is above that of `a`, over the seeds that all have."""
        return statistics.fmean(b.by_seed[s] - a.by_seed[s] for s in self.seeds)

    def tied(self, a: Final, b: Final) -> bool:
        return abs(self.gap(a, b)) <= self.floor

    def __str__(self) -> str:
        return f"{self.floor:.3f} (95 %, paired over {len(self.seeds)} seeds)"


def against(best: Final, final: Final, noise: Noise | None) -> str:
    """Where a finalist stands beside the one with the best mean, in a few words."""
    if final.mean is None:
        return "failed"
    if final is best:
        return "best mean"
    if noise is None:
        return TOO_FEW
    gap = noise.gap(best, final)
    place = "worse" if gap > 0 else "better, over the seeds that all finished"
    return f"{gap:+.3f}, {'tied' if noise.tied(best, final) else place}"


def noise_of(finals: Iterable[Final]) -> Noise | None:
    """The least difference of two finalists' means that chance explains in less than 5 % of cases.

        e[i, s] = y[i, s] - mean_s y[i, s] - mean_i y[i, s] + mean_is y[i, s]
        sigma = sqrt(sum e^2 / ((m - 1) (n - 1)))
        floor = t[0.975, (m - 1) (n - 1)] sigma sqrt(2 / n)

    What a seed does to all finalists alike cancels; with two finalists this is the paired t-test.

    Returns:
        None with fewer than two finalists, or fewer than two seeds that all of them finished.

    Source: Fisher 1935, "The Design of Experiments", chapter 4 (randomised blocks).
    """
    scored = [final for final in finals if final.scores]
    seeds = sorted(set.intersection(*(set(f.by_seed) for f in scored))) if scored else []
    m, n = len(scored), len(seeds)
    if m < 2 or n < 2:
        return None
    y = [[final.by_seed[seed] for seed in seeds] for final in scored]
    freedom = (m - 1) * (n - 1)
    squares = _interaction(y)
    floor = t_975(freedom) * math.sqrt(squares / freedom) * math.sqrt(2 / n)
    return Noise(floor, tuple(seeds), freedom)


def _interaction(y: Sequence[Sequence[float]]) -> float:
    """Sum of squares that neither the rows' means nor the columns' explain."""
    rows = [statistics.fmean(row) for row in y]
    columns = [statistics.fmean(column) for column in zip(*y, strict=True)]
    mean = statistics.fmean(rows)
    return math.fsum(
        (value - row - column + mean) ** 2
        for values, row in zip(y, rows, strict=True)
        for value, column in zip(values, columns, strict=True)
    )


def t_975(freedom: int) -> float:
    """The 0.975 quantile of Student's t.

    Source: Abramowitz & Stegun 1964, 26.7.5 (beyond ten degrees of freedom).
    """
    if freedom <= len(T_975):
        return T_975[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
