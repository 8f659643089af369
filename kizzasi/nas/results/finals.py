"""Finalists: architectures trained anew at the final budget, and which of them are tied.

Glossary
    m, n      finalists with a score, and seeds that all of them finished
    y[i, s]   bits per byte of finalist i with seed s
    floor     a difference of two means below it is noise
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Event = dict[str, Any]

FINAL, NARROW = "final", "narrow"  # rungs apart from those that candidates climb


@dataclass(frozen=True)
class Final:
    """An architecture trained anew at the final budget, over one or more seeds.

    Args:
        entry: its `candidate` event.
        trials: one per seed.
    """

    entry: Event
    trials: tuple[Event, ...]

    @property
    def by_seed(self) -> dict[int, float]:
        """Bits per byte of the seeds that did not fail."""
        scored = (t for t in self.trials if t["bits_per_byte"] is not None)
        return {t["seed"]: t["bits_per_byte"] for t in scored}

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
        trials = ({"seed": seed, "bits_per_byte": score} for seed, score in by_seed.items())
        return Final(self.entry, tuple(trials))

    def __str__(self) -> str:
        if self.mean is None:
            return "failed"
        spread = "" if self.spread is None else f" ± {self.spread:.3f}"
        return f"{self.mean:.3f}{spread} bits/byte"


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
    found = [Final(entries[name], tuple(ts)) for name, ts in own.items()]
    return sorted(found, key=lambda f: math.inf if f.mean is None else f.mean)


def twins(events: Iterable[Event], trials: Sequence[Event]) -> dict[str, Final]:
    """By candidate: its narrow twin, as far as it is trained; the entry is the `narrow` event."""
    known = {trial["id"]: trial for trial in trials}
    narrow = (event for event in events if event["event"] == NARROW)
    return {
        event["candidate"]: Final(event, tuple(known[t] for t in event["trials"] if t in known))
        for event in narrow
    }
