"""What a run's journal says, finished or not: the numbers behind its table and report.

Glossary
    event      a line of the journal; kinds and fields are listed in `kizzasi.nas.study`
    rung       "0", "1", ...: budgets that candidates climb; "final" stands apart from them
    counts     said of a trial at its family's chosen learning rate; the others of a sweep only
               serve to choose that rate
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kizzasi.nas.worth import ProxyWorth, proxy_worth

Event = dict[str, Any]
FINAL = "final"
SEARCHED = ("proxy", "random")  # groups that may win


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
        return next((t for t in reversed(self.trials) if t["bits_per_byte"] is not None), None)

    @property
    def tokens_per_second(self) -> float | None:
        """Of the deepest rung that trained; a trial may have found all its training done."""
        speeds = [t["tokens_per_second"] for t in self.trials if t["tokens_per_second"]]
        return speeds[-1] if speeds else None

    def tried(self, rung: str) -> bool:
        return any(t["rung"] == rung for t in self.trials)

    def score(self, rung: str) -> float | None:
        """Bits per byte on a rung; None if it was not reached or the trial failed."""
        return next((t["bits_per_byte"] for t in self.trials if t["rung"] == rung), None)


@dataclass(frozen=True)
class Final:
    """An architecture trained anew at the final budget, over one or more seeds.

    Args:
        entry: its `candidate` event.
        trials: one per seed; at least one.
    """

    entry: Event
    trials: tuple[Event, ...]

    @property
    def scores(self) -> list[float]:
        """Bits per byte of the seeds that did not fail."""
        return [t["bits_per_byte"] for t in self.trials if t["bits_per_byte"] is not None]

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.scores) if self.scores else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None for fewer than two."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    @property
    def tokens(self) -> int:
        return max(t["tokens"] for t in self.trials)

    def __str__(self) -> str:
        if self.mean is None:
            return "failed"
        spread = "" if self.spread is None else f" ± {self.spread:.3f}"
        return f"{self.mean:.3f}{spread} bits/byte"


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
        standings: every candidate: ranked ones first, then those that failed or wait.
        trials: every `trial` event.
        sweeps: every `lr` event.
        winner, preset: final trainings of the searched winner and of the best preset, if begun.
        worth: of the proxy on rung "0"; None while no candidate with a proxy is trained.
        finished: whether the `result` event is there.
    """

    study: Event
    standings: tuple[Standing, ...]
    trials: tuple[Event, ...]
    sweeps: tuple[Event, ...]
    winner: Final | None
    preset: Final | None
    worth: ProxyWorth | None
    finished: bool

    @property
    def leader(self) -> Event | None:
        """The winner, or else the searched candidate that leads so far."""
        if self.winner:
            return self.winner.entry
        searched = [s for s in self.standings if s.rank and s.entry["group"] in SEARCHED]
        return searched[0].entry if searched else None

    @property
    def rungs(self) -> list[Rung]:
        climbed = {t["rung"] for s in self.standings for t in s.trials}
        return [self._rung(name) for name in sorted(climbed, key=int)]

    def _rung(self, name: str) -> Rung:
        tried = [(t, s) for s in self.standings for t in s.trials if t["rung"] == name]
        scored = [(t["bits_per_byte"], s) for t, s in tried if t["bits_per_byte"] is not None]
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
        failed = (t for t in self.trials if t["bits_per_byte"] is None)
        return [(names[t["candidate"]], t, reason(t)) for t in failed]

    @property
    def estimate_ratios(self) -> dict[str, tuple[float, int]]:
        """Per family: the median of estimated over real parameters, and of how many candidates."""
        ratios: dict[str, list[float]] = {}
        for standing in self.standings:
            entry = standing.entry
            if entry["estimated_params"] is not None:
                ratio = entry["estimated_params"] / entry["params"]
                ratios.setdefault(entry["family"], []).append(ratio)
        return {family: (statistics.median(r), len(r)) for family, r in ratios.items()}


def summarise(events: Iterable[Event]) -> Summary:
    """Say what a journal holds; a pure function of its events, complete or still growing.

    Args:
        events: as read by `kizzasi.nas.storage.read_events`.

    Returns:
        A Summary. Candidates rank as the `result` event says, or else, while the run goes on, by
        the deepest rung that scored them and then by bits per byte.
    """
    events = list(events)
    entries = {e["id"]: e for e in events if e["event"] == "candidate"}
    trials = [e for e in events if e["event"] == "trial"]
    sweeps = [e for e in events if e["event"] == "lr"]
    result = next((e for e in events if e["event"] == "result"), None)
    standings = _standings(entries, trials, {e["family"]: e["lr"] for e in sweeps}, result)
    winner, preset = _finals(entries, trials, result)
    return Summary(
        study=next((e for e in events if e["event"] == "study"), {}),
        standings=tuple(standings),
        trials=tuple(trials),
        sweeps=tuple(sweeps),
        winner=winner,
        preset=preset,
        worth=_worth(standings),
        finished=result is not None,
    )


def reason(trial: Event) -> str:
    """Why a trial has no score."""
    lost = trial.get("non_finite", {}).get("bits_per_byte")
    return trial["failure"] or f"the held-out score became {lost}"


def _standings(
    entries: dict[str, Event],
    trials: Sequence[Event],
    lrs: dict[str, float],
    result: Event | None,
) -> list[Standing]:
    found = [
        Standing(entry, _counting(trials, entry, lrs.get(entry["family"])), None)
        for entry in entries.values()
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
    return -int(standing.scored["rung"]), standing.scored["bits_per_byte"]


def _counting(trials: Sequence[Event], entry: Event, lr: float | None) -> tuple[Event, ...]:
    """One trial per rung; while the sweep of the family runs, its best so far."""
    best: dict[str, Event] = {}
    for trial in trials:
        rung, score = trial["rung"], trial["bits_per_byte"]
        if trial["candidate"] != entry["id"] or rung == FINAL or lr not in (None, trial["lr"]):
            continue
        held = best.get(rung, {}).get("bits_per_byte")
        if rung not in best or (score is not None and (held is None or score < held)):
            best[rung] = trial
    return tuple(best[rung] for rung in sorted(best, key=int))


def _finals(
    entries: dict[str, Event], trials: Sequence[Event], result: Event | None
) -> tuple[Final | None, Final | None]:
    """The final trainings of the winner and of the best preset."""
    final = [t for t in trials if t["rung"] == FINAL]
    if result:
        ids = (set(result["winner_trials"]), set(result["preset_trials"]))
    else:
        presets = {t["id"] for t in final if entries[t["candidate"]]["group"] == "preset"}
        ids = ({t["id"] for t in final} - presets, presets)
    sides = [[t for t in final if t["id"] in own] for own in ids]
    winner, preset = (Final(entries[s[0]["candidate"]], tuple(s)) if s else None for s in sides)
    return winner, preset


def _worth(standings: Sequence[Standing]) -> ProxyWorth | None:
    """The proxy against scores of the first rung, where everyone had the same budget.

    Presets have no proxy score and stay out; a failed trial is worse than every other.
    """
    tried = [s for s in standings if s.entry["proxy"] is not None and s.tried("0")]
    if not tried:
        return None
    scores = [s.score("0") for s in tried]
    return proxy_worth(
        proxy=[s.entry["proxy"] for s in tried],
        trained=[-math.inf if score is None else -score for score in scores],
        params=[s.entry["params"] for s in tried],
        in_band=[s.entry["group"] != "outside" for s in tried],
    )


def findings(summary: Summary) -> list[str]:
    """What the run found, in words: progress, the winner's duels, the proxy's worth, caveats."""
    said = (_progress, _duel, _against_baselines, _control, _proxy, _estimates, _repeated)
    return [text for text in (say(summary) for say in said) if text]


def _progress(summary: Summary) -> str:
    state = "complete" if summary.finished else "not complete; --resume continues it"
    failed = len(summary.failures)
    return (
        f"The search is {state}: {len(summary.standings)} candidates, "
        f"{len(summary.trials)} trials, {failed or 'none'} of them failed."
    )


def _duel(summary: Summary) -> str:
    winner, preset = summary.winner, summary.preset
    if winner is None:
        return "No winner has been trained at the final budget yet."
    said = (
        f"Trained anew on {winner.tokens:,} tokens, the winner {winner.entry['name']} "
        f"({winner.entry['params']:,} parameters) reaches {winner}"
    )
    if preset is None:
        return f"{said}; there is no preset to compare it with."
    return (
        f"{said}; the best preset, {preset.entry['name']} ({preset.entry['params']:,} "
        f"parameters), on {preset.tokens:,} tokens: {preset}. {_outcome(winner, preset)}."
    )


def _outcome(winner: Final, preset: Final) -> str:
    """A difference is one only if every seed of one side beats every seed of the other."""
    w, p = winner.scores, preset.scores
    if not w or not p:
        return "One of the two has failed, so they cannot be compared"
    gap = f"by {abs(statistics.fmean(p) - statistics.fmean(w)):.3f} bits/byte"
    if len(w) == len(p) == 1:
        place = "ahead" if w < p else "behind"
        return f"The winner is {place} {gap}; a single seed does not tell that from noise"
    seeds = f"{len(w)} seeds against {len(p)}"
    if max(w) < min(p):
        return f"The winner beats the preset {gap}, its worst seed the preset's best ({seeds})"
    if min(w) > max(p):
        return (
            f"The winner loses to the preset {gap}, its best seed to the preset's worst ({seeds})"
        )
    return f"Their seeds overlap, which makes it a tie ({seeds})"


def _against_baselines(summary: Summary) -> str:
    baselines: dict[str, float] = summary.study.get("baselines", {})
    if not baselines:
        return ""
    listed = ", ".join(f"{value:.3f} ({name})" for name, value in baselines.items())
    said = f"Without a neural network the held-out bytes cost {listed} bits/byte"
    if summary.winner is None or summary.winner.mean is None:
        return f"{said}."
    lost = [name for name, value in baselines.items() if value <= summary.winner.mean]
    needs = f"more than {' and '.join(lost)}" if lost else "less than every one of them"
    return f"{said}; the winner needs {summary.winner.mean:.3f}, {needs}."


def _control(summary: Summary) -> str:
    medians = {}
    for group in SEARCHED:
        of_group = (s for s in summary.standings if s.entry["group"] == group)
        scores = [score for s in of_group if (score := s.score("0")) is not None]
        if not scores:
            return ""
        medians[group] = f"{statistics.median(scores):.3f} ({len(scores)})"
    return (
        f"On the first rung the candidates that the proxy chose have a median of "
        f"{medians['proxy']} bits/byte, the random control group {medians['random']}."
    )


def _proxy(summary: Summary) -> str:
    return f"What the proxy was worth: {summary.worth.verdict}" if summary.worth else ""


def _estimates(summary: Summary) -> str:
    ratios = summary.estimate_ratios.items()
    listed = ", ".join(f"{ratio:.2f} for {family} ({n})" for family, (ratio, n) in ratios)
    return f"Estimated over real parameters, median per family: {listed}." if ratios else ""


def _repeated(summary: Summary) -> str:
    share = summary.study.get("corpus", {}).get("repeated")
    if share is None:
        return ""
    return f"{share:.1%} of the held-out bytes repeat a stretch of the training text verbatim."
