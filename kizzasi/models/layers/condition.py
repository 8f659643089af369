"""A stack that a summary of the document so far turns up, down or aside.

    c       summary of the stream up to and including a token, (b, t, d)
    g       groups of channels with one factor each: 1 for all channels, n_heads for heads, d
    s, a    factor - 1 and shift of a group

    mean    c[t] = norm(mean of x[0..t])
    ema     c[t] = norm(h[t]),   h[t] = decay h[t-1] + (1 - decay) x[t],  a decay a channel

    film    m(x) = (1 + s) x + a            scale  m(x) = (1 + s) x           s, a = W c
    add     m(x) = x + a                    lora   m(x) = x + B (W c * A x)

    in      y = x + (body(m(x)) - m(x))     the branches alone read what is changed
    out     y = x + m(body(x) - x)          what they add is changed
    stream  y = body(m(x))

W of film, add and scale, and B, start at zero: the layer starts as its body.

Source: Perez et al. 2017, arXiv:1709.07871 (FiLM); low rank: Hu et al. 2021, arXiv:2106.09685.
Differs: c is causal, where a mean over the whole sequence would show every token the future.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from kizzasi.models import init
from kizzasi.models.call import Call
from kizzasi.models.cost import Cost, dense, linear, norm
from kizzasi.models.layers.layer import LayerModule, LayerSpec, cost_of, depth_of
from kizzasi.models.layers.stack import Stack
from kizzasi.models.mixer import NO_DECAY, LayerContext, MixerOut
from kizzasi.models.norm import Norm
from kizzasi.models.ops.decay_scan import decay_scan
from kizzasi.models.ops.precision import full_precision
from kizzasi.strict import join, register, require

LONGEST = 1000.0  # tokens after which the slowest channel of an EMA starts to forget


@register
@dataclass(frozen=True)
class ConditionSpec(LayerSpec):
    """A body conditioned on the document so far.

    Args:
        body: its layers.
        source, op, at: see the top of the file.
        groups: g, a divisor of d_model; None means d_model. Not for "lora".
        rank: of "lora".
    """

    kind: ClassVar[str] = "condition"
    body: tuple[LayerSpec, ...]
    op: Literal["film", "add", "scale", "lora"] = "film"
    at: Literal["in", "out", "stream"] = "in"
    source: Literal["mean", "ema"] = "mean"
    groups: int | None = None
    rank: int | None = None

    def check(self, d_model: int, path: str) -> None:
        super().check(d_model, path)
        for name in ("groups", "rank"):
            if getattr(self, name) is not None:
                self.require_positive(path, name)
        lora = self.op == "lora"
        rule = f"{self.op!r} {'needs a rank and no groups' if lora else 'takes no rank'}"
        fits = (self.rank is not None) == lora and not (lora and self.groups is not None)
        require(fits, join(path, "rank"), rule)
        rule = f"{self.groups} does not divide d_model {d_model}; give a divisor"
        require(d_model % (self.groups or 1) == 0, join(path, "groups"), rule)

    def build(self, context: LayerContext, eps: float, dropout: float) -> Condition:
        return Condition(self, context, eps, dropout)

    def cost(self, context: LayerContext, seq_len: int, batch: int) -> Cost:
        d, n = context.d_model, seq_len * batch
        total = cost_of(self.body, context, seq_len, batch) + norm("rms", d)
        total += dense(d if self.source == "ema" else 0, state_bytes=batch * (4 * d + 8))
        if self.rank is not None:
            return (
                total + linear(n, d, self.rank) + linear(n, d, self.rank) + linear(n, self.rank, d)
            )
        return total + linear(n, d, (1 + (self.op == "film")) * (self.groups or d))

    @property
    def depth(self) -> int:
        return depth_of(self.body)


class ConditionState(NamedTuple):
    """body: a state per layer. memory (b, d): the sum, or h. seen (b,) int64: tokens so far in the
    document."""

    body: tuple[Any, ...]
    memory: Tensor
    seen: Tensor


class Condition(LayerModule):
    """See `ConditionSpec`."""

    float32_parameters = ("log_tau",)
    param_rules = {"log_tau": NO_DECAY}  # noqa: RUF012 (read-only by contract)

    def __init__(
        self, spec: ConditionSpec, context: LayerContext, eps: float, dropout: float
    ) -> None:
        super().__init__()
        d, self.spec = context.d_model, spec
        self.body = Stack.of(spec.body, context, eps, dropout)
        self.norm = Norm("rms", d, eps)
        self.log_tau = nn.Parameter(torch.empty(d)) if spec.source == "ema" else None
        self.down, self.up = None, None
        width = (1 + (spec.op == "film")) * (spec.groups or d)
        if spec.rank is not None:
            width = spec.rank
            self.down = nn.Linear(d, width, bias=False)
            self.up = nn.Linear(width, d, bias=False)
        self.turn = nn.Linear(d, width, bias=False)

    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        self.body.reset_parameters(n_layers, generator)
        self.norm.reset_parameters()
        if self.log_tau is not None:
            with torch.no_grad():
                self.log_tau.copy_(torch.linspace(0, math.log(LONGEST), len(self.log_tau)))
        if self.down is None or self.up is None:
            nn.init.zeros_(self.turn.weight)
            return
        init.linear_(self.turn, generator)
        init.linear_(self.down, generator)
        nn.init.zeros_(self.up.weight)

    def parallel(self, x: Tensor, state: ConditionState | None, call: Call) -> MixerOut:
        c, memory, seen = self._summary(x, state, call)
        change = self.turn(c.to(x.dtype))
        before = None if state is None else state.body
        read = x if self.spec.at == "out" else self._changed(x, change)
        ran = self.body(read, before, call)
        y = ran.x
        if self.spec.at == "in":
            y = x + (y - read)
        elif self.spec.at == "out":
            y = x + self._changed(y - x, change)
        after = ConditionState(ran.state, memory, seen)
        return MixerOut(y, after, ran.aux, ran.shared)

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> ConditionState:
        kind = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        memory = torch.zeros(batch, self.turn.in_features, device=device, dtype=kind)
        seen = torch.zeros(batch, dtype=torch.int64, device=device)
        return ConditionState(self.body.init_state(batch, device, dtype), memory, seen)

    def _summary(
        self, x: Tensor, state: ConditionState | None, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        """c, the memory, and how many tokens the document has had."""
        u = full_precision(x[:, None] if call.step else x)
        start = x.new_zeros(len(x), dtype=torch.int64) if state is None else state.seen
        h0 = None if state is None else state.memory
        position = call.places(start)[1]
        if call.real is not None:
            position = position.masked_fill(~call.real, -1)
        seen = (position + 1).expand(len(x), -1)
        if self.log_tau is None:
            h, memory = decay_scan(torch.zeros_like(u), u, h0, call.starts)
            c = h / seen.clamp(min=1).unsqueeze(-1).to(h.dtype)
        else:
            log_a = -torch.exp(-full_precision(self.log_tau)).to(u.dtype)
            log_a = log_a.expand_as(u)
            c, memory = decay_scan(log_a, -torch.expm1(log_a) * u, h0, call.starts)
        c = self.norm(c)
        return c[:, 0] if call.step else c, memory, seen[:, -1]

    def _changed(self, x: Tensor, change: Tensor) -> Tensor:
        """m(x)."""
        if self.down is not None and self.up is not None:
            return x + self.up(change * self.down(x))
        grouped = x.unflatten(-1, (self.spec.groups or x.shape[-1], -1))
        parts = change.unsqueeze(-1)
        if self.spec.op == "film":
            factor, shift = parts.chunk(2, dim=-2)
            y = grouped * (1 + factor) + shift
        else:
            y = grouped + parts if self.spec.op == "add" else grouped * (1 + parts)
        return y.flatten(-2)
