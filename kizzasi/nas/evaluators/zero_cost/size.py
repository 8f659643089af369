"""Trivia: what every other proxy has to beat."""

from __future__ import annotations

from kizzasi.models import SequenceModel
from kizzasi.nas.evaluators.zero_cost.parts import Batch


def params(model: SequenceModel, batch: Batch) -> float:
    """Count the parameters, tied ones once; the batch is not looked at."""
    return float(sum(parameter.numel() for parameter in model.parameters()))


def flops(model: SequenceModel, batch: Batch) -> float:
    """Count the operations of one forward pass over the batch; see `Cost`."""
    n_rows, seq_len = batch[0].shape[:2]
    return float(model.spec.cost(seq_len, n_rows).flops)
