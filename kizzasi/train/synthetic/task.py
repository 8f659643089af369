"""A generator of synthetic examples as a task: fresh ones to train on, fixed ones to score."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kizzasi.errors import SpecError
from kizzasi.models import ModelOutput, Tokens
from kizzasi.train.seeds import derive_seed
from kizzasi.train.synthetic.examples import Examples
from kizzasi.train.task import IGNORE, Batch, Forward, Metric, Scores, Shape, Split, scored, spread

RIGHT = Metric("accuracy", lower_is_better=False, of_loss=False)


@dataclass(frozen=True)
class SyntheticTask:
    """Right answers to a synthetic question; windows are as long as the examples are.

    Args:
        examples: the generator.
        n_held_out: examples of valid, and as many others of test.
        device: where batches go.
    """

    examples: Examples
    n_held_out: int = 256
    device: str = "cpu"

    metric: Metric = field(
        default=Metric("accuracy", lower_is_better=False, of_loss=False), init=False
    )
    ceiling: float = field(default=math.inf, init=False)
    curve_scale: float = field(default=1.0, init=False)

    @property
    def name(self) -> str:
        return type(self.examples).__name__

    @property
    def stem(self) -> Tokens:
        return Tokens(self.examples.vocab_size)

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.examples!r} {self.n_held_out}".encode()).hexdigest()

    @property
    def seq_len(self) -> int:
        """Positions of an example."""
        return self.examples.sample(1, 0).inputs.shape[1]

    def check(self, shape: Shape, stem: object) -> None:
        """Raises SpecError unless windows are the examples and the stem knows their tokens."""
        if shape.seq_len != self.seq_len:
            raise SpecError(
                f"seq_len: {shape.seq_len}, but examples of {self.name} have {self.seq_len}"
            )
        if not isinstance(stem, Tokens) or stem.vocab_size < self.examples.vocab_size:
            raise SpecError(f"stem: {self.name} needs Tokens({self.examples.vocab_size})")

    def to(self, device: torch.device) -> SyntheticTask:
        return replace(self, device=str(device))

    def batches(self, split: Split, seed: int, step: int, shape: Shape) -> Iterator[Batch]:
        while True:
            yield self._drawn(shape.batch_size, derive_seed(seed, split, step))
            step += 1

    def loss(self, out: ModelOutput, batch: Batch) -> Tensor:
        """Nats per answer."""
        return out.loss(batch.targets.clamp(min=0), batch.targets != IGNORE)

    def score(self, model: Forward, split: Split, shape: Shape) -> Scores:
        """The share of right answers of every example."""
        held_out = self._drawn(self.n_held_out, derive_seed(0, "held out", split))
        chosen = spread(self.n_held_out, shape.score_windows)
        return scored(
            model, held_out.inputs[chosen], held_out.targets[chosen], shape, right_answers
        )

    def has(self, split: Split) -> bool:
        return True

    def baselines(self) -> dict[str, float]:
        return {"chance": self.examples.chance}

    def facts(self) -> dict[str, Any]:
        return {"n_held_out": self.n_held_out}

    def _drawn(self, n: int, seed: int) -> Batch:
        inputs, targets, _ = self.examples.sample(n, seed)
        return Batch(inputs.to(self.device), targets.to(self.device))


def right_answers(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(b,) share of the scored positions that are right, and how many are scored."""
    asked = targets != IGNORE
    right = (logits.argmax(-1) == targets) & asked
    return right.sum(1) / asked.sum(1).clamp(min=1), asked.sum(1)
