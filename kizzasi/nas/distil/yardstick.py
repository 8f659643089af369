"""How far a changed model is from the one it came from, on windows that nobody trains on.

    KL(p || q) = sum_i p_i (log p_i - log q_i),    p of the teacher, q of the changed model

in nats, a mean over all tokens of all windows. Beside it stands the cross entropy of the text,
whose exponential is the perplexity. The teacher's log probabilities are held: n t v numbers of 4
bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models import SequenceModel
from kizzasi.train.task import Batch

ROWS = 1  # windows whose logits are made together


class Distance(NamedTuple):
    """kl: nats per token from the teacher. nats: cross entropy of the text, per token."""

    kl: float
    nats: float


class Yardstick:
    """The teacher on held-out windows.

    Args:
        teacher: in evaluation mode.
        held_out: inputs and targets (n, t) on its device.

    Attributes:
        nats: the teacher's cross entropy.
    """

    def __init__(self, teacher: SequenceModel, held_out: Batch) -> None:
        self.held_out = held_out
        self.log_p = list(_log_probabilities(lambda rows: teacher(rows).logits, held_out.inputs))
        self.nats = self._mean(self.log_p).nats

    def of(self, model: SequenceModel) -> Distance:
        """Of a whole model, in evaluation mode."""
        return self.measure(lambda rows: model(rows).logits, self.held_out.inputs)

    def measure(self, logits: Callable[[Tensor], Tensor], given: Tensor) -> Distance:
        """Of any function from rows of `given`, a window each, to logits (b, t, v)."""
        return self._mean(_log_probabilities(logits, given))

    @torch.no_grad()
    def _mean(self, log_q: Iterator[Tensor] | list[Tensor]) -> Distance:
        kl = nats = 0.0
        targets = self.held_out.targets.split(ROWS)
        for p, q, target in zip(self.log_p, log_q, targets, strict=True):
            kl += divergence(p, q).double().sum().item()
            nats += F.nll_loss(q.flatten(0, 1), target.flatten(), reduction="sum").item()
        n = self.held_out.targets.numel()
        return Distance(max(0.0, kl / n), nats / n)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of the last dimension, in nats; log_p, log_q (..., v)."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


@torch.no_grad()
def _log_probabilities(logits: Callable[[Tensor], Tensor], given: Tensor) -> Iterator[Tensor]:
    for rows in given.split(ROWS):
        yield logits(rows).float().log_softmax(-1)
