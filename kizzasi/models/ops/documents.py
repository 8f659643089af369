"""Keeping what is not a number within its own document.

Chunked forms hide other documents by factors of zero, and zero times NaN is NaN. So they run on
finite numbers only, and what must not come out finite is marked afterwards.

b batch · t time
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kizzasi.models.ops import devices


def isolated(
    run: Callable[..., tuple[Tensor, Any]],
    starts: Tensor | None,
    tokens: Sequence[Tensor],
    logs: Sequence[Tensor],
    memory: Sequence[Tensor],
) -> tuple[Tensor, Any]:
    """run(*tokens, *logs, *memory), where NaN and infinities touch nothing but their document.

    From the first token that is not finite, the outputs of its document are NaN, and so is the
    state that it leaves; no gradient passes through them. All else is as it would be without it.
    Numbers that become infinite only inside `run` are not caught.

    Args:
        run: returns outputs (b, t, ...) and a state: a tensor (b, ...), or a NamedTuple of them.
        starts: (b, t) bool, True where a document starts; None if nothing is hidden from anything.
        tokens: each (b, t, ...).
        logs: each (b, t, ...), logarithms: -inf is a number among them.
        memory: each (b, ...), what the tokens before the first one left.
    """
    if starts is None or all_finite(*tokens, *logs, *memory):
        return run(*tokens, *logs, *memory)
    bad = [~x.isfinite().flatten(2).all(-1) for x in tokens]
    bad += [~(x < torch.inf).flatten(2).all(-1) for x in logs]
    lost = [~x.isfinite().flatten(1).all(-1) for x in memory]
    token, before = torch.stack(bad).any(0), torch.stack(lost).any(0)
    y, state = run(
        *(x.masked_fill(_to_shape(token, x), 0.0) for x in (*tokens, *logs)),
        *(x.masked_fill(_to_shape(before, x), 0.0) for x in memory),
    )
    sick = from_there_on(starts, token, before)
    y, after = y.masked_fill(_to_shape(sick, y), torch.nan), sick[:, -1]
    if isinstance(state, Tensor):
        return y, state.masked_fill(_to_shape(after, state), torch.nan)
    return y, type(state)(*(x.masked_fill(_to_shape(after, x), torch.nan) for x in state))


def all_finite(*inputs: Tensor) -> bool:
    """Whether all are known to be: only a CPU answers at once. A finite sum has finite terms."""
    return devices.answers(inputs[0]) and all(bool(x.detach().sum().isfinite()) for x in inputs)


def from_there_on(starts: Tensor, token: Tensor, before: Tensor) -> Tensor:
    """(b, t) bool: a token of the same document, not after this one, is bad, or what came before.

    Args:
        starts, token: (b, t) bool; before: (b,) bool.
    """
    index = torch.arange(1, starts.shape[1] + 1, device=starts.device)  # 0 is before the first
    begin = torch.where(starts, index, 0).cummax(1).values
    last_bad = torch.where(token, index, before[:, None].long() - 1).cummax(1).values
    return last_bad >= begin


def _to_shape(mask: Tensor, x: Tensor) -> Tensor:
    return mask.view(*mask.shape, *[1] * (x.ndim - mask.ndim))
