"""Which mixer where: the least damage under a budget of bytes, and exactly that.

Every layer has options, each with state bytes and a damage, and damages add up. That they do is the
one assumption: the divergence of a model with many mixers replaced is not the sum of those with one
replaced each, but ranks plans much as the sum does (Bercovich et al. 2024, arXiv:2411.19146).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kizzasi.errors import SpecError


class Option(NamedTuple):
    """What may stand in a layer: state_bytes of that layer's mixer, and the damage, in nats."""

    name: str
    state_bytes: int
    damage: float


class Plan(NamedTuple):
    """One name for every layer; the sums of their bytes and of their damages."""

    names: tuple[str, ...]
    state_bytes: int
    damage: float


class Front:
    """All plans of which none is both smaller and less harmful than another; fewest bytes first.

    Layer by layer, every kept sum meets every option of the layer, and what is no better than a
    smaller one is dropped: dynamic programming over the reachable sums of bytes, so the result is
    that of trying all combinations.

    Args:
        layers: the options of each layer, at least one.

    Attributes:
        state_bytes: (n,) int64 of the plans, rising.
        damage: (n,) float64, falling.
    """

    def __init__(self, layers: Sequence[Sequence[Option]]) -> None:
        self.layers = [list(options) for options in layers]
        if not self.layers or not all(self.layers):
            raise SpecError("layers: every layer needs an option; give its own mixer as one")
        self.state_bytes, self.damage = np.zeros(1, np.int64), np.zeros(1)
        self._steps: list[tuple[np.ndarray, np.ndarray]] = []  # option taken, plan before
        for options in self.layers:
            size = np.array([o.state_bytes for o in options], np.int64)
            harm = np.array([o.damage for o in options], np.float64)
            sizes = (self.state_bytes[:, None] + size).ravel()
            harms = (self.damage[:, None] + harm).ravel()
            order = np.lexsort((harms, sizes))
            best = np.minimum.accumulate(np.concatenate([[np.inf], harms[order][:-1]]))
            kept = order[harms[order] < best]
            self.state_bytes, self.damage = sizes[kept], harms[kept]
            self._steps.append((kept % len(options), kept // len(options)))

    def __len__(self) -> int:
        return len(self.damage)

    def __getitem__(self, index: int) -> Plan:
        at, names = range(len(self))[index], list[str]()
        place = at
        for options, (taken, before) in zip(
            reversed(self.layers), reversed(self._steps), strict=True
        ):
            names.append(options[taken[place]].name)
            place = before[place]
        return Plan(tuple(reversed(names)), int(self.state_bytes[at]), float(self.damage[at]))

    def within(self, budget: int) -> Plan:
        """The least harmful plan of at most so many bytes.

        Raises SpecError where even the smallest plan is larger; the message says how large.
        """
        at = int(np.searchsorted(self.state_bytes, budget, side="right")) - 1
        if at < 0:
            raise SpecError(
                f"budget: {budget:,} state bytes; the smallest plan needs "
                f"{int(self.state_bytes[0]):,}; give more, or candidates with smaller states"
            )
        return self[at]


def choose(layers: Sequence[Sequence[Option]], budget: int) -> Plan:
    """`Front(layers).within(budget)`: the least sum of damages under a budget of state bytes."""
    return Front(layers).within(budget)
