"""Noise: which differences of finalists' means chance explains.

Glossary
    m, n      finalists with a score, and seeds that all of them finished
    y[i, s]   bits per byte of finalist i with seed s
    floor     a difference of two means below it is noise
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from kizzasi.nas.results.finals import Final

TOO_FEW = "not told apart: too few seeds"

RESAMPLES = 500
BLOCK = 8  # windows that follow each other and are drawn together


@dataclass(frozen=True)
class Noise:
    """How far apart two finalists' means must be; see `noise_of`.

    Args:
        floor: in bits per byte.
        seeds: that every finalist finished.
        freedom: degrees of freedom behind the floor; few of them make it high.
        comparisons: of finalists with one of them, for which the floor holds together.
        sampling: standard error of a difference from the sample of windows, a part of the floor; 0
            where the windows' own scores are not known.
    """

    floor: float
    seeds: tuple[int, ...]
    freedom: int
    comparisons: int = 1
    sampling: float = 0.0

    def gap(self, a: Final, b: Final) -> float:
        """How far the mean of `b` is above that of `a`, over the seeds that all have."""
        return statistics.fmean(b.by_seed[s] - a.by_seed[s] for s in self.seeds)

    def tied(self, a: Final, b: Final) -> bool:
        return abs(self.gap(a, b)) <= self.floor

    def __str__(self) -> str:
        several = f", {self.comparisons} comparisons" if self.comparisons > 1 else ""
        return f"{self.floor:.3f} (95 %{several}, paired over {len(self.seeds)} seeds)"


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
    """The difference of two finalists' means that chance exceeds in less than 5 % of searches.

        e[i, s] = y[i, s] - mean_s y[i, s] - mean_i y[i, s] + mean_is y[i, s]
        sigma = sqrt(sum e^2 / ((m - 1) (n - 1)))
        q = 1 - 0.025 / (m - 1)
        floor^2 = (t[q, (m - 1) (n - 1)] sigma)^2 2 / n + (z[q] sampling)^2

    What a seed does to all finalists alike cancels; with two finalists this is the paired t-test.
    The winner is the best of several, so the floor holds for m - 1 comparisons together
    (Bonferroni). Sampling is how far a difference would move on other windows of the same kind: the
    standard deviation of its mean over resamples of 8 windows that follow each other, the largest
    of any pair.

    Returns:
        None with fewer than two finalists, or fewer than two seeds that all of them finished.

    Source: Fisher 1935, "The Design of Experiments", chapter 4 (randomised blocks); Dunn 1961 (the
        correction); Kuensch 1989 (the block bootstrap).
    """
    scored = [final for final in finals if final.scores]
    seeds = sorted(set.intersection(*(set(f.by_seed) for f in scored))) if scored else []
    m, n = len(scored), len(seeds)
    if m < 2 or n < 2:
        return None
    y = [[final.by_seed[seed] for seed in seeds] for final in scored]
    freedom = (m - 1) * (n - 1)
    q = 1 - 0.025 / (m - 1)
    sampling = _sampling(scored)
    trained = t_quantile(q, freedom) * math.sqrt(_interaction(y) / freedom) * math.sqrt(2 / n)
    floor = math.hypot(trained, statistics.NormalDist().inv_cdf(q) * sampling)
    return Noise(floor, tuple(seeds), freedom, m - 1, sampling)


def _sampling(finals: Sequence[Final]) -> float:
    """The largest standard error of a difference that the sample of windows makes."""
    known = [np.array(final.windows) for final in finals if final.windows is not None]
    if len(known) < len(finals) or len({len(values) for values in known}) > 1:
        return 0.0
    n = len(known[0])
    rng = np.random.default_rng(0)
    first = rng.integers(n, size=(RESAMPLES, -(-n // BLOCK)))
    rows = ((first[:, :, None] + np.arange(BLOCK)) % n).reshape(RESAMPLES, -1)[:, :n]
    means = np.stack([values[rows].mean(1) for values in known])
    pairs = itertools.combinations(range(len(known)), 2)
    return max(float((means[i] - means[j]).std()) for i, j in pairs)


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


def t_quantile(p: float, freedom: int) -> float:
    """The quantile p > 1/2 of Student's t: by bisection on its distribution, or from the normal
    one by 1/freedom where that is below 1/1000 (to some 1e-11).

    Source: Abramowitz & Stegun 1964, 26.7.3 and 26.7.4 (whole degrees of freedom), 26.7.5.
    """
    if freedom > 1000:
        z = statistics.NormalDist().inv_cdf(p)
        first = (z**3 + z) / 4
        second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
        third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
        return z + first / freedom + second / freedom**2 + third / freedom**3
    low, high = 0.0, 1.0
    while _between(high, freedom) < 2 * p - 1:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _between(middle, freedom) < 2 * p - 1 else (low, middle)
    return (low + high) / 2


def _between(t: float, freedom: int) -> float:
    """The chance that |t| is not exceeded."""
    angle = math.atan(t / math.sqrt(freedom))
    c, term, total = math.cos(angle) ** 2, 1.0, 0.0
    first = 2 if freedom % 2 else 1
    if freedom % 2:
        term = math.cos(angle)
    for k in range(first, freedom, 2):
        total += term
        term *= c * k / (k + 1)
    if freedom % 2 == 0:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + math.sin(angle) * total)
