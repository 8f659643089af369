"""Mean losses over the positions that count.

Symbols: b batch, t time, v vocab_size or channels.

What does not count is left out by selection, never by a product with zero: there logits, frames and
targets may be NaN or infinite, and neither the loss nor a gradient sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kizzasi.errors import ShapeError
from kizzasi.models.ops.devices import answers
from kizzasi.models.ops.precision import full_precision

IGNORED = -100
CHUNK_ELEMENTS = 2**24


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
    _check_shapes(logits.shape, targets, mask)
    each, weight = _each(logits, targets, mask, ignore_index)
    if weight is None:
        return each.mean()
    total = weight.sum()
    return (each * weight).sum() / torch.where(total > 0, total, 1.0)


def mean_loss_in_chunks(
    head: Callable[[Tensor], Tensor],
    width: int,
    x: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    ignore_index: int = IGNORED,
    chunk: int | None = None,
) -> Tensor:
    """`mean_loss(head(x), targets, mask)` with the logits of some tokens at a time.

    Backward computes them again: about a third more work in the head, and no logits in memory.

    Args:
        head: features (..., d) to logits (..., v); hooks, adapters and sharding act in it.
        width: v.
        x: (b, t, d). Where nothing counts it may hold anything.
        chunk: tokens at a time; None means so many that their logits are CHUNK_ELEMENTS, which is
            all of them where the vocabulary is small.
    """
    v = head(x[:1, :1]).shape[-1] if chunk is None else 1
    step = max(1, CHUNK_ELEMENTS // v) if chunk is None else chunk
    _check_shapes(
        (*x.shape[:-1], targets.shape[-1] if targets.is_floating_point() else 1), targets, mask
    )
    n = x.shape[:-1].numel()
    if mask is None:
        mask = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    mask = _spread(mask, x.shape[:-1])
    counts = mask != 0
    if not targets.is_floating_point():
        counts = counts & (targets != ignore_index)
    x = torch.where(counts.unsqueeze(-1), x, 0.0)  # or NaN would reach the head's gradient

    def some(x: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        each, weight = _each(head(x), targets, mask, ignore_index)
        assert weight is not None
        return (each * weight).sum(), weight.sum()

    flat = x.flatten(0, -2), targets.flatten(0, x.ndim - 2), mask.flatten()
    if step >= n:
        total, weight = some(*flat)
    else:
        keep = partial(checkpoint, use_reentrant=False) if torch.is_grad_enabled() else None
        run = some if keep is None else partial(keep, some)
        parts = [run(*piece) for piece in zip(*(f.split(step) for f in flat), strict=True)]
        total, weight = (torch.stack(column).sum() for column in zip(*parts, strict=True))
    return total / torch.where(weight > 0, weight, 1.0)


def _check_shapes(shape: Sequence[int], targets: Tensor, mask: Tensor | None) -> None:
    """shape: (..., v) of the predictions."""
    frames = targets.is_floating_point()
    wanted = tuple(shape if frames else shape[:-1])
    if tuple(targets.shape) != wanted or targets.dtype == torch.bool or targets.is_complex():
        raise ShapeError(
            f"targets: expected {'frames' if frames else 'ids'} {wanted}, got "
            f"{tuple(targets.shape)} {targets.dtype}; the predictions are {tuple(shape)}"
        )
    if mask is not None:
        _spread(mask, torch.Size(shape[:-1]))


def _each(
    logits: Tensor, targets: Tensor, mask: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor | None]:
    """The loss of every position, and its weight in the mean; None if all weigh the same."""
    mask = None if mask is None else _spread(mask, logits.shape[:-1])
    counts = None if mask is None else mask != 0
    logits = full_precision(logits)
    if targets.is_floating_point():
        miss = logits - targets
        if counts is not None:
            miss = torch.where(counts[..., None], miss, 0.0)
        each = miss.square().mean(-1)
    else:
        each, counts = _cross_entropy(logits, targets.long(), counts, ignore_index)
    if counts is None:
        return each, None
    weight = counts if mask is None or mask.dtype == torch.bool else counts * mask
    return each, weight.to(each.dtype)


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


def with_charge(logits: Tensor, charge: Tensor) -> Tensor:
    """Logits (..., v) of which a share of exp(-charge) is left, and the rest of probability, one
    entry more: cross entropy grows by `charge` (...) nats.
    """
    charge = full_precision(charge)
    left = full_precision(logits).log_softmax(-1) - charge.unsqueeze(-1)
    rest = torch.log(-torch.expm1(-charge)).unsqueeze(-1)  # -inf for nothing
    return torch.cat([left, rest], -1)
