"""Mixture of depths: a stack that a token may pass by, decided by a router that sees no future.

    r       the router's score of a token, w . x / tau
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
from kizzasi.models.layers.ragged import each_length
from kizzasi.models.layers.stack import Stack
from kizzasi.models.mixer import LayerContext, MixerOut, add_losses
from kizzasi.models.norm import WideLinear
from kizzasi.models.state import chosen
from kizzasi.strict import added, join, register, require


@register
@dataclass(frozen=True)
class DepthRoutedSpec(LayerSpec):
    """A body for some tokens.

    Args:
        body: its layers.
        capacity: share of the tokens that should take it, in (0, 1).
        weight: of the router's loss.
        temperature: tau; the colder, the nearer are shares and slopes to all or nothing.
    """

    kind: ClassVar[str] = "depth_routed"
    body: tuple[LayerSpec, ...]
    capacity: float = 0.5
    weight: float = 0.01
    temperature: float = added(1.0)

    def check(self, d_model: int, path: str) -> None:
        super().check(d_model, path)
        rule = f"{self.capacity} is outside (0, 1); for all tokens write the layers themselves"
        require(0 < self.capacity < 1, join(path, "capacity"), rule)
        rule = f"{self.weight} is not positive; without it the router learns no share"
        require(self.weight > 0, join(path, "weight"), rule)
        self.require_positive(path, "temperature")
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
        r = self.router(tokens)[..., 0] / self.spec.temperature
        real = torch.ones_like(r, dtype=torch.bool) if call.real is None else call.real
        routed = (r > 0) & real
        first = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        document = call.places(first)[0].expand_as(r)

        def inner(index: Tensor, rows: Tensor | None) -> tuple[Tensor, Call]:
            z, ids = (v if rows is None else v.index_select(0, rows) for v in (tokens, document))
            z = z.gather(1, index.unsqueeze(-1).expand(-1, -1, z.shape[-1]))
            segments = None if call.segments is None else ids.gather(1, index)
            shape = z.shape[0], z.shape[1]
            return z, Call(shape, x.device, segments=segments, step=call.step)

        u, after, aux = each_length(self.body, tokens, routed, inner, state)
        share = r.sigmoid().to(x.dtype).unsqueeze(-1)
        if torch.compiler.is_compiling():  # a step, which ran for every row
            y = torch.where(routed.unsqueeze(-1), tokens + share * (u - tokens), tokens)
        else:
            index = routed.nonzero(as_tuple=True)
            part, ran = tokens[index], u[index[0], routed.cumsum(1)[index] - 1]
            y = tokens.index_put(index, part + share[index] * (ran - part))
        if call.segments is not None:
            nothing = self.init_state(len(x), x.device, x.dtype)
            after = chosen(_begun(routed, document), nothing, after)
        if not call.step:
            aux = add_losses(aux, {"depth_routed": self._loss(r, real)})
        return MixerOut(y[:, 0] if call.step else y, after, aux)

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Any, ...]:
        return self.body.init_state(batch, device, dtype)

    def _loss(self, r: Tensor, real: Tensor) -> Tensor:
        n = real.sum(1)
        wanted = torch.ceil(self.spec.capacity * n).long()
        order = r.detach().masked_fill(~real, -math.inf).argsort(1, descending=True).argsort(1)
        among = (order < wanted[:, None]).to(r.dtype)
        each = F.binary_cross_entropy_with_logits(r, among, reduction="none")
        return self.spec.weight * torch.where(real, each, 0.0).sum() / n.sum().clamp(min=1)


def _begun(routed: Tensor, document: Tensor) -> Tensor:
    """(b,) rows whose open document began in this call and has no routed token."""
    last = document[:, -1:]
    return (last[:, 0] > 0) & ~(routed & (document == last)).any(1)
