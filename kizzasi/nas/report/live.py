"""What a search is at, event by event, in a few words: the phase, how many trials, and the best."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kizzasi.nas.results.finals import FINAL, TEST, TWIN
from kizzasi.train.task import Metric

# In the order in which they come; trainings on several rungs go on at once, and the deepest counts.
BASELINES, PROXIES, SCREENS, RUNGS, FINALS, SIZES, TESTS, SAVING = range(8)
OF_EVENTS = {"candidate": PROXIES, "measured": PROXIES, "screen": SCREENS, "saved": SAVING}
OF_RUNGS = {FINAL: FINALS, TWIN: SIZES, TEST: TESTS}
NAMES = {
    BASELINES: "baselines",
    PROXIES: "proxies",
    SCREENS: "screens",
    FINALS: "final trainings",
    SIZES: "final trainings at half the size",
    TESTS: "test",
    SAVING: "saving",
}


class Live:
    """Follows a search by its events; `text` is what to show.

    Args:
        metric: of its scores.
        n_rungs: how many budgets candidates climb.
    """

    def __init__(self, metric: Metric, n_rungs: int) -> None:
        self.metric, self.n_rungs = metric, n_rungs
        self.names: dict[str, str] = {}
        self.phase, self.n, self.n_failed, self.tokens = (BASELINES, 0), 0, 0, 0
        self.best: tuple[tuple[int, float], str] | None = None

    def told(self, events: Iterable[dict[str, Any]]) -> None:
        """What a resumed run has behind it."""
        for event in events:
            self.tell(event)

    def tell(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "candidate":
            self.names[event["id"]] = event["name"]
        if kind == "trial":
            self._trial(event)
        elif kind in OF_EVENTS:
            self.phase = max(self.phase, (OF_EVENTS[kind], 0))

    def _trial(self, trial: dict[str, Any]) -> None:
        rung, score = trial["rung"], trial["score"]
        self.n += 1
        self.n_failed += score is None
        self.tokens += round((trial["tokens_per_second"] or 0.0) * trial["seconds"])
        deep = self.n_rungs if rung in OF_RUNGS else int(rung)
        self.phase = max(self.phase, (OF_RUNGS.get(rung, RUNGS), deep))
        if score is not None and rung not in (TWIN, TEST):
            place = -deep, self.metric.sign * score
            if self.best is None or place < self.best[0]:
                self.best = place, self.names.get(trial["candidate"], "")

    @property
    def text(self) -> str:
        kind, deep = self.phase
        parts = [NAMES.get(kind) or f"rung {deep + 1} of {self.n_rungs}"]
        if self.n:
            failed = f" ({self.n_failed} failed)" if self.n_failed else ""
            parts.append(f"{self.n} trial{'' if self.n == 1 else 's'}{failed}")
        if self.best:
            (_, score), name = self.best
            parts.append(f"best {self.metric.show(score)} {self.metric.label} ({name})")
        return ", ".join(parts)
