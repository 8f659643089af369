"""Prompts: what a caller may give, and reading rows of unequal length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kizzasi.errors import GenerateError, SpecError
from kizzasi.models.heads import Own
from kizzasi.models.state import join_states
from kizzasi.models.stems import Tokens

if TYPE_CHECKING:
    from kizzasi.models.model import SequenceModel
    from kizzasi.models.state import ModelState


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients; afterwards every module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        with torch.no_grad():  # not inference_mode: states may be trained on, FSDP may be lazy
            yield
    finally:
        for module, training in modes:
            module.training = training


def check_model(model: SequenceModel, wish: str) -> None:
    """Raise SpecError unless the model is causal and reads its own head, GenerateError unless
    its inputs are tokens."""
    check_feeds_on(model, wish)
    vocabulary(model)


def check_feeds_on(model: SequenceModel, wish: str) -> None:
    """Raise SpecError unless the model is causal and its first outputs are its stem's own."""
    model.require_causal(wish)
    heads = model.spec.heads
    if heads and not isinstance(heads[0], Own):
        raise SpecError(f"heads[0]: {wish} needs the stem's own head there; put Own() first")


def vocabulary(model: SequenceModel) -> int:
    """How many ids the model knows; raises GenerateError if it reads no ids."""
    stem = model.spec.stem
    if not isinstance(stem, Tokens):
        raise GenerateError(
            f"the model reads frames ({stem}), not tokens; model.forecast(frames, n) continues "
            "signals, and SignalPredictor streams them"
        )
    return stem.vocab_size


def as_rows(prompt: Tensor | Sequence[Any]) -> tuple[Tensor, bool]:
    """Ids (t,) or (b, t), a tensor of any integers or a list, as (b, t) int64.

    Returns:
        The rows, and whether the prompt was flat.

    Raises:
        GenerateError: text, or lists that make no rectangle of ids.
    """
    if isinstance(prompt, (str, bytes)):
        raise GenerateError(
            f"prompt: {type(prompt).__name__}, and a model reads ids; encode it first, with the "
            "checkpoint's tokenizer, or for a model of bytes as list(text.encode())"
        )
    if not isinstance(prompt, Tensor):
        prompt = _from_list(prompt)
    if not (prompt.is_floating_point() or prompt.is_complex() or prompt.dtype == torch.bool):
        prompt = prompt.long()
    return (prompt[None], True) if prompt.ndim == 1 else (prompt, False)


def _from_list(prompt: Sequence[Any]) -> Tensor:
    try:
        rows = torch.as_tensor(prompt)
    except (TypeError, ValueError, RuntimeError) as error:
        raise GenerateError(
            f"prompt: no rectangle of ids ({error}); pad rows of unequal length on the left and "
            "say where in mask"
        ) from error
    if rows.numel() == 0:
        raise GenerateError("prompt: empty; begin it with at least one token")
    return rows


def as_mask(mask: Tensor | Sequence[Any], rows: Tensor) -> Tensor:
    """(b, t) bool, like the rows; raises GenerateError unless it leaves a token in every row."""
    mask = torch.as_tensor(mask, device=rows.device).bool()
    mask = mask[None] if mask.ndim == 1 else mask
    if mask.shape != rows.shape[:2]:
        shapes = f"{tuple(mask.shape)} for a prompt {tuple(rows.shape)}"
        raise GenerateError(f"mask: {shapes}; give one value per token, False at padding")
    empty = ~mask.any(1)
    if empty.any():
        raise GenerateError(
            f"mask: row {int(empty.nonzero()[0])} is all padding, so there is nothing to "
            "continue; leave the row out, or begin it with a token"
        )
    return mask


def read(
    model: SequenceModel, rows: Tensor, mask: Tensor | None, state: ModelState | None
) -> tuple[Tensor, ModelState]:
    """Read prompts after a state. Returns logits (b, v) after the last token, and the state."""
    out = model(rows, state, mask=mask, last_only=True)
    return out.logits[:, -1], out.state


def read_each(
    model: SequenceModel, pieces: Sequence[Tensor], state: ModelState
) -> tuple[Tensor, ModelState]:
    """Rows go on by pieces (t_i,) of unequal length t_i >= 1, those of one length at once.

    Returns:
        (b, v) logits after every row's last token, and the state of all rows.
    """
    lengths = [len(piece) for piece in pieces]
    place = pieces[0].device
    order, logits, states = [], [], []
    for length in sorted(set(lengths)):
        rows = [i for i, n in enumerate(lengths) if n == length]
        before = state.gather(torch.tensor(rows, device=place))
        out = model(torch.stack([pieces[i] for i in rows]), before, last_only=True)
        order += rows
        logits.append(out.logits[:, -1])
        states.append(out.state)
    back = torch.tensor(order, device=place).argsort()
    return torch.cat(logits)[back], join_states(states).gather(back)
