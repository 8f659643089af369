"""One mixer learns, by itself, to put out what the mixer in whose place it will stand puts out.

    loss = |student(x) - teacher(x)|^2 / |teacher(x)|^2        over the tokens of a batch

x is what the teacher's layer reads in the trained model. Nothing else of the model runs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kizzasi.errors import SpecError
from kizzasi.models import Mixer, parameter_groups

EXACT = 1e-9  # relative error of a mixer that needs no training: rounding, squared


@dataclass(frozen=True)
class Local:
    """How a mixer is trained in its place.

    Args:
        steps: of the optimiser; 0 leaves a mixer as it began.
        batch_size: windows of a step.
        lr: peak learning rate; a tenth of the steps rise to it, and a cosine falls to its tenth.
        clip: largest gradient norm.
    """

    steps: int = 100
    batch_size: int = 4
    lr: float = 1e-3
    clip: float = 1.0

    def check(self) -> None:
        """Raises SpecError naming the value."""
        for name, least in (("steps", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise SpecError(f"{name}: {getattr(self, name)} must be at least {least}")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise SpecError(f"{name}: {getattr(self, name)} must be above 0")

    def rate(self, step: int) -> float:
        """Learning rate of a step, from 0."""
        rise = max(1, self.steps // 10)
        if step < rise:
            return self.lr * (step + 1) / rise
        done = (step - rise) / max(1, self.steps - rise)
        return self.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def error_of(mixer: Mixer, x: Tensor, y: Tensor, rows: int = 4) -> float:
    """|mixer(x) - y|^2 / |y|^2 over all windows x, y (n, t, d)."""
    wrong = sum(
        (mixer(a.float()).y - b).double().square().sum().item()
        for a, b in zip(x.split(rows), y.split(rows), strict=True)
    )
    return wrong / max(y.double().square().sum().item(), 1e-300)


def fit(
    mixer: Mixer,
    x: Tensor,
    y: Tensor,
    held_out: tuple[Tensor, Tensor],
    how: Local,
    on_step: Callable[[], object] | None = None,
) -> tuple[float, float]:
    """Train a mixer; it keeps what it began with, if that was better.

    Args:
        mixer: in float32.
        x, y: (n, t, d) what the teacher's mixer reads and puts out, taken in order.
        held_out: the same of other windows, which decide.
        how: steps, rate and so on.
        on_step: called after every step.

    Returns:
        The relative error on `held_out` before and after.
    """
    before = error_of(mixer, *held_out)
    if how.steps == 0 or before < EXACT:
        return before, before
    began = copy.deepcopy(mixer.state_dict())
    optimizer = torch.optim.AdamW(parameter_groups(mixer, how.lr), betas=(0.9, 0.95))
    scales = [group["lr"] / how.lr for group in optimizer.param_groups]
    mixer.train()
    for step in range(how.steps):
        rows = torch.arange(step * how.batch_size, (step + 1) * how.batch_size) % len(x)
        given, wanted = (part[rows.to(part.device)].float() for part in (x, y))
        loss = (mixer(given).y - wanted).square().sum() / wanted.square().sum().clamp(min=1e-30)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(mixer.parameters(), how.clip)
        for group, scale in zip(optimizer.param_groups, scales, strict=True):
            group["lr"] = scale * how.rate(step)
        optimizer.step()
        if on_step is not None:
            on_step()
    mixer.eval()
    after = error_of(mixer, *held_out)
    if not after < before:
        mixer.load_state_dict(began)
        return before, before
    return before, after
