"""What a call's segments, padding and state mean, before and after the layers run.

Layers read padding as a document of its own, after which they start from the zero state: right for
rows without a past, wrong for a state that was trained or written (state tuning, prefixes). There
every length of padding is a call by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.call import Call
from kizzasi.models.mixer import add_losses
from kizzasi.models.ops.devices import answers, eager
from kizzasi.models.ops.documents import from_there_on
from kizzasi.models.state import (
    ModelState,
    canonical_segments,
    join_states,
    map_state,
    named_leaves,
)


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


Body = Callable[
    [Tensor, Tensor, Sequence[Any] | None, Call],
    tuple[Tensor, tuple[Any, ...], Mapping[str, Tensor]],
]


def through(
    body: Body,
    inputs: Tensor,
    state: ModelState | None,
    segment_ids: Tensor | None,
    mask: Tensor | None,
    *,
    causal: bool,
    digest: str,
    step: bool = False,
    coded: bool = False,
) -> Features:
    """Run a model's layers, or a layer, on what a user gives.

    Args:
        body: the layers on (inputs, position, blocks of the state, call): the residual stream,
            blocks of the state after, losses by name.
        inputs, state, segment_ids, mask, step, coded: as for `SequenceModel.forward`.
        causal, digest: of the model.
    """
    trunk = partial(_trunk, body, causal, digest, step, coded)
    if state is not None and mask is not None and starts_under_padding(state, mask):
        return by_length(trunk, inputs, state, segment_ids, mask)
    return trunk(inputs, state, segment_ids, mask)


def _trunk(
    body: Body,
    causal: bool,
    digest: str,
    step: bool,
    coded: bool,
    inputs: Tensor,
    state: ModelState | None,
    segment_ids: Tensor | None,
    mask: Tensor | None,
) -> Features:
    shape = (inputs.shape[0], 1 if step else inputs.shape[1])
    segments = canonical_segments(shape, state, segment_ids, mask)
    call = Call(shape, inputs.device, segments=segments, step=step, coded=coded)
    position = _positions(call, state)
    inputs, sick = _set_aside(inputs, call, causal)
    before = None if state is None else state.blocks
    x, blocks, aux = body(inputs, position[:, 0] if step else position, before, call)
    segment = torch.zeros_like(position[:, -1]) if state is None else state.segment
    if segment_ids is not None:
        segment = segment_ids[:, -1].long()
    after = ModelState(blocks, position[:, -1] + 1, segment, digest)
    after = after if mask is None else _forget_padding(after)
    after = after if sick is None else _lost(after, sick[:, -1])
    return Features(x, after, aux, sick)


def starts_under_padding(state: ModelState, mask: Tensor) -> bool:
    """Whether a row begins with padding and with a state that is not the zero state: one of earlier
    tokens, or at position 0 one that was trained or written.

    Neither a compiled graph nor torch.func can ask; they refuse the one and take the other for
    zero.
    """
    if not eager() or mask.shape[:1] != state.position.shape or mask.ndim != 2:
        return False
    padded = ~mask[:, 0].bool()
    if (padded & (state.position > 0)).any():
        return True
    rows = padded.nonzero()[:, 0]
    if not len(rows):
        return False
    leaves = (leaf for _, leaf in named_leaves(state.blocks))
    return any(
        bool(leaf.detach()[rows].any())
        for leaf in leaves
        if leaf.is_floating_point() or leaf.is_complex()
    )


def by_length(
    trunk: Callable[..., Features],
    inputs: Tensor,
    state: ModelState,
    segment_ids: Tensor | None,
    mask: Tensor,
) -> Features:
    """Run the rows of each length by themselves, without their padding, each from its state.

    Args:
        trunk: features, state after, and losses of (inputs, state, segment_ids, mask).

    Returns:
        The same of all rows: features are zero at padding, losses are means over rows.

    Raises:
        ShapeError: padding after a real token.
    """
    canonical_segments((inputs.shape[0], inputs.shape[1]), None, segment_ids, mask)  # checks them
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


def _positions(call: Call, state: ModelState | None) -> Tensor:
    """(b, t) int64: place of every token in its document, -1 at padding."""
    if state is None:
        start = torch.zeros(call.shape[0], dtype=torch.int64, device=call.device)
    else:
        start = state.position
    position = call.places(start)[1]
    if call.real is not None:
        position = position.masked_fill(~call.real, -1)
    return position


def _set_aside(inputs: Tensor, call: Call, causal: bool) -> tuple[Tensor, Tensor | None]:
    """Frames without what is not finite, and (b, t) bool, where nothing finite may come out:
    in their document, from there on. None if nowhere.

    Of a sequence that is one document nothing need be kept apart. Of several, a frame of NaN
    would reach the weights' gradients even with a loss that does not count it.
    """
    if call.starts is None or call.real is None or not inputs.is_floating_point():
        return inputs, None
    odd = ~inputs.isfinite().all(-1)
    if answers(odd) and not odd.any():
        return inputs, None
    inputs, odd = inputs.masked_fill(odd.unsqueeze(-1), 0.0), odd & call.real
    if not causal:  # earlier tokens have seen it too
        document = call.starts.cumsum(1)
        same = document.unsqueeze(1) == document.unsqueeze(2)
        return inputs, (same & odd.unsqueeze(1)).any(-1)
    return inputs, from_there_on(call.starts, odd, torch.zeros_like(odd[:, 0]))


def _forget_padding(state: ModelState) -> ModelState:
    """Rows that have seen nothing but padding get back the zero state."""
    empty = state.position == 0

    def choose(leaf: Tensor) -> Tensor:
        if not (leaf.is_floating_point() or leaf.is_complex()):
            return leaf  # integers say which slots are valid; padding leaves them invalid
        rows = empty.view(-1, *[1] * (leaf.ndim - 1))
        return torch.where(rows, torch.zeros_like(leaf), leaf)

    # Neither a compiled graph nor torch.func can ask whether there are such rows.
    return state if eager() and not empty.any() else map_state(choose, state)


def _lost(state: ModelState, rows: Tensor) -> ModelState:
    """The state with NaN for all numbers of some rows (b,)."""

    def lose(leaf: Tensor) -> Tensor:
        if not (leaf.is_floating_point() or leaf.is_complex()):
            return leaf
        return leaf.masked_fill(rows.view(-1, *[1] * (leaf.ndim - 1)), torch.nan)

    return map_state(lose, state)
