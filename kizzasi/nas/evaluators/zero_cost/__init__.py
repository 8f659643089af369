"""Zero-cost proxies: scores of a model before any training, from one batch.

    proxy(model, (inputs, targets)) -> float, higher is better

They order architectures of one task on one batch; two values mean nothing apart. Model, gradients,
modes and random states stay as they are, and equal arguments give equal scores. None is known to
beat the parameter count in general: ask `proxy_agreement` on your own trainings first.

| proxy | looks at | passes |
|---|---|---|
| params, flops | the spec alone; the baselines | 0 |
| grad_norm | length of the loss gradient | 1 backward |
| snip | loss change when a connection is cut | 1 backward |
| fisher | loss change when a channel of a branch is cut | 1 backward |
| zico | gradients beside their variation from row to row | 1 backward per row |
| synflow | flow along positive paths | 1 backward |
| jacob_cov | whether rows have different input gradients | 1 backward |
| naswot | whether rows have different signs inside | 1 forward |
| logdet | room that the hidden states take up | 1 forward |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from kizzasi.models import SequenceModel
from kizzasi.nas.evaluators.zero_cost.activations import fisher, logdet, naswot
from kizzasi.nas.evaluators.zero_cost.gradients import grad_norm, snip, zico
from kizzasi.nas.evaluators.zero_cost.jacobian import jacob_cov
from kizzasi.nas.evaluators.zero_cost.parts import Batch
from kizzasi.nas.evaluators.zero_cost.size import flops, params
from kizzasi.nas.evaluators.zero_cost.synflow import synflow

Proxy: TypeAlias = Callable[[SequenceModel, Batch], float]

PROXIES: dict[str, Proxy] = {
    "params": params,
    "flops": flops,
    "grad_norm": grad_norm,
    "snip": snip,
    "fisher": fisher,
    "zico": zico,
    "synflow": synflow,
    "jacob_cov": jacob_cov,
    "naswot": naswot,
    "logdet": logdet,
}

__all__ = [
    "PROXIES",
    "Batch",
    "Proxy",
    "fisher",
    "flops",
    "grad_norm",
    "jacob_cov",
    "logdet",
    "naswot",
    "params",
    "snip",
    "synflow",
    "zico",
]
