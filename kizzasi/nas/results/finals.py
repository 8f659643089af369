"""Finalists: architectures trained anew at the final budget, over one or more seeds.

Scores are "falling" here and in all of `results`: sign * score, so that less is always better.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Event = dict[str, Any]

FINAL, TWIN, TEST = "final", "narrow", "test"  # rungs apart from those that candidates climb
APART = (FINAL, TWIN, TEST)


def falling(trial: Event, sign: int) -> Event:
    """A trial event with sign * score."""
    if sign == 1 or trial["score"] is None:
        return trial
    values = trial.get("values")
    turned = {"values": [-v for v in values]} if values else {}
    return {**trial, "score": -trial["score"], **turned}


@dataclass(frozen=True)
class Final:
    """An architecture trained anew at the final budget, over one or more seeds.

    Args:
        entry: its `candidate` event.
        trials: one per seed, scored on valid.
        tests: the same trainings scored on test, once that was read; they are what counts then.
    """

    entry: Event
    trials: tuple[Event, ...]
    tests: tuple[Event, ...] = ()

    @property
    def by_seed(self) -> dict[int, float]:
        """Scores of the seeds that did not fail."""
        return _by_seed(self.tests or self.trials)

    @property
    def windows(self) -> list[float] | None:
        """The mean over the seeds of every test window's score, if all seeds have them."""
        columns = [t.get("values") for t in self.tests]
        if not columns or not all(columns):
            return None
        return [statistics.fmean(window) for window in zip(*columns, strict=True)]

    @property
    def on_valid(self) -> Final:
        """The same with the scores on valid, which decided."""
        return Final(self.entry, self.trials)

    @property
    def scores(self) -> list[float]:
        return list(self.by_seed.values())

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

    def scored(self, by_seed: Mapping[int, float]) -> Final:
        """The same entry with other scores: what follows from those that were measured."""
        trials = ({"seed": seed, "score": score} for seed, score in by_seed.items())
        return Final(self.entry, tuple(trials))


def finalists(
    entries: Mapping[str, Event], trials: Sequence[Event], result: Event | None = None
) -> list[Final]:
    """Every candidate with a final training, best mean first, those that failed last.

    The result names their trainings, since one on a rung can be a final one as well.
    """
    own: dict[str, list[Event]] = {}
    if result and "finalists" in result:
        known = {trial["id"]: trial for trial in trials}
        own = {f["candidate"]: [known[t] for t in f["trials"]] for f in result["finalists"]}
    else:
        for trial in trials:
            if trial["rung"] == FINAL:
                own.setdefault(trial["candidate"], []).append(trial)
    tests: dict[str, list[Event]] = {}
    for trial in trials if result else ():
        if trial["rung"] == TEST:
            tests.setdefault(trial["candidate"], []).append(trial)
    found = [
        Final(entries[name], tuple(ts), tuple(tests.get(name, ()))) for name, ts in own.items()
    ]
    return sorted(found, key=lambda f: math.inf if f.mean is None else f.mean)


def twins(events: Iterable[Event], trials: Sequence[Event]) -> dict[str, Final]:
    """By candidate: its twin, as far as it is trained; the entry is the `narrow` event."""
    known = {trial["id"]: trial for trial in trials}
    found = (event for event in events if event["event"] == TWIN)
    return {
        event["candidate"]: Final(event, tuple(known[t] for t in event["trials"] if t in known))
        for event in found
    }


def _by_seed(trials: Iterable[Event]) -> dict[int, float]:
    return {t["seed"]: t["score"] for t in trials if t["score"] is not None}
