"""What is seen of a model on held-out tokens, beside its score: loss, calibration, router load.

    ECE = sum over bins of  share of the tokens in it  *  |mean confidence - accuracy|

A token's confidence is the probability of the likeliest next one; bins are equally wide.
Source: Guo et al. 2017, arXiv:1706.04599, section 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kizzasi.models.moe_tools import watch_routing
from kizzasi.models.norm import WideLinear
from kizzasi.train import Training
from kizzasi.train.task import Shape

BATCHES, WINDOWS, SEED, BINS = 4, 8, 0, 15
GATE = "gate"  # the name of what chooses among mixers


@torch.no_grad()
def observed(training: Training) -> dict[str, Any]:
    """Held-out loss in nats, accuracy, confidence, ECE, and the load of routers, by name.

    Always on the same windows. For tasks of next tokens.
    """
    model = training.model.eval()
    shape = Shape(training.shape.seq_len, WINDOWS)
    batches = islice(training.task.batches("valid", SEED, 0, shape), BATCHES)
    losses, sure, right = [], [], []
    with _loads(model) as loads:
        for batch in batches:
            logits = model(batch.inputs).logits.float().flatten(0, -2)
            targets = batch.targets.flatten()
            losses.append(F.cross_entropy(logits, targets, reduction="none"))
            best, choice = logits.softmax(-1).max(-1)
            sure.append(best)
            right.append((choice == targets).float())
    confidence, correct = torch.cat(sure), torch.cat(right)
    return {
        "loss": float(torch.cat(losses).double().mean()),
        "accuracy": float(correct.mean()),
        "avg_confidence": float(confidence.mean()),
        "ece": calibration_error(confidence, correct),
        "router": loads,
    }


def calibration_error(confidence: Tensor, correct: Tensor) -> float:
    """The ECE of (n,) confidences in [0, 1] and (n,) hits, 1 or 0."""
    place = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64, device=confidence.device)
    gaps.index_add_(0, place, (confidence - correct).double())
    return float(gaps.abs().sum() / len(confidence))


@contextmanager
def _loads(model: nn.Module) -> Iterator[dict[str, list[float]]]:
    """Shares of the choices of every router, by its path; filled when the block ends.

    Of mixers, the share of tokens for which each is the likeliest; of experts, of the jobs done.
    """
    found: dict[str, list[float]] = {}
    counts: dict[str, Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, WideLinear) and name.rpartition(".")[2] == GATE:

            def count(gate: nn.Module, _: Any, logits: Tensor, name: str = name) -> None:
                n = logits.shape[-1]
                chosen = torch.bincount(logits.flatten(0, -2).argmax(-1), minlength=n)
                counts[name] = counts.get(name, 0) + chosen

            hooks.append(module.register_forward_hook(count))
    mixtures = any(part.kind == "moe" for _, part in model.spec.parts())  # pyright: ignore
    try:
        if mixtures:
            with watch_routing(model) as usage:
                yield found
            counts |= {name: layer.counts for name, layer in usage.layers().items()}
        else:
            yield found
    finally:
        for hook in hooks:
            hook.remove()
    for name, chosen in counts.items():
        found[name] = (chosen / chosen.sum().clamp(min=1)).tolist()
