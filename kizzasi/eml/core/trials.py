"""Coordinate descent on flattened attention, one random parameter a trial, many trials a batch.

A trial adds a step to one parameter and keeps it if the error falls. Trials are evaluated together
on the guess that all of them fail; the first that succeeds is kept, the later ones are asked again.
So the path is the sequential one, whatever the batch.

Glossary:
    S, n, r        samples, positions (seq_len), channels per position (d_k)
    P              candidates evaluated together
    z, u           a head's value before and after its chain of EML operators, kept as (heads, S)
    A, C           attention weights, and A V, the context
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kizzasi.eml.core.rng import Lcg, Rng
from kizzasi.eml.core.tree import SafeTree
from kizzasi.errors import SpecError

MAX_BATCH = 256
MARGIN = 1e-12
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


class Objective(Protocol):
    """A loss that can be asked what one changed parameter would do."""

    def loss(self) -> float: ...

    def evaluate(self, index: np.ndarray, delta: np.ndarray) -> Tensor:
        """Return (P) losses, candidate p being the parameters with delta[p] added at index[p]."""
        ...

    def commit(self, index: int, delta: float) -> None:
        """Keep one change."""
        ...


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
    objective: Objective,
    index: np.ndarray,
    delta: np.ndarray,
    batch: int | None = None,
    margin: float = MARGIN,
) -> tuple[float, int]:
    """Run the trials in order; return the final loss and how many were kept.

    Args:
        objective: changed in place by the trials that are kept.
        index, delta: (trials) the sequence.
        batch: candidates per evaluation; None follows the rate at which trials succeed. The path
            does not depend on it.
        margin: by how much the loss must fall.
    """
    best = objective.loss()
    accepts, start, size = 0, 0, batch or 16
    while start < len(index):
        stop = min(start + size, len(index))
        losses = objective.evaluate(index[start:stop], delta[start:stop]).tolist()
        kept = next((i for i, loss in enumerate(losses) if loss + margin < best), None)
        if kept is None:
            start = stop
            size = batch or min(2 * size, MAX_BATCH)
            continue
        best = losses[kept]
        objective.commit(int(index[start + kept]), float(delta[start + kept]))
        accepts += 1
        start += kept + 1
        size = batch or max(2, min(2 * (kept + 1), MAX_BATCH))
    return best, accepts


@dataclass
class FlatAttention:
    """Attention whose projections see the whole sequence at once, as eml-core's do.

    q, k, v = trees of the flattened x;  C = softmax(q k^T scale) v;  y = out tree of flattened C.

    Args:
        q, k, v: trees from (seq * d_model) to (seq * d_k).
        out: tree from (seq * d_k) to (seq * d_model).
        seq_len: positions.
        softmax: None for the numerical softmax, or a tree over a row of scores.
    """

    q: SafeTree
    k: SafeTree
    v: SafeTree
    out: SafeTree
    seq_len: int
    softmax: SafeTree | None = None

    @property
    def scale(self) -> float:
        return (self.q.heads // self.seq_len) ** -0.5

    def __call__(self, x: Tensor) -> Tensor:
        """Map (..., seq * d_model) to the same shape."""
        q, k, v = (tree(x).unflatten(-1, (self.seq_len, -1)) for tree in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) * self.scale
        return self.out((self.row_softmax(scores) @ v).flatten(-2))

    def row_softmax(self, scores: Tensor) -> Tensor:
        """Weigh each row of scores, by the tree where there is one and it gives usable weights."""
        numerical = torch.softmax(scores, -1)
        if self.softmax is None:
            return numerical
        learned = self.softmax(scores)
        learned = torch.where(learned.isfinite() & (learned > 0), learned, 0.0)
        total = learned.sum(-1, keepdim=True)
        return torch.where(total > 1e-12, learned / total.clamp_min(1e-12), numerical)


class PlainTrials:
    """The definition: every candidate is a full forward pass. Slow; works for any softmax.

    Args:
        attention: evaluated and changed in place.
        parameters: the flat tensors that a trial's index runs over, in order.
        inputs, targets: (S, seq * d_model).
    """

    def __init__(
        self, attention: FlatAttention, parameters: list[Tensor], inputs: Tensor, targets: Tensor
    ) -> None:
        self.attention, self.inputs, self.targets = attention, inputs, targets
        self.parameters = [p.detach() for p in parameters]
        self.ends = np.cumsum([len(p) for p in parameters])

    @torch.no_grad()
    def loss(self) -> float:
        return float((self.attention(self.inputs) - self.targets).square().mean())

    def evaluate(self, index: np.ndarray, delta: np.ndarray) -> Tensor:
        losses = []
        for i, d in zip(index, delta, strict=True):
            flat, at = self._locate(int(i))
            saved = flat[at].clone()
            flat[at] += float(d)
            losses.append(self.loss())
            flat[at] = saved
        return torch.tensor(losses, dtype=torch.float64)

    def commit(self, index: int, delta: float) -> None:
        flat, at = self._locate(index)
        flat[at] += delta

    def _locate(self, index: int) -> tuple[Tensor, int]:
        which = int(np.searchsorted(self.ends, index, side="right"))
        return self.parameters[which], index - int(self.ends[which]) + len(self.parameters[which])
