"""A state that was given before any token, and padding between it and the tokens.

Layers read padding as a document of its own, after which they start from the zero state: right for
rows without a past, wrong for a state that was trained or written (state tuning, prefixes). There
every length of padding is a call by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.mixer import add_losses
from kizzasi.models.ops.devices import eager
from kizzasi.models.state import ModelState, canonical_segments, join_states, named_leaves


class Features(NamedTuple):
    """What a model's blocks return.

    x      (b, t, d), or (b, d) in a step, the residual stream after the last one.
    state  after the last token.
    aux    their losses by name.
    sick   (b, t) bool, where an input was not finite and nothing finite may come out; or None.
    """

    x: Tensor
    state: ModelState
    aux: Mapping[str, Tensor]
    sick: Tensor | None


Trunk = Callable[[Tensor, ModelState, Tensor | None, Tensor | None], Features]


def starts_under_padding(state: ModelState, mask: Tensor) -> bool:
    """Whether a row begins with padding and with a state at position 0 that is not zero.

    Neither a compiled graph nor torch.func can ask; they take such a state for zero.
    """
    if not eager() or mask.shape[:1] != state.position.shape or mask.ndim != 2:
        return False
    rows = ((state.position == 0) & ~mask[:, 0].bool()).nonzero()[:, 0]
    if not len(rows):
        return False
    leaves = (leaf for _, leaf in named_leaves(state.blocks))
    return any(
        bool(leaf.detach()[rows].any())
        for leaf in leaves
        if leaf.is_floating_point() or leaf.is_complex()
    )


def by_length(
    trunk: Trunk, inputs: Tensor, state: ModelState, segment_ids: Tensor | None, mask: Tensor
) -> Features:
    """Run the rows of each length by themselves, without their padding, each from its state.

    Args:
        trunk: features, state after, and losses of (inputs, state, segment_ids, mask).

    Returns:
        The same of all rows: features are zero at padding, losses are means over rows.

    Raises:
        ShapeError: padding after a real token.
    """
    canonical_segments((inputs.shape[0], inputs.shape[1]), state, segment_ids, mask)  # checks them
    n_padded = (~mask.bool()).sum(1)
    order: list[Tensor] = []
    features: list[Tensor] = []
    states: list[ModelState] = []
    sick: list[Tensor] = []
    aux: Mapping[str, Tensor] = {}
    for n in n_padded.unique().tolist():
        rows = (n_padded == n).nonzero()[:, 0]
        before, first = state.gather(rows), min(n, inputs.shape[1] - 1)
        ids = None if segment_ids is None else segment_ids[rows, first:]
        x, after, losses, ill = trunk(inputs[rows, first:], before, ids, None)
        if n > first:  # nothing but padding: one token was read for the shapes alone
            x, after, losses, ill = torch.zeros_like(x), before, {}, None
        ill = torch.zeros_like(x[..., 0], dtype=torch.bool) if ill is None else ill
        order.append(rows)
        features.append(F.pad(x, (0, 0, first, 0)))
        sick.append(F.pad(ill, (first, 0)))
        states.append(after)
        share = len(rows) / len(inputs)
        aux = add_losses(aux, {name: loss * share for name, loss in losses.items()})
    back = torch.cat(order).argsort()
    state = join_states(states).gather(back)
    return Features(torch.cat(features)[back], state, aux, torch.cat(sick)[back])
