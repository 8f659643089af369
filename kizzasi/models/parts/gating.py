"""A gate over a few parts: what `routed` and `sequence_routed` have in common.

    p = softmax(W_g x / temperature);    the top_k largest are chosen, ties by the order of listing

Symbols: n parts to choose from, k = top_k; f_i, P_i as in ops/routing.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from kizzasi.models.ops.precision import full_precision, without_autocast
from kizzasi.models.ops.routing import mean_over, switch_loss
from kizzasi.strict import join, require


class GateSpec(Protocol):
    """The fields that a spec with a gate has."""

    kind: ClassVar[str]

    @property
    def top_k(self) -> int: ...
    @property
    def temperature(self) -> float: ...
    @property
    def balance_weight(self) -> float: ...


def check_gate(spec: GateSpec, n: int, path: str) -> None:
    """Raise SpecError for every rule that a gate over n parts breaks."""
    require(n > 0, join(path, "mixers"), "empty; give at least one mixer")
    rule = f"{spec.top_k} is not between 1 and the {n} there are to choose from"
    require(1 <= spec.top_k <= n, join(path, "top_k"), rule)
    rule = f"{spec.temperature} is not positive; 1.0 is usual"
    require(spec.temperature > 0, join(path, "temperature"), rule)
    rule = f"{spec.balance_weight} is negative; give 0 or more"
    require(spec.balance_weight >= 0, join(path, "balance_weight"), rule)


def choose(spec: GateSpec, gate: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (..., n) in at least float32 of x (..., d), and which parts were chosen."""
    with without_autocast(x):
        probs = (gate(full_precision(x)) / spec.temperature).softmax(-1)
        best = probs.argsort(dim=-1, descending=True, stable=True)[..., : spec.top_k]
    return probs, torch.zeros_like(probs, dtype=torch.bool).scatter(-1, best, True)


def balance_loss(
    spec: GateSpec, probs: Tensor, chosen: Tensor, counted: Tensor | None
) -> Mapping[str, Tensor]:
    """balance_weight n sum_i f_i P_i as a `MixerOut.aux`, over (b, t, n) where `counted` (b, t)."""
    if not spec.balance_weight:
        return {}
    load = mean_over(chosen.to(probs.dtype), counted) / spec.top_k
    loss = spec.balance_weight * switch_loss(load, mean_over(probs, counted))
    return {f"{spec.kind}_balance": loss}
