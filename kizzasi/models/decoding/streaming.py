"""The streaming face of a signal model: one frame in, the next frame out."""

from __future__ import annotations

import torch
from torch import Tensor

from kizzasi.errors import SpecError
from kizzasi.models.model import SequenceModel
from kizzasi.models.stems import Signal


class SignalPredictor:
    """Feeds a model frame by frame and keeps its state in between.

    Args:
        model: a `SequenceModel` with a `Signal` stem.
        batch_size: how many signals run side by side.

    Raises:
        SpecError: the model's stem is not a signal stem.
    """

    def __init__(self, model: SequenceModel, batch_size: int = 1) -> None:
        if not isinstance(model.spec.stem, Signal):
            raise SpecError(f"stem: a signal predictor needs a signal stem, not {model.spec.stem}")
        self.model, self.batch_size = model.eval(), batch_size
        self.reset()

    @torch.no_grad()
    def step(self, frame: Tensor) -> Tensor:
        """(b, n_in) to (b, n_out), or (n_in,) to (n_out,) for a single signal. No gradients."""
        out = self.model.step(frame[None] if frame.ndim == 1 else frame, self.state)
        self.state = out.state
        return out.logits[0] if frame.ndim == 1 else out.logits

    def reset(self) -> None:
        """Forget every frame seen so far."""
        self.state = self.model.init_state(self.batch_size)

    @property
    def context_window(self) -> float:
        """How many frames up to and including the present one an output can depend on; inf for
        recurrent and full-attention models."""
        return self.model.spec.context_window
