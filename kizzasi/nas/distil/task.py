"""`Distilled`: a task learnt from a model instead of the text, for the ordinary `Training`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kizzasi.errors import DataError
from kizzasi.models import ModelOutput, SequenceModel, Signal, Tokens
from kizzasi.nas.distil.yardstick import divergence
from kizzasi.train.task import Batch, Forward, Metric, Scores, Shape, Split, Task


def windows(task: Task, split: Split, n: int, seq_len: int, seed: int) -> Batch:
    """n windows of a split, drawn by the seed, as inputs and targets (n, seq_len).

    Raises DataError where the task has no such split.
    """
    if not task.has(split):
        raise DataError(f"{task.name}: has no split {split}; give more data")
    return next(task.batches(split, seed, 0, Shape(seq_len, n)))


@dataclass(frozen=True)
class Distilled:
    """The text of a task, and what a teacher expects in it.

        loss = KL(teacher || student), nats a token, a mean over the tokens of a batch

    Scores and splits are those of the task: what the text itself costs.

    Args:
        task: of tokens.
        teacher: in evaluation mode, on the device of the training.
    """

    task: Task
    teacher: SequenceModel

    curve_scale = 1.0

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def stem(self) -> Tokens | Signal:
        return self.task.stem

    @property
    def metric(self) -> Metric:
        return replace(self.task.metric, of_loss=False)

    @property
    def digest(self) -> str:
        text = f"{self.task.digest} distilled from {self.teacher.spec.digest}"
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def ceiling(self) -> float:
        return self.task.ceiling

    def check(self, shape: Shape, stem: object) -> None:
        self.task.check(shape, stem)

    def to(self, device: torch.device) -> Distilled:
        return Distilled(self.task.to(device), self.teacher)

    def batches(self, split: Split, seed: int, step: int, shape: Shape) -> Iterator[Batch]:
        return self.task.batches(split, seed, step, shape)

    def loss(self, out: ModelOutput, batch: Batch) -> Tensor:
        with torch.no_grad():
            log_p = self.teacher(batch.inputs).logits.float().log_softmax(-1)
        kl = divergence(log_p, out.logits.float().log_softmax(-1)).mean()
        return kl + sum(out.aux.values())

    def score(self, model: Forward, split: Split, shape: Shape) -> Scores:
        return self.task.score(model, split, shape)

    def has(self, split: Split) -> bool:
        return self.task.has(split)

    def baselines(self) -> dict[str, float]:
        return self.task.baselines()

    def facts(self) -> dict[str, Any]:
        return self.task.facts()
