"""Mixture of depths: a stack that a token may pass by, decided by a router that sees no future.

    r       the router's score of a token, w . x
    S       the tokens that take the stack: r > 0
    C       how many of a sequence of t should: capacity t, rounded up

    y = x + sigmoid(r) (body(x_S) - x_S)   in S,    y = x   elsewhere
    loss = weight mean_t BCE(sigmoid(r), t is among the C largest r of its row)

The body sees the tokens of S alone, one after the other: its memory and its keys are of routed
tokens, and places in it count them. Training decides as evaluation does; the loss alone, which sees
the whole row, draws the share of S towards the capacity.

Source: Raposo et al. 2024, arXiv:2404.02258, sections 3.3 to 3.5.
Differs: the paper trains with the C largest, which a token cannot know of later ones, and leaves
them at evaluation; there the threshold of its section 3.5 decides, here always.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.errors import SpecError
from kizzasi.models import init
from kizzasi.models.call import Call
from kizzasi.models.cost import Cost, linear
from kizzasi.models.layers.layer import LayerModule, LayerSpec, cost_of, depth_of
from kizzasi.models.layers.stack import Stack
from kizzasi.models.mixer import LayerContext, MixerOut, add_losses
from kizzasi.models.norm import WideLinear
from kizzasi.models.state import chosen, join_states, map_state
from kizzasi.strict import join, register, require


@register
@dataclass(frozen=True)
class DepthRoutedSpec(LayerSpec):
    """A body for some tokens.

    Args:
        body: its layers.
        capacity: share of the tokens that should take it, in (0, 1).
        weight: of the router's loss.
    """

    kind: ClassVar[str] = "depth_routed"
    body: tuple[LayerSpec, ...]
    capacity: float = 0.5
    weight: float = 0.01

    def check(self, d_model: int, path: str) -> None:
        super().check(d_model, path)
        rule = f"{self.capacity} is outside (0, 1); for all tokens write the layers themselves"
        require(0 < self.capacity < 1, join(path, "capacity"), rule)
        rule = f"{self.weight} is not positive; without it the router learns no share"
        require(self.weight > 0, join(path, "weight"), rule)
        rule = "it reads later tokens, which may not be routed; give causal layers"
        require(self.causal, join(path, "body"), rule)

    def build(self, context: LayerContext, eps: float, dropout: float) -> DepthRouted:
        return DepthRouted(self, context, eps, dropout)

    def cost(self, context: LayerContext, seq_len: int, batch: int) -> Cost:
        """As if every row's share were the capacity: who takes the body is learnt."""
        body = cost_of(self.body, context, math.ceil(self.capacity * seq_len), batch)
        return body + linear(seq_len * batch, context.d_model, 1)

    def settle(self, offered: bool, path: str = "") -> tuple[DepthRoutedSpec, bool]:
        """The body stands alone: what others offer is of all tokens."""
        return super().settle(False, path)[0], offered

    @property
    def depth(self) -> int:
        return depth_of(self.body)

    @property
    def fixed_work(self) -> bool:
        return False


class DepthRouted(LayerModule):
    """See `DepthRoutedSpec`."""

    def __init__(
        self, spec: DepthRoutedSpec, context: LayerContext, eps: float, dropout: float
    ) -> None:
        super().__init__()
        self.spec = spec
        self.body = Stack.of(spec.body, context, eps, dropout)
        self.router = WideLinear(context.d_model, 1, bias=False)

    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        self.body.reset_parameters(n_layers, generator)
        init.linear_(self.router, generator)

    def parallel(self, x: Tensor, state: tuple[Any, ...] | None, call: Call) -> MixerOut:
        if torch.compiler.is_compiling() and not call.step:
            raise SpecError(
                "depth_routed: a graph cannot hold rows of which unequally many tokens are routed; "
                "compile the layers inside and outside it, or a step"
            )
        tokens = x[:, None] if call.step else x
        r = self.router(tokens)[..., 0]
        real = torch.ones_like(r, dtype=torch.bool) if call.real is None else call.real
        routed = (r > 0) & real
        first = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        document = call.places(first)[0].expand_as(r)
        if torch.compiler.is_compiling():
            return self._in_a_graph(x, r, routed, document, state, call)
        y, aux = tokens, {}
        rows: list[Tensor] = []
        states: list[Any] = []
        counts = routed.sum(1)
        for n in counts.unique().tolist():
            chosen = (counts == n).nonzero()[:, 0]
            before = None if state is None else _rows(state, chosen)
            if n == 0:
                after = self._nothing(chosen, x) if before is None else before
            else:
                places = routed[chosen].nonzero()[:, 1].view(-1, n)
                index = chosen[:, None], places
                part = tokens[index]
                ran = self._run(part, document[index], before, call)
                share = r[index].sigmoid().to(x.dtype).unsqueeze(-1)
                y = y.index_put(index, part + share * (ran.y - part))
                aux, after = add_losses(aux, _scaled(ran.aux, len(chosen) / len(x))), ran.state
            rows.append(chosen)
            states.append(self._forgetting(after, routed[chosen], document[chosen], x))
        order = torch.cat(rows).argsort()
        after = _rows(join_states(states), order)
        if not call.step:
            aux = add_losses(aux, {"depth_routed": self._loss(r, real)})
        return MixerOut(y[:, 0] if call.step else y, after, aux)

    def _in_a_graph(
        self,
        x: Tensor,
        r: Tensor,
        routed: Tensor,
        document: Tensor,
        state: tuple[Any, ...] | None,
        call: Call,
    ) -> MixerOut:
        """A step of every row, which counts where it is routed."""
        nothing = self.init_state(len(x), x.device, x.dtype)
        before = nothing if state is None else state
        ran = self._run(x[:, None], document, before, call)
        y = x + r.sigmoid().to(x.dtype) * (ran.y[:, 0] - x)
        after = chosen(routed[:, 0], ran.state, before)
        if call.segments is not None:
            after = chosen((document[:, 0] > 0) & ~routed[:, 0], nothing, after)
        return MixerOut(torch.where(routed, y, x), after)

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Any, ...]:
        return self.body.init_state(batch, device, dtype)

    def _run(
        self, part: Tensor, document: Tensor, before: tuple[Any, ...] | None, call: Call
    ) -> MixerOut:
        """The body on the routed tokens (rows, n, d) of some rows."""
        shape = part.shape[0], part.shape[1]
        segments = None if call.segments is None else document
        inner = Call(shape, part.device, segments=segments, step=call.step)
        ran = self.body(part[:, 0] if call.step else part, before, inner)
        return MixerOut(ran.x[:, None] if call.step else ran.x, ran.state, ran.aux)

    def _forgetting(
        self, state: tuple[Any, ...], routed: Tensor, document: Tensor, x: Tensor
    ) -> tuple[Any, ...]:
        """The state, of rows whose open document has no routed token the empty one."""
        last = document[:, -1:]
        new = (last[:, 0] > 0) & ~(routed & (document == last)).any(1)
        if not bool(new.any()):
            return state
        parts = [_rows(state, (~new).nonzero()[:, 0]), self._nothing(new.nonzero()[:, 0], x)]
        order = torch.cat([(~new).nonzero()[:, 0], new.nonzero()[:, 0]]).argsort()
        return _rows(join_states(parts), order)

    def _nothing(self, rows: Tensor, x: Tensor) -> tuple[Any, ...]:
        return self.body.init_state(len(rows), x.device, x.dtype)

    def _loss(self, r: Tensor, real: Tensor) -> Tensor:
        n = real.sum(1)
        wanted = torch.ceil(self.spec.capacity * n).long()
        order = r.detach().masked_fill(~real, -math.inf).argsort(1, descending=True).argsort(1)
        among = (order < wanted[:, None]).to(r.dtype)
        each = F.binary_cross_entropy_with_logits(r, among, reduction="none")
        return self.spec.weight * torch.where(real, each, 0.0).sum() / n.sum().clamp(min=1)


def _rows(state: tuple[Any, ...], rows: Tensor) -> tuple[Any, ...]:
    return map_state(lambda leaf: leaf.index_select(0, rows), state)


def _scaled(losses: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    return {name: factor * loss for name, loss in losses.items()}
