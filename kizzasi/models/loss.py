"""Mean losses over the positions that count.

Symbols: b batch, t time, v vocab_size or channels.

What does not count is left out by selection, never by a product with zero: there logits, frames and
targets may be NaN or infinite, and neither the loss nor a gradient sees them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.errors import ShapeError
from kizzasi.models.ops.devices import answers
from kizzasi.models.ops.precision import full_precision

IGNORED = -100


def mean_loss(
    logits: Tensor, targets: Tensor, mask: Tensor | None = None, ignore_index: int = IGNORED
) -> Tensor:
    """Cross entropy in nats for integer targets, squared error for frames.

        sum(w * loss) / sum(w) over the positions that count; 0 if none does

    Args:
        logits: (..., v), computed with in at least float32.
        targets: ids (...), or frames like logits.
        mask: (...) bool, True for the positions that count, or numbers >= 0, their weights w.
        ignore_index: the id of positions that do not count, as in `F.cross_entropy`.

    Raises:
        ShapeError: targets or mask do not fit, or an id is outside the vocabulary.
    """
    frames = targets.is_floating_point()
    wanted = logits.shape if frames else logits.shape[:-1]
    if targets.shape != wanted or targets.dtype == torch.bool or targets.is_complex():
        raise ShapeError(
            f"targets: expected {'frames' if frames else 'ids'} {tuple(wanted)}, got "
            f"{tuple(targets.shape)} {targets.dtype}; the predictions are {tuple(logits.shape)}"
        )
    if mask is not None:
        mask = _spread(mask, logits.shape[:-1])
    counts = None if mask is None else mask != 0
    logits = full_precision(logits)
    if frames:
        miss = logits - targets
        if counts is not None:
            miss = torch.where(counts[..., None], miss, 0.0)
        each = miss.square().mean(-1)
    else:
        each, counts = _cross_entropy(logits, targets.long(), counts, ignore_index)
    if counts is None:
        return each.mean()
    weight = counts if mask is None or mask.dtype == torch.bool else counts * mask
    weight = weight.to(each.dtype)
    total = weight.sum()
    return (each * weight).sum() / torch.where(total > 0, total, 1.0)


def _cross_entropy(
    logits: Tensor, targets: Tensor, counts: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor | None]:
    """The loss of each position, 0 where it does not count, and which do (None: all)."""
    known: Tensor | None = targets != ignore_index
    # Whether a label is ignored cannot be asked of a compiled graph, and costs a wait on a GPU.
    if answers(targets):
        known = _check_ids(targets, logits.shape[-1], ignore_index)
    counts = known if counts is None else counts if known is None else counts & known
    if counts is not None:  # a row of NaN would have a gradient of NaN even where it is ignored
        logits = torch.where(counts[..., None], logits, 0.0)
        targets = torch.where(counts, targets, IGNORED)
    each = F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), reduction="none", ignore_index=IGNORED
    )
    return each.view(targets.shape), counts


def _check_ids(ids: Tensor, vocab_size: int, ignore_index: int) -> Tensor | None:
    """Which ids do not say `ignore_index`; None if none says it."""
    low, high = (int(bound) for bound in ids.aminmax())
    if 0 <= low <= high < vocab_size and not low <= ignore_index <= high:
        return None
    known = ids != ignore_index
    wrong = ids[known & ((ids < 0) | (ids >= vocab_size))]
    if len(wrong):
        raise ShapeError(
            f"targets: id {int(wrong[0])} is outside the vocabulary of {vocab_size}; mark "
            f"positions that do not count with {ignore_index}"
        )
    return known


def _spread(mask: Tensor, shape: torch.Size) -> Tensor:
    """The mask with a value for every position; a time or row of 1 stands for all of them."""
    if mask.ndim == len(shape) and all(m in (1, n) for m, n in zip(mask.shape, shape, strict=True)):
        return mask.expand(shape)
    raise ShapeError(
        f"mask: expected {tuple(shape)}, one value a position, got {tuple(mask.shape)}"
    )
