"""Signals: frames in one by one, frames out, and forecasts that read themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kizzasi.errors import GenerateError, ShapeError, SpecError
from kizzasi.models.decoding.reading import as_mask, check_feeds_on, evaluating, read
from kizzasi.models.decoding.sampling import integer, require
from kizzasi.models.stems import Signal

if TYPE_CHECKING:
    from kizzasi.models.model import SequenceModel
    from kizzasi.models.state import ModelState


def forecast(
    model: SequenceModel,
    frames: Tensor,
    n: int,
    *,
    state: ModelState | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Continue signals: each predicted frame is read as the next one.

    Args:
        model: a causal model with a signal stem whose frames out are those in, trained to predict
            the next frame: `model(x[:, :-1]).loss(x[:, 1:])`. Modes of its modules stay.
        frames: (b, t, n_in) or (t, n_in), t >= 1, in the model's dtype.
        n: how many frames to add.
        state: what the frames continue; None starts afresh.
        mask: (b, t), False for left padding of signals of unequal length.

    Returns:
        (b, n, n_out), or (n, n_out): the frames after the given ones, which are left out.

    Raises:
        GenerateError: the model has no such stem, n is out of range, or a frame is NaN or infinite.
        ShapeError: frames or mask do not fit.
        SpecError: the model is not causal.
    """
    check_feeds_on(model, "forecast")
    check_feedback(model)
    require(integer(n) and n >= 1, "n", f"an integer from 1 on, not {n!r}")
    rows, flat = as_frames(frames)
    mask = None if mask is None else as_mask(mask, rows)
    with evaluating(model):
        first, after = read(model, rows, mask, state)
        new = roll(model, first, after, n)
    return new[0] if flat else new


def roll(model: SequenceModel, frame: Tensor, state: ModelState, n: int) -> Tensor:
    """(b, n, n_out) frames: the first is given and not yet read, each later one is predicted."""
    frames = [frame]
    while len(frames) < n:
        frame, state, *_ = model.step(frame, state)
        frames.append(frame)
    made = torch.stack(frames, 1)
    broken = ~made.isfinite().flatten(1).all(1)
    if broken.any():
        raise GenerateError(
            f"row {int(broken.nonzero()[0])}: a predicted frame is NaN or infinite; look for such "
            "values in the frames and the weights; where they grow step by step, the model does "
            "not hold its own predictions: forecast fewer frames, or train it further"
        )
    return made


def check_feedback(model: SequenceModel) -> Signal:
    """The model's stem; raises GenerateError unless its frames out can be read as frames in."""
    stem = model.spec.stem
    if not isinstance(stem, Signal):
        raise GenerateError(
            f"forecast: the model reads tokens ({stem}), not frames; model.generate continues them"
        )
    if stem.n_in != stem.n_out:
        raise GenerateError(
            f"forecast: a predicted frame has n_out = {stem.n_out} channels and the model reads "
            f"n_in = {stem.n_in}; feed frames of your own with SignalPredictor.step, or build a "
            "model with n_out = n_in"
        )
    return stem


def as_frames(frames: Tensor) -> tuple[Tensor, bool]:
    """(b, t, n_in), and whether one signal (t, n_in) was given."""
    if not isinstance(frames, Tensor):
        kind = type(frames).__name__
        raise ShapeError(f"expected frames (b, t, n_in), got {kind}; try torch.as_tensor(frames)")
    return (frames[None], True) if frames.ndim == 2 else (frames, False)


class SignalPredictor:
    """Feeds a model frame by frame and keeps its state in between. Modes of its modules stay.

    Args:
        model: a `SequenceModel` with a `Signal` stem.
        batch_size: how many signals run side by side.

    Attributes:
        state: after every frame so far; a value, so that keeping it is a way back.

    Raises:
        SpecError: the model's stem is not a signal stem.
    """

    def __init__(self, model: SequenceModel, batch_size: int = 1) -> None:
        if not isinstance(model.spec.stem, Signal):
            raise SpecError(f"stem: a signal predictor needs a signal stem, not {model.spec.stem}")
        self.model, self.batch_size = model, batch_size
        self.reset()

    def step(self, frame: Tensor) -> Tensor:
        """(b, n_in) to (b, n_out), or (n_in,) to (n_out,) for a single signal. No gradients."""
        with evaluating(self.model):
            out = self.model.step(frame[None] if frame.ndim == 1 else frame, self.state)
        self.state, self._last = out.state, out.logits.clone()
        return out.logits[0] if frame.ndim == 1 else out.logits

    def read(self, frames: Tensor) -> Tensor:
        """Many frames at once, (b, t, n_in) to (b, t, n_out) or (t, n_in) to (t, n_out): as `step`
        on one after another, in parallel."""
        rows, flat = as_frames(frames)
        with evaluating(self.model):
            out = self.model(rows, self.state)
        self.state, self._last = out.state, out.logits[:, -1].clone()
        return out.logits[0] if flat else out.logits

    def forecast(self, n: int) -> Tensor:
        """The next n frames, (b, n, n_out), by reading each prediction as the next frame. The
        predictor itself stays where it is.

        Raises GenerateError as the function `forecast` does, and before the first frame.
        """
        check_feedback(self.model)
        require(integer(n) and n >= 1, "n", f"an integer from 1 on, not {n!r}")
        if self._last is None:
            raise GenerateError("forecast: no frame was read yet; call step or read first")
        with evaluating(self.model):
            return roll(self.model, self._last, self.state, n)

    def reset(self) -> None:
        """Forget every frame seen so far."""
        self.state = self.model.init_state(self.batch_size)
        self._last: Tensor | None = None

    @property
    def context_window(self) -> float:
        """How many frames up to and including the present one an output can depend on; inf for
        recurrent and full-attention models."""
        return self.model.spec.context_window
