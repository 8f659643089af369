"""How far apart two models are, gene by gene.

A gene is a number or word at a place of a module: "mixer.n_heads" of the second run, say. Numbers
are compared by their ratio, so that a width of 64 weighs no more than 2 heads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

from kizzasi.models import ModelSpec
from kizzasi.nas.pipelines.space.tree import runs

FAR = 2.0  # doublings at which two numbers count as wholly different


def distance(a: ModelSpec, b: ModelSpec) -> float:
    """Share of the genes of either that differ, 0 to 1; numbers by how much."""
    mine, theirs = genes(a), genes(b)
    names = mine.keys() | theirs.keys()
    return sum(_gap(mine.get(name), theirs.get(name)) for name in names) / len(names)


@functools.lru_cache(maxsize=4096)
def genes(spec: ModelSpec) -> dict[str, Any]:
    """Every gene by name."""
    found = {"d_model": spec.d_model, "norm": spec.norm}
    for i, run in enumerate(runs(spec)):
        found[f"{i} n"] = len(run)
        found.update(_leaves(run[0].to_dict(), str(i)))
    return found


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{i}]")
    else:
        yield path, value


def _gap(a: Any, b: Any) -> float:
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (a, b))
    if a == b:
        return 0.0
    if not numbers or a <= 0 or b <= 0:
        return 1.0
    return min(1.0, abs(math.log2(a / b)) / FAR)
