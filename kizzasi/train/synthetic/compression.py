"""Compression: all tokens of a sequence, read from the features of its last position alone.

Glossary
    end     id vocab_size: the position whose features hold what was read
    v, t    vocab_size, and how many tokens are read
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.errors import SpecError
from kizzasi.models import ModelOutput, Tokens
from kizzasi.train.seeds import derive_seed
from kizzasi.train.synthetic.examples import seeded
from kizzasi.train.task import Batch, Forward, Metric, Scores, Shape, Split, scored, spread


@dataclass(frozen=True)
class Compression:
    """Random tokens, then `end`: which tokens were they? A task, not a generator of examples.

        inputs   c a b a d end
        answers            (c a b a d), t times v logits of the last position

    The stem's own head reads all t answers from one vector of d_model numbers, so its vocabulary is
    v * t, of which the inputs use the first v + 1.

    Args:
        vocab_size: v, at least 2.
        n_tokens: t, at least 2.
        n_held_out: examples of valid, and as many others of test.
        device: where batches go.

    Source: Poli et al. 2024 (MAD), arXiv:2403.17844, section 3 (vocab 16, 32 tokens).
    Differs: a linear map reads the answers, where MAD trains a decoder of two layers beside.
    """

    vocab_size: int = 16
    n_tokens: int = 32
    n_held_out: int = 256
    device: str = "cpu"

    metric: Metric = field(
        default=Metric("accuracy", lower_is_better=False, of_loss=False), init=False
    )
    ceiling: float = field(default=math.inf, init=False)
    curve_scale: float = field(default=1.0, init=False)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_tokens"):
            if getattr(self, name) < 2:
                raise SpecError(f"Compression: {name}={getattr(self, name)} must be at least 2")

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def stem(self) -> Tokens:
        return Tokens(self.vocab_size * self.n_tokens)

    @property
    def digest(self) -> str:
        facts = f"{self.name} {self.vocab_size} {self.n_tokens} {self.n_held_out}"
        return hashlib.sha256(facts.encode()).hexdigest()

    @property
    def seq_len(self) -> int:
        """Positions of an example, `end` included."""
        return self.n_tokens + 1

    @property
    def chance(self) -> float:
        return 1 / self.vocab_size

    def check(self, shape: Shape, stem: object) -> None:
        """Raises SpecError unless windows are the examples and the stem has all the answers."""
        if shape.seq_len != self.seq_len:
            raise SpecError(
                f"seq_len: {shape.seq_len}, but examples of {self.name} have {self.seq_len}"
            )
        if stem != self.stem:
            raise SpecError(f"stem: {self.name} needs {self.stem}")

    def to(self, device: torch.device) -> Compression:
        return replace(self, device=str(device))

    def batches(self, split: Split, seed: int, step: int, shape: Shape) -> Iterator[Batch]:
        while True:
            yield self._drawn(shape.batch_size, derive_seed(seed, split, step))
            step += 1

    def loss(self, out: ModelOutput, batch: Batch) -> Tensor:
        """Nats per answer, and the auxiliary losses."""
        answers = self._answers(out.logits).flatten(0, 1)
        return F.cross_entropy(answers, batch.targets.flatten()) + sum(out.aux.values())

    def score(self, model: Forward, split: Split, shape: Shape) -> Scores:
        """The share of right answers of every example."""
        held_out = self._drawn(self.n_held_out, derive_seed(0, "held out", split))
        chosen = spread(self.n_held_out, shape.score_windows)
        return scored(model, held_out.inputs[chosen], held_out.targets[chosen], shape, self._right)

    def has(self, split: Split) -> bool:
        return True

    def baselines(self) -> dict[str, float]:
        return {"chance": self.chance}

    def facts(self) -> dict[str, Any]:
        return {"n_held_out": self.n_held_out}

    def _answers(self, logits: Tensor) -> Tensor:
        """(b, t, v) from the logits (b, t + 1, v t) of all positions."""
        return logits[:, -1].float().view(len(logits), self.n_tokens, self.vocab_size)

    def _right(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        share = (self._answers(logits).argmax(-1) == targets).double().mean(1)
        return share, torch.ones_like(share)

    def _drawn(self, n: int, seed: int) -> Batch:
        shape = (n, self.n_tokens)
        tokens = torch.randint(self.vocab_size, shape, generator=seeded(n, seed))
        inputs = F.pad(tokens, (0, 1), value=self.vocab_size)
        return Batch(inputs.to(self.device), tokens.to(self.device))
