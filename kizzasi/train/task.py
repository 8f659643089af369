"""`Task`: what is learnt and how it is scored; the trainer and the search know nothing else of it.

Glossary
    split     "train", "valid" (decides everything), "test" (read once, for the result)
    window    what one row of a batch holds, and what one value of a score is about
    b, t      windows of a batch, positions of a window
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models import ModelOutput, Signal, Tokens

Split = Literal["train", "valid", "test"]
Forward = Callable[[Tensor], ModelOutput]
IGNORE = -100  # a target without a loss; the default `ignore_index` of torch's cross_entropy
LN2 = math.log(2)


@dataclass(frozen=True)
class Metric:
    """What a score is.

    Args:
        name: such as "bits/byte" or "accuracy".
        unit: as it stands behind a number; the name where it is left out.
        lower_is_better: its direction.
        root: the score is the square root of the mean over windows, as in RMSE.
        of_loss: training losses, as shown, are values of it.
    """

    name: str
    unit: str = ""
    lower_is_better: bool = True
    root: bool = False
    of_loss: bool = True

    @property
    def label(self) -> str:
        """What stands behind a number."""
        return self.unit or self.name

    @property
    def sign(self) -> int:
        """1 where less is better, else -1: sign * score always falls."""
        return 1 if self.lower_is_better else -1

    def show(self, falling: float, digits: int = 3) -> str:
        """sign * score as text, the right way round."""
        return f"{self.sign * falling:.{digits}f}"

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Metric:
        known = {field.name for field in fields(cls)}  # a later version may know more
        return cls(**{name: value for name, value in facts.items() if name in known})


class Batch(NamedTuple):
    """inputs (b, t) ids or (b, t, n_in) frames, and what the outputs should be."""

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Shape:
    """How data is cut up.

    Args:
        seq_len: positions of a window.
        batch_size: windows of a batch.
        score_windows: windows that a score uses, evenly spread; None means all.
        rank, world: of those windows, every world-th from rank on is this process's.
    """

    seq_len: int
    batch_size: int
    score_windows: int | None = None
    rank: int = 0
    world: int = 1


class Scores(NamedTuple):
    """values (n,): the metric on every window; weights (n,): how much each of them counts."""

    values: Tensor
    weights: Tensor

    def mean(self, metric: Metric) -> float:
        """The score: the weighted mean, or its root."""
        mean = ((self.values * self.weights).sum() / self.weights.sum()).item()
        return math.sqrt(mean) if metric.root else mean


class Task(Protocol):
    """Data, a loss and a score. Plain picklable values: a worker gets a copy.

    Attributes:
        name: for reports.
        stem: both ends of every model of this task.
        metric: of its scores.
        digest: hex; equal digests mean that scores are comparable.
        ceiling: a mean training loss above it has diverged.
        curve_scale: what a training loss is multiplied by to be shown.
    """

    @property
    def name(self) -> str: ...

    @property
    def stem(self) -> Tokens | Signal: ...

    @property
    def metric(self) -> Metric: ...

    @property
    def digest(self) -> str: ...

    @property
    def ceiling(self) -> float: ...

    @property
    def curve_scale(self) -> float: ...

    def check(self, shape: Shape, stem: object) -> None:
        """Raise DataError or SpecError if data, shape and a model's stem do not fit together."""
        ...

    def to(self, device: torch.device) -> Task:
        """The task with its data where it will be used."""
        ...

    def batches(self, split: Split, seed: int, step: int, shape: Shape) -> Iterator[Batch]:
        """Random batches for ever, from this step on; each depends on (seed, step) alone."""
        ...

    def loss(self, out: ModelOutput, batch: Batch) -> Tensor:
        """The mean loss, auxiliary losses included."""
        ...

    def score(self, model: Forward, split: Split, shape: Shape) -> Scores:
        """The metric on every window of this process; a model in evaluation mode comes in."""
        ...

    def has(self, split: Split) -> bool:
        """Whether there is such a split."""
        ...

    def baselines(self) -> dict[str, float]:
        """What simple models without training by gradients score on valid, by name."""
        ...

    def facts(self) -> dict[str, Any]:
        """What a report says of the data, as plain values."""
        ...


def spread(n: int, wanted: int | None) -> Tensor:
    """(min(n, wanted),) indices of n windows, evenly spread."""
    return torch.linspace(0, n - 1, min(wanted or n, n)).round().long()


def scored(
    model: Forward,
    inputs: Tensor,
    targets: Tensor,
    shape: Shape,
    each: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Scores:
    """Values of the windows of this process, batch by batch; all processes run equally often.

    Args:
        model: in evaluation mode.
        inputs, targets: (n, ...) all windows, on the device of the model.
        shape: whose batch_size and rank count.
        each: (logits, targets) to values and weights, (b,) each. Rows that only fill up the last
            batch are copies of the first window and are cut off again.
    """
    n = len(inputs)
    own = torch.arange(shape.rank, n + -n % shape.world, shape.world, device=inputs.device)
    real = own < n
    own = torch.where(real, own, 0)
    parts = [
        each(model(inputs[rows]).logits, targets[rows]) for rows in own.split(shape.batch_size)
    ]
    values, weights = (torch.cat(column).double()[real] for column in zip(*parts, strict=True))
    return Scores(values, weights)


def token_nats(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(b,) mean nats of each window's targets, and how many there are, IGNORE left out."""
    flat = logits.flatten(0, 1).float()
    each = F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORE, reduction="none")
    counts = (targets != IGNORE).sum(1)
    return each.view(targets.shape).double().sum(1) / counts.clamp(min=1), counts


def token_bits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """As `token_nats`, in bits."""
    nats, counts = token_nats(logits, targets)
    return nats / LN2, counts
