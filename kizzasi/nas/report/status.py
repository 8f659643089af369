"""A run on one screen, while it goes on: how far it is, who leads, and how long it will take."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from kizzasi.nas.report.svg import short
from kizzasi.nas.report.tables import rung_rows
from kizzasi.nas.results.summary import Summary
from kizzasi.nas.results.words import gist

WIDTH, MOST_NAME = 100, 44
RESUME = "kizzasi search --resume goes on with it"


@dataclass(frozen=True)
class Pace:
    """How fast a run goes by the clock on the wall.

    Args:
        seconds: of training, all trials together.
        tokens: trained in them.
        side_by_side: trials at one moment; None if nobody has watched long enough to know.
    """

    seconds: float
    tokens: int
    side_by_side: float | None = None


def pace_of(summary: Summary, side_by_side: float | None = None) -> Pace:
    """What the journal knows of it: `seconds` of a trial are its own, earlier rungs left out."""
    seconds = math.fsum(trial["seconds"] for trial in summary.trials)
    rates = ((t["tokens_per_second"] or 0.0) * t["seconds"] for t in summary.trials)
    return Pace(seconds, round(math.fsum(rates)), side_by_side)


def tokens_left(summary: Summary) -> int | None:
    """Tokens that the rungs and the final trainings still need at most; None if it is not known.

    Known for a search with a budget of its own, and for one whose candidates are all there from
    the start and of whom each rung keeps a share.
    """
    config = summary.study.get("config", {})
    if not {"rungs", "keep", "final_tokens", "final_seeds"} <= config.keys():
        return None
    done = sum(len(f.trials) for f in (*summary.finals, *summary.twins.values()))
    seeds = config["final_seeds"] + config.get("slope_seeds", 0)
    wanted = (config.get("n_finalists", 1) + 1) * seeds
    left = max(0, wanted - done) * config["final_tokens"]
    if summary.finals:
        return left
    if config.get("search_tokens"):
        return left + max(0, config["search_tokens"] - pace_of(summary).tokens)
    return left + _climb_left(summary) if config.get("searcher", "proxy") == "proxy" else None


def _climb_left(summary: Summary) -> int:
    config = summary.study["config"]
    reached = {rung.name: rung.trained for rung in summary.rungs}
    n, before, left = len(summary.entries), 0, 0
    for i, tokens in enumerate(config["rungs"]):
        left += max(0, n - reached.get(str(i), 0)) * (tokens - before)
        before, n = tokens, max(2, round(config["keep"] * n)) + 1
    return left


def status(summary: Summary, pace: Pace, *, alive: bool = True) -> str:
    """Trials done, the best so far, the rung table, and the time left, in 100 columns.

    Args:
        summary: of the journal.
        pace: of the trainings.
        alive: whether a process still writes the journal.
    """
    name = summary.data.get("name")
    head = f"search on {name}" if name else "search, not yet begun"
    failed = len(summary.failures)
    lines = [
        f"{head}: {_state(summary, alive)}",
        f"trials    {len(summary.trials)} done, {failed} failed, of {len(summary.entries)} "
        f"candidates; {short(pace.tokens)} tokens in {_duration(pace.seconds)} of training",
        *_leaders(summary),
        f"left      {_left(summary, pace) if alive or summary.finished else RESUME}",
    ]
    rungs = [[_cut(cell) for cell in row] for row in rung_rows(summary)]
    if len(rungs) > 1:
        widths = [max(len(row[i]) for row in rungs) for i in range(len(rungs[0]))]
        lines.append("")
        lines += ["  ".join(c.rjust(w) for c, w in zip(r, widths, strict=True)) for r in rungs]
    return "\n".join(_printable(line[:WIDTH]) for line in lines)


def _cut(cell: str) -> str:
    """A name of a model that leaves room for the other columns."""
    return cell if len(cell) <= MOST_NAME else f"{cell[: MOST_NAME - 1]}…"


def _state(summary: Summary, alive: bool) -> str:
    if summary.finished:
        return "complete"
    return "going on" if alive else "stopped"


def _leaders(summary: Summary) -> list[str]:
    """The best so far; once final training has begun, the finalists."""
    if summary.finals:
        return [
            f"final     {summary.say(final)}  {final.entry['name']}" for final in summary.finals[:5]
        ]
    best = summary.best
    if best is None or best.scored is None:
        if not summary.failures:
            return ["best      no score yet"]
        reasons = Counter(gist(reason) for _, _, reason in summary.failures)
        reason, n = reasons.most_common(1)[0]
        return ["best      no score yet", f"failed    {n}: {reason}"]
    score, tokens = summary.show(best.scored["score"]), short(best.scored["tokens"])
    said = f"{score} {summary.unit} at {tokens} tokens"
    return [f"best      {said}  {best.entry['name']} ({best.entry['params']:,} parameters)"]


def _left(summary: Summary, pace: Pace) -> str:
    if summary.finished:
        return "nothing"
    tokens = tokens_left(summary)
    if tokens is None or not pace.tokens:
        return "not known"
    seconds = tokens / pace.tokens * pace.seconds
    if pace.side_by_side:
        return f"about {_duration(seconds / pace.side_by_side)}"
    return f"about {_duration(seconds)} of training, less with several trials side by side"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "\ufffd" for c in text)
