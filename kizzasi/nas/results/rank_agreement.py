"""What a proxy was worth: does it rank architectures as training ranks them, better than trivia?

x = scores of a predictor, y = scores after training, both higher is better
s[i, j] = sign(x[i] - x[j])
w[i] = how often candidate i occurs in a resample; all ones for the data themselves
r[i] = sum_j w[j] s[i, j], twice the centred mid-rank of candidate i in the resample

All statistics follow from s and w, so one product of matrices serves a thousand resamples.
Memory is O(n^2): meant for up to a few thousand trained candidates.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from kizzasi.errors import ShapeError, SpecError

MIN_PAIRS = 3  # for a value
MIN_CANDIDATES = 8  # for an interval: fewer would make it a false certainty


def spearman(x: ArrayLike, y: ArrayLike) -> float | None:
    """Correlate the ranks of two score lists; ties share their mean rank.

        sum_i r_x[i] r_y[i] / sqrt(sum_i r_x[i]^2  sum_i r_y[i]^2)

    Args:
        x, y: (n,) numbers; infinities are ranked.

    Returns:
        A float in [-1, 1]; None (not defined) if n < 3, a list is constant, or a score is NaN.

    Raises:
        ShapeError: x and y are not two lists of one length.

    Source: Spearman 1904; Kendall & Gibbons 1990, "Rank Correlation Methods", chapter 3 (ties).
    """
    scores = _columns(x=x, y=y)
    if scores.shape[1] < MIN_PAIRS or np.isnan(scores).any():
        return None
    r_x, r_y = map(_ranks, scores)  # no pairs here: a report of a long search asks for it
    norm = np.sum(r_x**2) * np.sum(r_y**2)
    return float(np.sum(r_x * r_y) / np.sqrt(norm)) if norm > 0 else None


def kendall_tau_b(x: ArrayLike, y: ArrayLike) -> float | None:
    """Compare how two score lists order every pair, corrected for ties.

        sum_ij s_x[i,j] s_y[i,j] / sqrt(sum_ij s_x[i,j]^2  sum_ij s_y[i,j]^2)

    Args, Returns, Raises: as for `spearman`.

    Source: Kendall 1945, "The treatment of ties in ranking problems", Biometrika 33(3).
    """
    return _point(x, y, k=1)[1]


def top_k_recall(x: ArrayLike, y: ArrayLike, k: int) -> float | None:
    """Return the share of the k best by `y` that are among the k best by `x`.

    Candidates that tie for the last places share them evenly.

    Args:
        x, y: as for `spearman`.
        k: at least 1.

    Returns:
        A float in [0, 1]; None as for `spearman`, and if k >= n, where every x would score 1.

    Raises:
        ShapeError: x and y are not two lists of one length.
        SpecError: k is below 1.
    """
    return _point(x, y, k)[2]


@dataclass(frozen=True)
class Statistic:
    """A value and its 95 % interval; all None where it is not defined."""

    value: float | None = None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.value is None:
            return "not defined"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Agreement:
    """How well one predictor agrees with training."""

    spearman: Statistic
    kendall_tau_b: Statistic
    top_k_recall: Statistic


@dataclass(frozen=True)
class Region:
    """The proxy beside its baselines, over the same `n` candidates.

    Args:
        n: candidates with all their scores.
        proxy: the analytic proxy, bootstrap intervals.
        parameters: parameter count as the score, more is better; bootstrap intervals.
        random: what a random ranking is expected to reach, and where 95 % of them fall.
        lead: Kendall tau-b of the proxy minus that of `parameters`, on the same resamples.
    """

    n: int
    proxy: Agreement
    parameters: Agreement
    random: Agreement
    lead: Statistic

    def sentence(self) -> str:
        """Say in words how the proxy did; a tie is a difference that chance explains (95 %)."""
        tau, chance = self.proxy.kendall_tau_b, self.random.kendall_tau_b
        if tau.value is None:
            return (
                f"the worth of the proxy is not defined ({self.n} candidates; it takes "
                f"{MIN_CANDIDATES}, with scores that differ)"
            )
        assert chance.low is not None, "a proxy without a random baseline"
        assert chance.high is not None, "a proxy without a random baseline"
        against_random = _outcome(tau.value - chance.high, tau.value - chance.low)
        against_parameters = _outcome(self.lead.low, self.lead.high)
        return (
            f"the proxy {against_random} a random ranking and {against_parameters} parameter "
            f"count only (Kendall tau-b {tau} against {self.parameters.kendall_tau_b}, "
            f"{self.n} candidates)"
        )


@dataclass(frozen=True)
class ProxyAgreement:
    """The report: everywhere, and inside the parameter band.

    Args:
        everywhere: all candidates.
        in_band: those inside the parameter band.
        n_dropped: candidates left out because a score of theirs is NaN.
        k, n_boot, seed: as given to `proxy_agreement`.
    """

    everywhere: Region
    in_band: Region
    n_dropped: int
    k: int
    n_boot: int
    seed: int

    @property
    def verdict(self) -> str:
        """Whether the proxy beats, ties with or loses to its baselines, in words."""
        return (
            f"Inside the parameter band {self.in_band.sentence()}. "
            f"Over all candidates {self.everywhere.sentence()}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for a report, the verdict included."""
        return {**asdict(self), "verdict": self.verdict}


def proxy_agreement(
    proxy: ArrayLike,
    trained: ArrayLike,
    params: ArrayLike,
    in_band: ArrayLike,
    *,
    seed: int = 0,
    n_boot: int = 1000,
    k: int = 5,
) -> ProxyAgreement:
    """Measure how well a proxy ranks trained candidates, beside two baselines.

    The baselines are the parameter count and a random ranking. Intervals are percentiles of
    `n_boot` resamples of the candidates (of `n_boot` random rankings for the random baseline).

    Args:
        proxy: (n,) proxy scores, higher is better.
        trained: (n,) scores after training, higher is better (minus bits per byte).
        params: (n,) parameter counts.
        in_band: (n,) true for candidates inside the parameter band.
        seed: of the resampling.
        n_boot: number of resamples, at least 1.
        k: size of the top for the recall, at least 1.

    Returns:
        A ProxyAgreement; a statistic that is not defined (fewer than 3 candidates, constant scores)
        is None. Candidates with a NaN are left out and counted.

    Raises:
        ShapeError: the four are not lists of one length.
        SpecError: n_boot or k is below 1.

    Source: Efron & Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3.
    """
    scores = _columns(proxy=proxy, trained=trained, params=params, in_band=in_band)
    _require_positive(n_boot=n_boot, k=k)
    scored = ~np.isnan(scores).any(axis=0)
    kept = scores[:, scored]
    return ProxyAgreement(
        everywhere=_region(kept, k, n_boot, seed),
        in_band=_region(kept[:, kept[3] != 0], k, n_boot, seed),
        n_dropped=int(np.sum(~scored)),
        k=k,
        n_boot=n_boot,
        seed=seed,
    )


def _region(scores: np.ndarray, k: int, n_boot: int, seed: int) -> Region:
    proxy, trained, params, _ = scores
    n = len(trained)
    if n < MIN_CANDIDATES:
        nothing = Agreement(Statistic(), Statistic(), Statistic())
        return Region(n, nothing, nothing, nothing, Statistic())
    rng = np.random.default_rng(seed)
    resamples = rng.multinomial(n, np.full(n, 1 / n), size=n_boot)
    data = np.ones((1, n))
    w = np.concatenate([data, resamples])
    s_trained = _signs(trained)
    by_proxy = _statistics(_signs(proxy), s_trained, w, k)
    by_params = _statistics(_signs(params), s_trained, w, k)
    by_chance = [_statistics(_signs(rng.permutation(n)), s_trained, data, k) for _ in range(n_boot)]
    expected = np.array([[0.0], [0.0], [k / n]]) + 0 * by_chance[0]  # NaN where not defined
    return Region(
        n,
        proxy=_agreement(by_proxy),
        parameters=_agreement(by_params),
        random=_agreement(np.concatenate([expected, *by_chance], axis=1)),
        lead=_statistic(by_proxy[1] - by_params[1]),
    )


def _ranks(x: np.ndarray) -> np.ndarray:
    """r[i] = sum_j sign(x[i] - x[j]), by sorting."""
    order = np.sort(x)
    below, up_to = (np.searchsorted(order, x, side) for side in ("left", "right"))
    return (below + up_to - len(x)).astype(np.float64)


def _signs(x: np.ndarray) -> np.ndarray:
    """s[i, j] = sign(x[i] - x[j]), by comparison, so that infinities have a rank."""
    column = x[:, None]
    return np.greater(column, x).astype(np.float64) - np.less(column, x)


def _statistics(s_x: np.ndarray, s_y: np.ndarray, w: np.ndarray, k: int) -> np.ndarray:
    """Spearman, Kendall tau-b and top-k recall, one column per row of `w`; NaN: not defined.

    Args:
        s_x, s_y: (n, n) signs.
        w: (b, n) how often each candidate occurs.
        k: size of the top.
    """
    r_x, r_y = w @ s_x.T, w @ s_y.T
    rank_norm = np.sum(w * r_x**2, axis=1) * np.sum(w * r_y**2, axis=1)
    pair_norm = _pairs(s_x * s_x, w) * _pairs(s_y * s_y, w)
    top = np.minimum(_top_mass(s_x, r_x, w, k), _top_mass(s_y, r_y, w, k))
    statistics = np.full((3, len(w)), np.nan)
    varied = rank_norm > 0
    statistics[0, varied] = np.sum(w * r_x * r_y, axis=1)[varied] / np.sqrt(rank_norm[varied])
    statistics[1, varied] = _pairs(s_x * s_y, w)[varied] / np.sqrt(pair_norm[varied])
    if k < w.shape[1]:
        statistics[2, varied] = np.sum(top, axis=1)[varied] / k
    return statistics


def _pairs(m: np.ndarray, w: np.ndarray) -> np.ndarray:
    """sum_ij w[i] w[j] m[i, j] for each row of `w`."""
    return np.sum((w @ m) * w, axis=1)


def _top_mass(s: np.ndarray, r: np.ndarray, w: np.ndarray, k: int) -> np.ndarray:
    """(b, n) how much of the top k each candidate holds; ties share the last places evenly."""
    differ = w @ np.abs(s)
    above = (differ - r) / 2
    tied = w.sum(axis=1, keepdims=True) - differ  # at least w[i]; 0 only where w[i] is
    return w * np.clip((k - above) / np.maximum(tied, 1), 0, 1)


def _statistic(values: np.ndarray) -> Statistic:
    """The value (first) with the 95 % interval of the others; resamples without a value are out."""
    if np.isnan(values[0]):
        return Statistic()
    resampled = values[1:][~np.isnan(values[1:])]
    low, high = np.quantile(resampled if len(resampled) else values[:1], [0.025, 0.975])
    return Statistic(float(values[0]), float(low), float(high))


def _agreement(statistics: np.ndarray) -> Agreement:
    return Agreement(*map(_statistic, statistics))


def _outcome(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return "cannot be compared with"
    return "beats" if low > 0 else "loses to" if high < 0 else "ties with"


def _point(x: ArrayLike, y: ArrayLike, k: int) -> list[float | None]:
    scores = _columns(x=x, y=y)
    _require_positive(k=k)
    n = scores.shape[1]
    if n < MIN_PAIRS or np.isnan(scores).any():
        return [None, None, None]
    statistics = _statistics(_signs(scores[0]), _signs(scores[1]), np.ones((1, n)), k)
    return [None if np.isnan(value) else float(value) for value in statistics[:, 0]]


def _columns(**columns: ArrayLike) -> np.ndarray:
    arrays = {name: np.asarray(column, dtype=np.float64) for name, column in columns.items()}
    shapes = {array.shape for array in arrays.values()}
    if len(shapes) > 1 or len(shapes.pop()) != 1:
        given = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ShapeError(f"scores: shapes {given}; give lists of one length")
    return np.stack(list(arrays.values()))


def _require_positive(**settings: int) -> None:
    for name, value in settings.items():
        if value < 1:
            raise SpecError(f"{name}: {value} is too small; give at least 1")
