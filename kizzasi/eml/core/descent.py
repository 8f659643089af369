"""eml-core's coordinate descent: its sequence of trials, run on whatever device the model is on.

A trial adds a step to one parameter and keeps it if the error falls. The sequence is drawn first.
`ListedDescent` follows it by tensor operations, on any device and for any module; on a CPU
flattened attention has a compiled kernel. Both take the path of one trial after another.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from kizzasi.eml.core.rng import Lcg, Rng
from kizzasi.eml.search.coordinate import ListedDescent
from kizzasi.eml.search.minimize import minimize
from kizzasi.eml.search.objective import ModuleObjective
from kizzasi.errors import SpecError
from kizzasi.models.ops.engines import Engines

_ROUND_STRIDE = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class EndToEndTrainConfig:
    """How `train_end_to_end` searches; names and defaults are eml-core's.

    Args:
        trials: parameters tried per round.
        step_init, step_final: size of a step at the start and the end, geometric in between.
        max_samples: how many recorded samples a round may see, oldest first.
        eval_subset: how many of those are evaluated, evenly strided; few means fast and overfitted.
        convergence_mse: below this error the model counts as trained.
        seed: of the trial sequence; each round shifts it.
    """

    trials: int = 2000
    step_init: float = 0.5
    step_final: float = 0.02
    max_samples: int = 96
    eval_subset: int = 16
    convergence_mse: float = 1e-2
    seed: int = 0xDEADBEEF

    def __post_init__(self) -> None:
        if min(self.trials, self.max_samples, self.eval_subset) < 1:
            raise SpecError(f"{self}: trials, max_samples and eval_subset must be at least 1")
        if min(self.step_init, self.step_final) <= 0:
            raise SpecError(f"{self}: step_init and step_final must be above 0")


def draw_trials(
    config: EndToEndTrainConfig, rounds: int, n_params: int, rng: Rng
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a round's whole sequence: which parameter, and the signed step."""
    lcg = Lcg(config.seed + rounds * _ROUND_STRIDE, rng)
    ratio = config.step_final / config.step_init
    index = np.empty(config.trials, dtype=np.int64)
    delta = np.empty(config.trials)
    for trial in range(config.trials):
        step = config.step_init * ratio ** (trial / config.trials)
        index[trial] = min(int(lcg.unit() * n_params), n_params - 1)
        delta[trial] = lcg.signed() * step
    return index, delta


def descend(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    index: np.ndarray,
    delta: np.ndarray,
    batch: int | None = None,
) -> tuple[float, float, int]:
    """Run trials on a module by tensor operations, where its parameters are.

    Args:
        model: its parameters, in order, are what `index` runs over; changed by what succeeds.
        inputs, targets: (S, ...).
        index, delta: (trials) the sequence.
        batch: candidates per evaluation; None follows the rate at which trials succeed.

    Returns:
        The mean squared error before and after, and how many trials succeeded.
    """
    names = [name for name, _ in model.named_parameters()]
    objective = ModuleObjective(
        model, lambda out: (out - targets).square().mean(), inputs, names=names
    )
    places, steps = (torch.from_numpy(each).to(inputs.device) for each in (index, delta))
    optimizer = ListedDescent(places, steps, batch=batch)
    before = float(objective(objective.start[None]))
    found = minimize(objective, optimizer, evaluations=len(index) + 1)
    objective.assign(found.x)
    return before, float(found.loss), int(found.state.accepts)


def descend_ref(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    index: np.ndarray,
    delta: np.ndarray,
    batch: int | None = None,
) -> tuple[float, float, int]:
    """`descend`, one candidate at a time: the definition."""
    return descend(model, inputs, targets, index, delta, batch=1)


# Of flattened attention whose softmax is no tree.
DESCENT = Engines(
    "eml_descent",
    reference=descend_ref,
    torch=descend,
    native="kizzasi.eml.core.native:descend",
)
