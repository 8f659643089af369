"""What a run's journal says, finished or not: the numbers behind its table and report.

Glossary
    event      a line of the journal; kinds and fields are listed in `kizzasi.nas.study.study`
    rung       "0", "1", ...: budgets that candidates climb; "final" stands apart from them, and
               "narrow", the final training of a finalist's twin at about half of the parameters
    counts     said of a trial at its family's chosen settings; the others of a sweep only serve to
               choose them
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from kizzasi.nas.results.equal_terms import Sized, sized
from kizzasi.nas.results.extended import current
from kizzasi.nas.results.finals import APART, Event, Final, falling, finalists, twins
from kizzasi.nas.results.noise import Noise, noise_of
from kizzasi.nas.results.rank_agreement import MIN_CANDIDATES, ProxyAgreement, proxy_agreement
from kizzasi.train.task import Metric

NEVER_WIN = ("preset", "outside")  # groups that are there for comparison only
MOST_COMPARED = 400  # candidates, evenly spread over a run, on whom proxies are judged
ANALYTIC = "proxy"  # the name of the proxy that every sampled candidate has


@dataclass(frozen=True)
class Standing:
    """A candidate and how far it came.

    Args:
        entry: its `candidate` event.
        trials: those that count, one per rung, lowest rung first.
        rank: from 1; None while no trial of it has a score.
    """

    entry: Event
    trials: tuple[Event, ...]
    rank: int | None

    @property
    def scored(self) -> Event | None:
        """The trial with a score on the deepest rung."""
        return next((t for t in reversed(self.trials) if t["score"] is not None), None)

    @property
    def tokens_per_second(self) -> float | None:
        """Of the deepest rung that trained; a trial may have found all its training done."""
        speeds = [t["tokens_per_second"] for t in self.trials if t["tokens_per_second"]]
        return speeds[-1] if speeds else None

    def tried(self, rung: str) -> bool:
        return any(t["rung"] == rung for t in self.trials)

    def score(self, rung: str) -> float | None:
        """Bits per byte on a rung; None if it was not reached or the trial failed."""
        return next((t["score"] for t in self.trials if t["rung"] == rung), None)


@dataclass(frozen=True)
class Rung:
    """One row of the rung table; `seconds` is training time summed over its trials."""

    name: str
    tokens: int
    trained: int
    failed: int
    best: float | None
    best_name: str
    seconds: float


@dataclass(frozen=True)
class Summary:
    """Everything that table and report say.

    Args:
        study: the `study` event; {} before it is written.
        entries: every `candidate` event, in the order of their birth.
        standings: every candidate: ranked ones first, then those that failed or wait.
        trials: every `trial` event.
        sweeps: every `settings` event.
        finals: every final training, best mean first.
        winner, preset: those of the searched winner and of the best preset, if begun.
        saved: the finalist whose weights are in the folder best: the winner, or the best preset.
        noise: of the finals; None before two of them share two seeds.
        twins: by finalist, its training at about half of the parameters, if it was asked for.
        sized: finalists with a score at both sizes.
        agreements: by proxy, the analytic one first, on rung "0"; if anyone has one and is trained.
        refused: by rule, candidates that broke it and were never built.
        screened: by screen, how many draws it judged, and tokens that it trained them on.
        result: the `result` event; {} before it is written.
        sample: the `sample` event of the model in the folder best; {} without one.
    """

    study: Event
    entries: tuple[Event, ...]
    standings: tuple[Standing, ...]
    trials: tuple[Event, ...]
    sweeps: tuple[Event, ...]
    finals: tuple[Final, ...]
    winner: Final | None
    saved: Final | None
    preset: Final | None
    noise: Noise | None
    twins: dict[str, Final]
    sized: tuple[Sized, ...]
    agreements: dict[str, ProxyAgreement]
    refused: dict[str, int]
    screened: dict[str, tuple[int, int]]
    result: Event
    sample: Event

    @property
    def at_edge(self) -> str:
        """A warning if the best model's settings are the lowest or highest that were tried."""
        entry = self.saved.entry if self.saved else self.leader
        if entry is None or "settings" in entry:  # a sweep has not chosen those
            return ""
        own = next((s for s in self.sweeps if s["family"] == entry["family"]), {})
        told = [
            f"{name} {own['settings'][name]:g} is the {end} of its sweep"
            for name, end in own.get("edges", {}).items()
        ]
        return f"{', '.join(told)}; a better value may lie beyond" if told else ""

    @property
    def finished(self) -> bool:
        """Whether the search is over."""
        return bool(self.result)

    @property
    def metric(self) -> Metric:
        """What the scores are; all scores here are `falling`, see finals.py."""
        return Metric.from_dict(self.study.get("metric", {"name": "bits/byte"}))

    @property
    def unit(self) -> str:
        return self.metric.label

    def show(self, score: float) -> str:
        """A score as text."""
        return self.metric.show(score)

    def say(self, final: Final) -> str:
        """Mean and spread of a finalist, with the unit."""
        if final.mean is None:
            return "failed"
        return f"{self.numbers(final)} {self.unit}"

    def numbers(self, final: Final) -> str:
        """The same without the unit."""
        if final.mean is None:
            return "failed"
        spread = "" if final.spread is None else f" ± {final.spread:.3f}"
        return f"{self.show(final.mean)}{spread}"

    @property
    def data(self) -> Event:
        """Name, digest and other facts of the data."""
        return self.study.get("data", {})

    @property
    def leader(self) -> Event | None:
        """The winner, or else the searched candidate that leads so far."""
        if self.winner:
            return self.winner.entry
        searched = (s for s in self.standings if s.rank and s.entry["group"] not in NEVER_WIN)
        return next((s.entry for s in searched), None)

    @property
    def best(self) -> Standing | None:
        """The candidate that stands first, whoever may win."""
        return next((s for s in self.standings if s.rank == 1), None)

    @property
    def reference(self) -> Final | None:
        """Whose size the parameter-matched table takes: the best preset, or else the winner."""
        return self.preset or self.winner

    @property
    def rungs(self) -> list[Rung]:
        climbed = {t["rung"] for s in self.standings for t in s.trials}
        return [self._rung(name) for name in sorted(climbed, key=int)]

    def _rung(self, name: str) -> Rung:
        tried = [(t, s) for s in self.standings for t in s.trials if t["rung"] == name]
        scored = [(t["score"], s) for t, s in tried if t["score"] is not None]
        best, by = min(scored, key=lambda pair: pair[0], default=(None, None))
        return Rung(
            name=name,
            tokens=max(t["tokens"] for t, _ in tried),
            trained=len(tried),
            failed=len(tried) - len(scored),
            best=best,
            best_name=by.entry["name"] if by else "",
            seconds=math.fsum(t["seconds"] for t, _ in tried),
        )

    @property
    def failures(self) -> list[tuple[str, Event, str]]:
        """Name, trial and reason of every trial without a score."""
        names = {s.entry["id"]: s.entry["name"] for s in self.standings}
        failed = (t for t in self.trials if t["score"] is None)
        return [(names[t["candidate"]], t, reason(t)) for t in failed]

    @property
    def estimate_ratios(self) -> dict[str, tuple[float, int]]:
        """Per family: the median of estimated over real parameters, and of how many candidates."""
        ratios: dict[str, list[float]] = {}
        for standing in self.standings:
            entry = standing.entry
            if entry.get("estimated_params") is not None:
                ratio = entry["estimated_params"] / entry["params"]
                ratios.setdefault(entry["family"], []).append(ratio)
        return {family: (statistics.median(r), len(r)) for family, r in ratios.items()}


def summarise(events: Iterable[Event]) -> Summary:
    """Say what a journal holds; a pure function of its events, complete or still growing.

    Args:
        events: as read by `kizzasi.nas.study.journal.read_events`.

    Returns:
        A Summary. Candidates rank as the `result` event says, or else, while the run goes on, by
        the deepest rung that scored them and then by bits per byte.
    """
    events = current(events)
    entries = {e["id"]: e for e in events if e["event"] == "candidate"}
    trials = [e for e in events if e["event"] == "trial"]
    study = next((e for e in events if e["event"] == "study"), {})
    sign = Metric.from_dict(study.get("metric", {"name": "bits/byte"})).sign
    trials = [falling(trial, sign) for trial in trials]
    sweeps = [e for e in events if e["event"] == "settings"]
    result = next((e for e in events if e["event"] == "result"), None)
    standings = _standings(entries, trials, {e["family"]: e["settings"] for e in sweeps}, result)
    finals = finalists(entries, trials, result)
    by_finalist = twins(events, trials)
    winner, preset = _duellists(finals, result)
    best = next((f for f in finals if result and f.entry["id"] == result.get("best")), winner)
    return Summary(
        study=study,
        entries=tuple(entries.values()),
        standings=tuple(standings),
        trials=tuple(trials),
        sweeps=tuple(sweeps),
        finals=tuple(finals),
        winner=winner,
        saved=best,
        preset=preset,
        noise=noise_of(finals),
        twins=by_finalist,
        sized=tuple(sized(finals, by_finalist)),
        agreements=_agreements(standings),
        refused=(result or {}).get("refused") or {},
        screened=_screened(e for e in events if e["event"] == "screen"),
        result=result or {},
        sample=next((e for e in reversed(events) if e["event"] == "sample"), {}),
    )


def reason(trial: Event) -> str:
    """Why a trial has no score."""
    lost = trial.get("non_finite", {}).get("score")
    return trial["failure"] or f"the held-out score became {lost}"


def _standings(
    entries: dict[str, Event],
    trials: Sequence[Event],
    settings: dict[str, Event],
    result: Event | None,
) -> list[Standing]:
    own: dict[str, list[Event]] = {name: [] for name in entries}
    for trial in trials:
        if trial["rung"] not in APART:
            own[trial["candidate"]].append(trial)
    found = [
        Standing(
            entry,
            _counting(own[name], entry.get("settings", settings.get(entry["family"]))),
            None,
        )
        for name, entry in entries.items()
    ]
    scored = [s for s in found if s.scored]
    if result:
        place = {name: i for i, name in enumerate(result["ranking"])}
        scored.sort(key=lambda s: place.get(s.entry["id"], len(place)))
    else:
        scored.sort(key=_depth_and_score)
    ranked = [Standing(s.entry, s.trials, i + 1) for i, s in enumerate(scored)]
    return ranked + [s for s in found if not s.scored]


def _depth_and_score(standing: Standing) -> tuple[int, float]:
    assert standing.scored, "only scored candidates are ranked"
    return -int(standing.scored["rung"]), standing.scored["score"]


def _screened(screens: Iterable[Event]) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for screen in screens:
        n, tokens = found.get(screen["by"], (0, 0))
        found[screen["by"]] = n + 1, tokens + screen.get("tokens", 0)
    return found


def _counting(trials: Sequence[Event], settings: Event | None) -> tuple[Event, ...]:
    """One of a candidate's trials per rung; while the sweep of its family runs, its best so far."""
    best: dict[str, Event] = {}
    for trial in trials:
        rung, score = trial["rung"], trial["score"]
        if settings not in (None, trial["settings"]):
            continue
        held = best.get(rung, {}).get("score")
        if rung not in best or (score is not None and (held is None or score < held)):
            best[rung] = trial
    return tuple(best[rung] for rung in sorted(best, key=int))


def _duellists(finals: Sequence[Final], result: Event | None) -> tuple[Final | None, Final | None]:
    """The final trainings of the winner and of the best preset; the best so far without result."""
    if result:
        own = {final.entry["id"]: final for final in finals}
        return own.get(result["winner"]), own.get(result.get("preset"))
    presets = [f for f in finals if f.entry["group"] == "preset"]
    searched = [f for f in finals if f.entry["group"] not in NEVER_WIN]
    return next(iter(searched), None), next(iter(presets), None)


def proxies_of(entry: Event) -> dict[str, float]:
    """The finite scores that a candidate had before any training, by proxy."""
    named = {ANALYTIC: entry.get("proxy"), **(entry.get("proxies") or {})}
    return {name: value for name, value in named.items() if value is not None}


def _agreements(standings: Sequence[Standing]) -> dict[str, ProxyAgreement]:
    """Every proxy against scores of the first rung, where everyone had the same budget.

    Presets have no analytic score and stay out of all; a failed trial is worse than every other.
    Resampling takes the square of their number, so of very many a share is judged.
    """
    tried = [s for s in standings if s.entry["group"] != "preset" and s.tried("0")]
    unchosen = [s for s in tried if s.entry["group"] in ("random", "outside")]
    if sum(s.entry["group"] == "random" for s in unchosen) >= MIN_CANDIDATES:
        tried = unchosen  # neither a proxy nor scores have chosen them
    if len(tried) > MOST_COMPARED:
        tried = [tried[i * len(tried) // MOST_COMPARED] for i in range(MOST_COMPARED)]
    names = dict.fromkeys(name for s in tried for name in proxies_of(s.entry))
    return {name: _agreement(tried, name) for name in names}


def _agreement(tried: Sequence[Standing], name: str) -> ProxyAgreement:
    scores = [s.score("0") for s in tried]
    return _agreement_of(
        proxy=tuple(proxies_of(s.entry).get(name, math.nan) for s in tried),
        trained=tuple(-math.inf if score is None else -score for score in scores),
        params=tuple(s.entry["params"] for s in tried),
        in_band=tuple(s.entry["group"] != "outside" for s in tried),
    )


# Resampling takes a second; who watches a run asks again and again.
_agreement_of = lru_cache(maxsize=64)(proxy_agreement)
