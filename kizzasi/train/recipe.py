"""`Recipe`: how a model is trained, apart from the data, the model and the budget.

Glossary
    horizon   tokens at which the learning-rate schedule ends; a rung stops earlier on that curve
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from kizzasi.errors import SpecError
from kizzasi.strict import unknown_name

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Recipe:
    """How to train; everything but the data, the model and the budget.

    Args:
        horizon: tokens at which the schedule ends.
        seq_len: length of a training window in tokens.
        batch_size: windows per step.
        lr: peak learning rate, passed to `parameter_groups`.
        warmup: share of the horizon spent on the linear warm-up; then a cosine down to min_lr * lr.
        min_lr: learning rate at the horizon, as a share of the peak.
        weight_decay: for parameters that decay.
        clip: largest gradient norm.
        optimizer: "adamw", or "muon": matrices made orthogonal, AdamW for all other parameters.
        matrix_lr: peak learning rate of Muon's matrices; None means lr.
        score_windows: held-out windows that a score uses, evenly spread; None means all of them.
        precision: of the forward pass: "fp32", "bf16", "fp16" with a loss scaler, or "auto", which
            is bf16 on CUDA and fp32 elsewhere. Weights and optimiser stay float32.
        compile: let torch.compile make the training step's forward pass; the first step waits.
        accumulate: parts of which each step's windows are taken one after the other; a divisor of
            batch_size. Saves memory.
        fused: one kernel for AdamW's whole step.
    """

    horizon: int
    seq_len: int = 256
    batch_size: int = 16
    lr: float = 3e-3
    warmup: float = 0.05
    min_lr: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0
    score_windows: int | None = None
    optimizer: Literal["adamw", "muon"] = "adamw"
    matrix_lr: float | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False
    accumulate: int = 1
    fused: bool = False

    @property
    def tokens_per_step(self) -> int:
        return self.seq_len * self.batch_size

    def steps(self, tokens: int) -> int:
        """How many whole steps a budget buys; at least 1."""
        return max(1, tokens // self.tokens_per_step)

    def factor(self, step: int) -> float:
        """Learning rate of a step (from 0), as a share of its peak."""
        last = self.steps(self.horizon)
        warmup = max(1, round(self.warmup * last))
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, last - warmup))
        return self.min_lr + (1 - self.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))

    def check(self) -> None:
        """Raises SpecError naming the value and the rule."""
        for name in ("horizon", "seq_len", "batch_size", "lr", "clip"):
            value = getattr(self, name)
            if not value > 0 or (value == math.inf and name != "clip"):
                raise SpecError(f"{name}: {value} must be above 0, and finite")
        if self.precision not in PRECISIONS:
            raise SpecError(
                f"precision: {self.precision!r} {unknown_name(self.precision, PRECISIONS)}"
            )
        if self.accumulate < 1 or self.batch_size % self.accumulate:
            raise SpecError(
                f"accumulate: {self.accumulate} does not divide the {self.batch_size} windows of a "
                "step; give a divisor"
            )
        if self.fused and self.optimizer != "adamw":
            raise SpecError("fused: muon has no fused form; leave it out, or take adamw")
        if not (0 <= self.warmup <= 1 and 0 <= self.min_lr <= 1 and self.weight_decay >= 0):
            raise SpecError("warmup and min_lr must lie in [0, 1], weight_decay at 0 or above")
