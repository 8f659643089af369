"""`Labels`: one class a sequence, answered at the last position.

Sequences of ids have a stem of tokens whose first ids are the classes; sequences of frames have a
stem of frames with an output for each class.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.errors import DataError, SpecError
from kizzasi.models import ModelOutput, Signal, Tokens
from kizzasi.train.task import Batch, Forward, Metric, Scores, Shape, Split, scored, spread
from kizzasi.train.windows import starts

REGRESSION_STEPS = 200


@dataclass(frozen=True, eq=False)
class Labels:
    """Classify sequences.

    Args:
        name: where they came from.
        inputs: (n, t) ids or (n, t, c) frames, all of one length, in an order without meaning.
        classes: (n,) from 0.
        n_classes: how many there are.
        digest: of all that.
        measure: the metric: share of right answers, or nats.
        valid_fraction, test_fraction: shares at the end of a fixed shuffle.
    """

    name: str
    inputs: Tensor
    classes: Tensor
    n_classes: int
    digest: str
    measure: Literal["accuracy", "NLL"] = "accuracy"
    valid_fraction: float = 0.1
    test_fraction: float = 0.1

    curve_scale: float = field(default=1.0, init=False)

    @classmethod
    def open(cls, path: str | Path, **options: Any) -> Labels:
        """Read a .npz with the arrays x (n, t) or (n, t, c), and y (n,). Raises DataError."""
        try:
            with np.load(path, allow_pickle=False) as file:
                return cls.of(str(path), file["x"], file["y"], **options)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path}: expected a .npz with arrays x and y: {error}") from error

    @classmethod
    def of(
        cls,
        name: str,
        x: np.ndarray,
        y: np.ndarray,
        *,
        measure: Literal["accuracy", "NLL"] = "accuracy",
        valid_fraction: float = 0.1,
        test_fraction: float = 0.1,
    ) -> Labels:
        """From arrays of your own. Raises DataError."""
        x, y = np.asarray(x), np.asarray(y)
        ids = x.ndim == 2 and x.dtype.kind in "ui"
        frames = x.ndim == 3 and x.dtype.kind == "f"
        if not (ids or frames) or y.shape != x.shape[:1] or y.dtype.kind not in "ui":
            raise DataError(
                f"{name}: x {x.shape} of {x.dtype} and y {y.shape} of {y.dtype}; expected ids "
                "(n, t) or frames (n, t, c), and a class from 0 for each"
            )
        if len(y) < 10 or y.min() < 0 or (ids and x.min() < 0):
            raise DataError(f"{name}: {len(y)} sequences; give at least 10, and no negative number")
        order = np.argsort(np.random.Philox(key=0).random_raw(len(y)), kind="stable")
        x, y = x[order].astype(np.int64 if ids else np.float32), y[order].astype(np.int64)
        shares = f"{x.shape} {measure} {valid_fraction} {test_fraction}"
        digest = hashlib.sha256(shares.encode() + x.tobytes() + y.tobytes()).hexdigest()
        return cls(
            name,
            torch.from_numpy(x),
            torch.from_numpy(y),
            int(y.max()) + 1,
            digest,
            measure,
            valid_fraction,
            test_fraction,
        )

    @property
    def stem(self) -> Tokens | Signal:
        if self.inputs.ndim == 3:
            return Signal(self.inputs.shape[2], self.n_classes)
        return Tokens(max(int(self.inputs.max()) + 1, self.n_classes))

    @property
    def metric(self) -> Metric:
        right = self.measure == "accuracy"
        return Metric(self.measure, lower_is_better=not right, of_loss=not right)

    @property
    def ceiling(self) -> float:
        return 10 + 2 * math.log(self.n_classes)

    def check(self, shape: Shape, stem: object) -> None:
        """Raises SpecError for another stem; windows are whole sequences, whatever the shape."""
        if stem != self.stem:
            raise SpecError(f"stem: {self.name} needs {self.stem}")

    def to(self, device: torch.device) -> Labels:
        return replace(self, inputs=self.inputs.to(device), classes=self.classes.to(device))

    def batches(self, split: Split, seed: int, step: int, shape: Shape) -> Iterator[Batch]:
        low, high = self._ends(split)
        while True:
            rows = torch.from_numpy(low + starts(high - low, seed, step, shape.batch_size))
            rows = rows.to(self.inputs.device)
            yield Batch(self.inputs[rows], self.classes[rows])
            step += 1

    def loss(self, out: ModelOutput, batch: Batch) -> Tensor:
        """Nats per sequence, and the auxiliary losses."""
        return F.cross_entropy(self._answers(out.logits), batch.targets) + sum(out.aux.values())

    def score(self, model: Forward, split: Split, shape: Shape) -> Scores:
        """The metric of every sequence."""
        low, high = self._ends(split)
        chosen = (low + spread(high - low, shape.score_windows)).to(self.inputs.device)
        return scored(model, self.inputs[chosen], self.classes[chosen], shape, self._measured)

    def has(self, split: Split) -> bool:
        low, high = self._ends(split)
        return high > low

    def baselines(self) -> dict[str, float]:
        """Scores on valid: the most frequent class, and logistic regression on bags (counts of ids,
        or means of channels)."""
        device = torch.device("cpu")
        bags = self.to(device)._bags()
        low, high = self._ends("valid")
        known, truth = self.classes[: self._ends("train")[1]].cpu(), self.classes[low:high].cpu()
        shares = torch.bincount(known, minlength=self.n_classes).double() + 0.5
        majority = shares.log().expand(len(truth), -1)
        weights = _regression(bags[: len(known)], known, self.n_classes)
        guesses = {"majority": majority, "logistic on bags": bags[low:high] @ weights}
        return {k: self._of(v.log_softmax(-1), truth).mean().item() for k, v in guesses.items()}

    def facts(self) -> dict[str, Any]:
        sizes = {f"n_{s}": self._ends(s)[1] - self._ends(s)[0] for s in ("train", "valid", "test")}
        return {"kind": "labels", "classes": self.n_classes, "shape": [*self.inputs.shape], **sizes}

    def _ends(self, split: Split) -> tuple[int, int]:
        n = len(self.classes)
        last = n - round(n * self.test_fraction)
        middle = last - max(1, round(n * self.valid_fraction))
        return {"train": (0, middle), "valid": (middle, last), "test": (last, n)}[split]

    def _answers(self, logits: Tensor) -> Tensor:
        return logits[:, -1, : self.n_classes].float()

    def _measured(self, logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        values = self._of(self._answers(logits).log_softmax(-1), classes)
        return values, torch.ones_like(values)

    def _of(self, log_p: Tensor, classes: Tensor) -> Tensor:
        if self.measure == "accuracy":
            return (log_p.argmax(-1) == classes).double()
        return -log_p.double().gather(1, classes[:, None])[:, 0]

    def _bags(self) -> Tensor:
        if self.inputs.ndim == 3:
            counts = self.inputs.double().mean(1)
        else:
            counts = F.one_hot(self.inputs, int(self.inputs.max()) + 1).double().mean(1)
        return torch.cat([counts, torch.ones(len(counts), 1, dtype=torch.float64)], 1)


def _regression(bags: Tensor, classes: Tensor, n_classes: int) -> Tensor:
    """(features, classes) weights of a lightly decayed logistic regression."""
    weights = torch.zeros(bags.shape[1], n_classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=REGRESSION_STEPS)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(bags @ weights, classes) + 1e-4 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    return weights.detach()
