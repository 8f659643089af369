"""How queries meet keys: what all forms of attention hand to its ops, whole or in blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kizzasi.models.attention.cache import cut, in_time, layout
from kizzasi.models.attention.memory import Read, State
from kizzasi.models.call import Call
from kizzasi.models.ops.attention import ATTENTION
from kizzasi.models.ops.stencil import STENCIL_ATTENTION, Places, Plan, Stencil, distance


class Scores(NamedTuple):
    """What becomes of q . k.

    engine   of the ops.
    softcap  as of `AttentionSpec`.
    sinks    (n_heads,), as there; None: none.
    bias     what positions add, a function of (b, t, s) distances; None: nothing.
    """

    engine: str
    softcap: float | None
    sinks: Tensor | None
    bias: Callable[[Tensor], Tensor] | None

    @property
    def keywords(self) -> dict[str, Any]:
        """Of both ops."""
        return {"softcap": self.softcap, "sinks": self.sinks, "bias": self.bias}


def attend(
    scores: Scores,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None,
    query: Places,
    key: Callable[[], Places],
    *,
    causal: bool = True,
) -> Tensor:
    """`attention`; a bias alone asks where the keys are."""
    how = scores.keywords
    if scores.bias is not None:
        how["bias"] = scores.bias(distance(query, key()))
    op = ATTENTION.pick(scores.engine, q.device)
    return op(q, k, v, visible=seen, causal=causal, **how)


def attend_in_blocks(
    scores: Scores,
    q: Tensor,
    read: Read,
    before: State,
    stencil: Stencil,
    plan: Plan,
    call: Call,
) -> Tensor:
    """`stencil_attention` to a ring and to a call's tokens."""
    sight = layout(call, before, stencil)
    key, k, v, own = sight.key, read.keys, read.values, read.own
    if before.k.shape[2]:
        order, key = in_time(call, before, stencil)
        k, v = (_in_order(x, order) for x in (k, v))
        if own is not None:
            own = _in_order(own[0], order), _in_order(own[1], order), own[2]
    op = STENCIL_ATTENTION.pick(scores.engine, q.device)
    how = {**scores.keywords, "cut": partial(cut, call, before, stencil, plan, key)}
    return op(q, k, v, sight.query, key, stencil, plan, own=own, **how)


def _in_order(x: Tensor, order: Tensor) -> Tensor:
    """(b, heads, s + t, width) with the first s slots in this order (b, s)."""
    n = order.shape[1]
    index = order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return torch.cat([x[:, :, :n].gather(2, index), x[:, :, n:]], 2)
