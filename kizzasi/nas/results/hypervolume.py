"""How much of a box two fronts dominate: a number for what a picture of them shows.

Glossary
    point   (cost, falling score) of a candidate; less is better in both
    box     from the best to the worst of all points in each, and a tenth beyond the worst, so that
            the ends of a front count too; costs by their logarithm
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from kizzasi.nas.results.finals import Event
from kizzasi.nas.results.summary import NEVER_WIN, Summary

Point = tuple[float, float]
BEYOND = 1.1


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """The area of what is worse than some point and better than the reference in both numbers.

    Args:
        points: any, on a front or not; those beyond the reference count for nothing.
        reference: the far corner.

    Source: Zitzler & Thiele 1998, "Multiobjective optimization using evolutionary algorithms", PPSN
        V, section 3.2, of two objectives.
    """
    area, ceiling = 0.0, reference[1]
    for x, y in sorted(points):
        if x < reference[0] and y < ceiling:
            area += (reference[0] - x) * (ceiling - y)
            ceiling = y
    return area


class Covered(NamedTuple):
    """Shares of the box, 0 to 1, that the searched candidates and the presets dominate."""

    searched: float
    presets: float


def covered(summary: Summary, cost: str) -> Covered | None:
    """Both shares on the deepest rung, for the score against a cost.

    Args:
        summary: of a run.
        cost: a field of `candidate` events, such as "state_bytes".

    Returns:
        None where either kind has no candidate with a score and that cost.
    """
    if not summary.rungs:
        return None
    deepest, points = summary.rungs[-1].name, {}
    for standing in summary.standings:
        kind, size = _kind(standing.entry), standing.entry.get(cost)
        score = standing.score(deepest)
        if kind and size is not None and score is not None:
            points.setdefault(kind, []).append((math.log1p(size), score))
    if len(points) < 2:
        return None
    both = list(zip(*points["searched"], *points["preset"], strict=True))
    low = [min(axis) for axis in both]
    span = [max(axis) - min(axis) or 1.0 for axis in both]

    def share(kind: str) -> float:
        scaled = [((x - low[0]) / span[0], (y - low[1]) / span[1]) for x, y in points[kind]]
        return hypervolume(scaled, (BEYOND, BEYOND)) / BEYOND**2

    return Covered(share("searched"), share("preset"))


def _kind(entry: Event) -> str:
    if entry["group"] == "preset":
        return "preset"
    return "" if entry["group"] in NEVER_WIN else "searched"
