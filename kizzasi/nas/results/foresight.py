"""What extrapolated learning curves were worth in a run: do they foretell the next ranking?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kizzasi.nas.results.rank_agreement import MIN_CANDIDATES, kendall_tau_b
from kizzasi.nas.schedulers.extrapolated import expected
from kizzasi.nas.schedulers.schedule import Curve

Event = dict[str, Any]


@dataclass(frozen=True)
class Foresight:
    """Two rankings at a rung beside the one at the next rung, over those who reached both.

    Args:
        rung: that the rankings are of.
        n: candidates with scores at both.
        by_curves: Kendall's tau-b of the scores that their curves promised.
        by_scores: of the scores that they had.
    """

    rung: int
    n: int
    by_curves: float
    by_scores: float

    def __str__(self) -> str:
        return (
            f"at rung {self.rung} extrapolated curves agree with the next rung's ranking by "
            f"{self.by_curves:.2f} and the scores there by {self.by_scores:.2f} "
            f"(Kendall tau-b, {self.n} candidates)"
        )


def foresight(climbed: Sequence[Sequence[Event]]) -> list[Foresight]:
    """Of every rung from which enough candidates went on.

    Those were chosen by one of the two rankings, so both look worse than they are, and that one
    more so.

    Args:
        climbed: for each candidate its trials, lowest rung first; scores lower is better.
    """
    found = []
    for rung in range(max(map(len, climbed), default=0)):
        rows = [row for trials in climbed if (row := _row(trials, rung))]
        if len(rows) < MIN_CANDIDATES:
            continue
        promised, seen, later = zip(*rows, strict=True)
        by_curves, by_scores = kendall_tau_b(promised, later), kendall_tau_b(seen, later)
        if by_curves is not None and by_scores is not None:
            found.append(Foresight(rung, len(rows), by_curves, by_scores))
    return found


def _row(trials: Sequence[Event], rung: int) -> tuple[float, float, float] | None:
    """Promised, seen and later score, higher is better; None where one is missing."""
    here, later = (next((t for t in trials if t["rung"] == str(r)), None) for r in (rung, rung + 1))
    if here is None or later is None or None in (here["score"], later["score"]):
        return None
    curve: Curve = here["curve"]
    promised = expected(-here["score"], curve, here["tokens"], later["tokens"])
    return promised, -here["score"], -later["score"]
