"""A stack that runs on some tokens of each row, as many as the row has: rows of a length together.

What is inside knows padding in front of a row's first token alone, and no state goes on through
padding. So rows with unequally many inner tokens run apart, and their states are joined again. In a
graph, which cannot tell rows apart, a step runs for all, and counts where it is due.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.call import Call
from kizzasi.models.layers.stack import Stack
from kizzasi.models.mixer import add_losses
from kizzasi.models.state import chosen, join_states, map_state

Inner = Callable[[Tensor, "Tensor | None"], "tuple[Tensor, Call]"]
Ran = tuple[Tensor, tuple[Any, ...], Mapping[str, Tensor]]


def each_length(
    body: Stack,
    x: Tensor,
    due: Tensor,
    inner: Inner,
    state: tuple[Any, ...] | None,
    known: Tensor | None = None,
) -> Ran:
    """Run a stack on the inner tokens of every row.

    Args:
        x: (b, t, d), for what comes out where there is no inner token.
        due: (b, t) bool, tokens that have an inner one.
        inner: of places (n, m) int64 and rows (n,), None for all, the stack's input (n, m, d) and
            its call.
        state: of every layer, (b, ...); None starts afresh.
        known: (m,) the places, if they are the same in every row; None to look.

    Returns:
        (b, m, d) what comes out, the i-th inner token of a row at i, zeros after its last; the
        states after; losses by name, means over rows.
    """
    if known is not None:
        return _run(body, inner, known.expand(len(due), -1), None, state)
    if torch.compiler.is_compiling() and x.shape[1] == 1:
        before = body.init_state(len(x), x.device, x.dtype) if state is None else state
        u, after, aux = _run(body, inner, torch.zeros_like(due, dtype=torch.int64), None, before)
        return u.where(due.unsqueeze(-1), 0.0), chosen(due[:, 0], after, before), aux
    counts = due.sum(1)
    lengths = counts.unique().tolist()
    if len(lengths) == 1:
        return _of_length(body, x, due, inner, state, None, lengths[0], lengths[0])
    outs: list[Tensor] = []
    states: list[tuple[Any, ...]] = []
    order: list[Tensor] = []
    aux: Mapping[str, Tensor] = {}
    for n in lengths:
        rows = (counts == n).nonzero()[:, 0]
        u, after, losses = _of_length(body, x, due, inner, state, rows, n, lengths[-1])
        outs.append(u)
        states.append(after)
        order.append(rows)
        aux = add_losses(aux, {k: loss * (len(rows) / len(due)) for k, loss in losses.items()})
    back = torch.cat(order).argsort()
    return torch.cat(outs)[back], _gather(join_states(states), back), aux


def _of_length(
    body: Stack,
    x: Tensor,
    due: Tensor,
    inner: Inner,
    state: tuple[Any, ...] | None,
    rows: Tensor | None,
    n: int,
    longest: int,
) -> Ran:
    """The rows that have n inner tokens; None for all."""
    if rows is not None:
        x, due, state = x[rows], due[rows], None if state is None else _gather(state, rows)
    if n == 0:
        state = body.init_state(len(x), x.device, x.dtype) if state is None else state
        return x.new_zeros(len(x), longest, x.shape[-1]), state, {}
    index = due.nonzero()[:, 1].view(len(x), n)
    u, after, aux = _run(body, inner, index, rows, state)
    return F.pad(u, (0, 0, 0, longest - n)), after, aux


def _run(
    body: Stack, inner: Inner, index: Tensor, rows: Tensor | None, state: tuple[Any, ...] | None
) -> Ran:
    z, call = inner(index, rows)
    out = body(z[:, 0] if call.step else z, state, call)
    return out.x[:, None] if call.step else out.x, out.state, out.aux


def _gather(state: tuple[Any, ...], rows: Tensor) -> tuple[Any, ...]:
    return map_state(lambda leaf: leaf.index_select(0, rows), state)
