"""A stack that a summary of the document so far turns up, down or aside.

    c       summary of the stream up to and including a token, (b, t, d)
    g       groups of channels with one factor each: 1 for all channels, n_heads for heads, d
    s, a    factor - 1 and shift of a group

    mean     c[t] = norm(mean of x[0..t])
    ema      c[t] = norm(h[t]),   h[t] = decay h[t-1] + (1 - decay) x[t],  a decay a channel
    segment  c[t] = norm(mean of the last so many tokens that ended before t), 0 in the first

    film    m(x) = (1 + s) x + a            scale  m(x) = (1 + s) x           s, a = W c
    add     m(x) = x + a                    lora   m(x) = x + B (W c * A x)

    in      y = x + (body(m(x)) - m(x))     the branches alone read what is changed
    out     y = x + m(body(x) - x)          what they add is changed
    stream  y = body(m(x))
    norm    y = body(x), its norms giving m(norm(x)); q, v: its queries or values being m(W_q x),
            as wide as they are, of which lora reads the projection's input; see `parts.turns`

With a hidden width W c is W silu(W_h c). W of film, add and scale, and B, start at zero: the layer
starts as its body.

Source: Perez et al. 2017, arXiv:1709.07871 (FiLM); low rank: Hu et al. 2021, arXiv:2106.09685.
Differs: c is causal, where a mean over the whole sequence would show every token the future.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kizzasi.errors import SpecError
from kizzasi.models import init
from kizzasi.models.call import Call
from kizzasi.models.cost import Cost, dense, linear, norm
from kizzasi.models.layers.layer import LayerModule, LayerSpec, cost_of, depth_of
from kizzasi.models.layers.stack import Stack
from kizzasi.models.mixer import NO_DECAY, LayerContext, MixerOut
from kizzasi.models.norm import Norm
from kizzasi.models.ops.decay_scan import decay_scan
from kizzasi.models.ops.precision import full_precision
from kizzasi.models.parts.turns import (
    PLACES,
    TURNS,
    Tap,
    Taps,
    Turns,
    after,
    beside,
    common,
    grouped,
)
from kizzasi.strict import added, join, register, require

LONGEST = 1000.0  # tokens after which the slowest channel of an EMA starts to forget


@register
@dataclass(frozen=True)
class ConditionSpec(LayerSpec):
    """A body conditioned on the document so far.

    Args:
        body: its layers.
        source, op, at: see the top of the file.
        groups: g, a divisor of d_model, or of the width of queries or values; None means all of it.
            Not for "lora".
        rank: of "lora".
        segment: tokens of a segment.
        hidden: width between c and what it makes; None: none.
    """

    kind: ClassVar[str] = "condition"
    body: tuple[LayerSpec, ...]
    op: Literal["film", "add", "scale", "lora"] = "film"
    at: Literal["in", "out", "stream", "norm", "q", "v"] = "in"
    source: Literal["mean", "ema", "segment"] = "mean"
    groups: int | None = None
    rank: int | None = None
    segment: int | None = added(None)
    hidden: int | None = added(None)

    def check(self, d_model: int, path: str) -> None:
        super().check(d_model, path)
        for name in ("groups", "rank", "segment", "hidden"):
            if getattr(self, name) is not None:
                self.require_positive(path, name)
        lora = self.op == "lora"
        rule = f"{self.op!r} {'needs a rank and no groups' if lora else 'takes no rank'}"
        fits = (self.rank is not None) == lora and not (lora and self.groups is not None)
        require(fits, join(path, "rank"), rule)
        tap = self.tap(d_model)
        rule = f"{self.at!r}: of the body's layers not all have that, or not alike"
        rule += "; a block's norms before branches do, and attention's queries and values"
        require(tap is not None, join(path, "at"), rule)
        width = d_model if tap is None else tap.width
        what = "d_model" if width == d_model else f"the width of {self.at}"
        rule = f"{self.groups} does not divide {what} {width}; give a divisor"
        require(width % (self.groups or 1) == 0, join(path, "groups"), rule)
        rule = f"{self.source!r} {'needs its tokens' if self.source == 'segment' else 'has none'}"
        fits = (self.segment is not None) == (self.source == "segment")
        require(fits, join(path, "segment"), rule)

    def build(self, context: LayerContext, eps: float, dropout: float) -> Condition:
        return Condition(self, context, eps, dropout)

    def cost(self, context: LayerContext, seq_len: int, batch: int) -> Cost:
        d, n = context.d_model, seq_len * batch
        total = cost_of(self.body, context, seq_len, batch) + norm("rms", d)
        kept = 8 * d if self.source == "segment" else 4 * d
        total += dense(d if self.source == "ema" else 0, state_bytes=batch * (kept + 8))
        if self.hidden is not None:
            total += linear(n, d, self.hidden)
        total += linear(n, self.hidden or d, self.n_turning(d))
        if self.rank is not None:
            tap = self._tap(d)
            low = linear(n, tap.n_in, self.rank) + linear(n, self.rank, tap.width)
            total += low._replace(flops=tap.times * low.flops)
        return total

    def n_turning(self, d_model: int) -> int:
        """Rows of W."""
        if self.rank is not None:
            return self.rank
        return (1 + (self.op == "film")) * (self.groups or self._tap(d_model).width)

    def tap(self, d_model: int) -> Tap | None:
        """What is turned; None if the body has none."""
        if self.at not in PLACES:
            return Tap(d_model, d_model, 1)
        return self.inner_taps(d_model).get(self.at)

    def _tap(self, d_model: int) -> Tap:
        tap = self.tap(d_model)
        if tap is None:
            raise SpecError(f"at: {self.at!r} is nowhere in the body; see check")
        return tap

    def inner_taps(self, d_model: int) -> Taps:
        return common([layer.taps(d_model) for layer in self.body])

    def taps(self, d_model: int) -> Taps:
        return self.inner_taps(d_model)

    @property
    def depth(self) -> int:
        return depth_of(self.body)


class ConditionState(NamedTuple):
    """body: a state per layer. memory (b, d): the sum, or h. seen (b,) int64: tokens so far in the
    document. last (b, d), of segments: the mean of the last that ended, zeros if none."""

    body: tuple[Any, ...]
    memory: Tensor
    seen: Tensor
    last: Tensor | tuple[()] = ()


class Condition(LayerModule):
    """See `ConditionSpec`."""

    float32_parameters = ("log_tau",)
    param_rules = {"log_tau": NO_DECAY}  # noqa: RUF012 (read-only by contract)

    def __init__(
        self, spec: ConditionSpec, context: LayerContext, eps: float, dropout: float
    ) -> None:
        super().__init__()
        d, self.spec = context.d_model, spec
        self.d_model = d
        self.body = Stack.of(spec.body, context, eps, dropout)
        self.norm = Norm("rms", d, eps)
        self.log_tau = nn.Parameter(torch.empty(d)) if spec.source == "ema" else None
        self.down, self.up = None, None
        tap = spec.tap(d)
        assert tap is not None, "checked"
        self.n_groups = spec.groups or tap.width
        if spec.rank is not None:
            self.down = nn.Linear(tap.n_in, spec.rank, bias=False)
            self.up = nn.Linear(spec.rank, tap.width, bias=False)
        self.hidden = None if spec.hidden is None else nn.Linear(d, spec.hidden, bias=False)
        self.turn = nn.Linear(spec.hidden or d, spec.n_turning(d), bias=False)

    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        self.body.reset_parameters(n_layers, generator)
        self.norm.reset_parameters()
        if self.log_tau is not None:
            with torch.no_grad():
                self.log_tau.copy_(torch.linspace(0, math.log(LONGEST), len(self.log_tau)))
        if self.hidden is not None:
            init.linear_(self.hidden, generator)
        if self.down is None or self.up is None:
            nn.init.zeros_(self.turn.weight)
            return
        init.linear_(self.turn, generator)
        init.linear_(self.down, generator)
        nn.init.zeros_(self.up.weight)

    def parallel(self, x: Tensor, state: ConditionState | None, call: Call) -> MixerOut:
        c, memory, seen, last = self._summary(x, state, call)
        c, at = c.to(x.dtype), self.spec.at
        change = self.turn(c if self.hidden is None else F.silu(self.hidden(c)))
        before = None if state is None else state.body
        turns: Turns = call.lent.get(TURNS, {})
        if at in PLACES:
            turns = after(turns, at, lambda z, x: self._changed(z, change, x))
        read = self._changed(x, change, x) if at in ("in", "stream") else x
        ran = self.body(read, before, call, turns=[turns] * len(self.body))
        y = ran.x
        if at == "in":
            y = x + (y - read)
        elif at == "out":
            y = x + self._changed(y - x, change, y - x)
        return MixerOut(y, ConditionState(ran.state, memory, seen, last), ran.aux, ran.shared)

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> ConditionState:
        kind = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        memory = torch.zeros(batch, self.d_model, device=device, dtype=kind)
        seen = torch.zeros(batch, dtype=torch.int64, device=device)
        last = torch.zeros_like(memory) if self.spec.source == "segment" else ()
        return ConditionState(self.body.init_state(batch, device, dtype), memory, seen, last)

    def _summary(
        self, x: Tensor, state: ConditionState | None, call: Call
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | tuple[()]]:
        """c, the memory, how many tokens the document has had, and the last segment's mean."""
        u = full_precision(x[:, None] if call.step else x)
        start = x.new_zeros(len(x), dtype=torch.int64) if state is None else state.seen
        h0 = None if state is None else state.memory
        position = call.places(start)[1]
        if call.real is not None:
            position = position.masked_fill(~call.real, -1)
        seen, last = (position + 1).expand(len(x), -1), ()
        if self.spec.segment is not None:
            before = None if state is None else state.last
            c, memory, last = self._of_segments(u, h0, before, seen - 1, call)
        elif self.log_tau is None:
            h, memory = decay_scan(torch.zeros_like(u), u, h0, call.starts)
            c = h / seen.clamp(min=1).unsqueeze(-1).to(h.dtype)
        else:
            log_a = -torch.exp(-full_precision(self.log_tau)).to(u.dtype)
            log_a = log_a.expand_as(u)
            c, memory = decay_scan(log_a, -torch.expm1(log_a) * u, h0, call.starts)
        c = self.norm(c)
        return c[:, 0] if call.step else c, memory, seen[:, -1], last

    def _of_segments(
        self, u: Tensor, h0: Tensor | None, last: Any, position: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(b, t, d) means of the segments that ended before, the sum of the open one, and the mean
        of the last that ended; position (b, t), -1 at padding."""
        n = self.spec.segment
        assert n is not None, "asked"
        begins = position % n == 0
        starts = begins if call.starts is None else begins | call.starts
        h, memory = decay_scan(torch.zeros_like(u), u, h0, starts)
        end = torch.arange(u.shape[1], device=u.device) - position % n - 1
        index = end.clamp(min=0).unsqueeze(-1).expand_as(u)
        here = h.gather(1, index) / n
        last = torch.zeros_like(u[:, 0]) if last is None else last
        c = torch.where((end < 0).unsqueeze(-1), last[:, None], here)
        c = torch.where((position < n).unsqueeze(-1), 0.0, c)
        now = position[:, -1:]
        ended = (now >= 0) & ((now + 1) % n == 0)
        return c, memory, torch.where(ended, h[:, -1] / n, c[:, -1])

    def _changed(self, z: Tensor, change: Tensor, x: Tensor) -> Tensor:
        """m(z), of which lora reads x."""
        if self.down is not None and self.up is not None:
            return z + self.up(beside(x, change) * self.down(x))
        return grouped(z, change, self.spec.op, self.n_groups)
