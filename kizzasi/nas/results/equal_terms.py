"""Finalists on equal terms: at one number of parameters, after one time, and at double size.

What decides the search is the mean score after equal tokens; all of this only says how it would
look otherwise, on valid.

Glossary
    N, N'     parameters of a finalist and of its twin at about half of them (`resized`)
    y, y'     their bits per byte, seed by seed, after the same tokens
    T, t      tokens of the final training, and of its part that fits a given time
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from kizzasi.nas.results.finals import Event, Final
from kizzasi.nas.results.noise import noise_of, t_quantile

CLOSE = 0.02  # sizes that differ by less are compared as they are
DISTURBED = 1.2  # seeds of one training that differ more in speed: the machine was busy


@dataclass(frozen=True)
class Sized:
    """A finalist at two sizes, over the seeds that finished at both.

    Args:
        final: with its parameters.
        twin: the same layers at about half the size, with the twin's.
    """

    final: Final
    twin: Final

    @property
    def slope(self) -> Final:
        """(y - y') / log2(N / N'): bits per byte for each doubling of the parameters."""
        doublings = math.log2(self.final.entry["params"] / self.twin.entry["params"])
        small = self.twin.by_seed
        both = {s: (y, small[s]) for s, y in self.final.by_seed.items() if s in small}
        return self.final.scored({s: (y - low) / doublings for s, (y, low) in both.items()})

    def at(self, n_params: float) -> Final:
        """y + slope log2(n_params / N): the finalist moved along its own slope."""
        doublings, y = math.log2(n_params / self.final.entry["params"]), self.final.by_seed
        return self.final.scored({s: y[s] + a * doublings for s, a in self.slope.by_seed.items()})

    @property
    def doubled(self) -> Final:
        return self.at(2 * self.final.entry["params"])


def sized(finals: Sequence[Final], twins: Mapping[str, Final]) -> list[Sized]:
    """The finalists that have a score at both sizes, with one seed in common at least."""
    trained = {own: twin for own, twin in twins.items() if twin.scores}
    pairs = [Sized(f.on_valid, trained[f.entry["id"]]) for f in finals if f.entry["id"] in trained]
    return [pair for pair in pairs if pair.slope.scores]


def turns(pairs: Sequence[Sized]) -> list[tuple[Final, Final]]:
    """(a, b) at double size, where b is behind at the size of the search and a is behind then."""
    doubled = sorted((pair.doubled for pair in pairs), key=_mean)
    now = {p.final.entry["id"]: _mean(p.at(p.final.entry["params"])) for p in pairs}
    return [
        (a, b)
        for i, a in enumerate(doubled)
        for b in doubled[i + 1 :]
        if now[a.entry["id"]] > now[b.entry["id"]]
    ]


def equal_params(finals: Sequence[Final], pairs: Sequence[Sized], n_params: int) -> list[Final]:
    """Finalists at one size, in their order: moved along their own slopes; or as they are, if they
    have none and are within 2 % of the size; or else without a score."""
    own = {pair.final.entry["id"]: pair.at(n_params) for pair in pairs}
    as_is = [f.on_valid if close(f, n_params) else f.scored({}) for f in finals]
    return [own.get(f.entry["id"]) or f for f in as_is]


def close(final: Final, n_params: int) -> bool:
    return abs(final.entry["params"] / n_params - 1) <= CLOSE


@dataclass(frozen=True)
class InTime:
    """A finalist after the seconds that the fastest one trained for.

    Args:
        final: as it was after all tokens.
        speeds: tokens per second of its seeds, fastest first. The first one counts: whatever else
            the machine does can only slow a training down.
        tokens: that fit the time.
        mean: bits per byte after them; None if the curve does not tell.
        error: of reading the curve, at 95 %.
    """

    final: Final
    speeds: tuple[float, ...]
    tokens: int
    mean: float | None
    error: float


def equal_time(finals: Sequence[Final]) -> list[InTime]:
    """Every finalist with a score and a speed, after the time of the fastest, best first."""
    measured = [(final, speeds) for final in finals if (speeds := _speeds(final))]
    top = max((speeds[0] for _, speeds in measured), default=0.0)
    rows = []
    for tested, speeds in measured:
        final = tested.on_valid
        tokens = round(final.tokens * speeds[0] / top)
        mean, error = _read(final, tokens)
        rows.append(InTime(final, speeds, tokens, mean, error))
    return sorted(rows, key=lambda row: math.inf if row.mean is None else row.mean)


def _speeds(final: Final) -> tuple[float, ...]:
    """Of the seeds that trained to the end; one that only scored its checkpoint has none."""
    done = (t["tokens_per_second"] for t in final.trials if t["score"] is not None)
    return tuple(sorted((speed for speed in done if speed), reverse=True))


def _read(final: Final, tokens: int) -> tuple[float | None, float]:
    """The held-out score at fewer tokens, and its error at 95 %.

        loss = a + b log2(tokens), least squares over the training losses since min(t, T / 2)
        y(t) = y(T) - b log2(T / t)

    Losses are means over the seeds.
    """
    if tokens >= final.tokens:
        return final.mean, 0.0
    losses: dict[int, list[float]] = {}
    for trial in final.trials:
        for at, loss in trial["curve"] if trial["score"] is not None else ():
            losses.setdefault(at, []).append(loss)
    start = min(tokens, final.tokens / 2)
    points = {math.log2(at): statistics.fmean(ls) for at, ls in losses.items() if at >= start}
    freedom = len(points) - 2
    if freedom < 1 or min(losses) > tokens or final.mean is None:
        return None, 0.0
    x, y = list(points), list(points.values())
    b, a = statistics.linear_regression(x, y)
    squares = math.fsum((v - a - b * u) ** 2 for u, v in zip(x, y, strict=True))
    error = t_quantile(0.975, freedom) * math.sqrt(
        squares / freedom / (statistics.pvariance(x) * len(x))
    )
    doublings = math.log2(final.tokens / tokens)
    return final.mean - b * doublings, error * doublings


def result_figures(
    finals: Sequence[Final], pairs: Sequence[Sized], n_params: int, sign: int
) -> Event:
    """What of this no clock has a part in, for the `result` event."""
    at_size = equal_params(finals, pairs, n_params)
    slopes, doubled = [pair.slope for pair in pairs], [pair.doubled for pair in pairs]
    return {
        "equal_params": {"params": n_params, **_figures(at_size, sign)},
        "slopes": _figures(slopes, sign) if pairs else None,
        "double_size": _figures(doubled, sign) if pairs else None,
    }


def _figures(finals: Sequence[Final], sign: int) -> Event:
    noise = noise_of(finals)
    means = [
        {
            "candidate": f.entry["id"],
            "mean": None if f.mean is None else sign * f.mean,
            "spread": f.spread,
        }
        for f in finals
    ]
    return {"finalists": means, "noise": noise and asdict(noise)}


def _mean(final: Final) -> float:
    assert final.mean is not None, "a pair has a score"
    return final.mean
