"""A stack at a lower rate: pool k tokens, run it, repeat what comes out (Hourglass).

    k      factor
    j      inner tokens: one for every k tokens of a document, the first at its first token
    t      tokens; position within the document

    z_j = pool(x_{(j-1)k+1}, ..., x_{jk})        zeros before the document
    u   = body(z)
    y_t = x_t + up(u_j),    j = floor(t / k)

Inner token j stands at t = jk and has seen nothing later: the shift by k - 1 of the paper, without
which a token would see up to k - 1 later ones. Stacks nest: at rates 1/k, 1/k^2, ...

    mean     z_j = sum / k                 repeat   up(u_j) = u_j
    linear   z_j = W [x ..., x]            linear   up(u_j) = W_(t mod k) u_j

Source: Nawrot et al. 2021, arXiv:2110.13711, sections 2.1 and 2.2.
Differs: without attention in pooling and upsampling.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from kizzasi.models import init
from kizzasi.models.call import Call
from kizzasi.models.cost import Cost, linear
from kizzasi.models.layers.layer import (
    LayerModule,
    LayerSpec,
    cost_of,
    depth_of,
    settle_stack,
    window_of,
)
from kizzasi.models.layers.ragged import each_length
from kizzasi.models.layers.stack import Stack
from kizzasi.models.mixer import LayerContext, MixerOut
from kizzasi.strict import join, register, require


@register
@dataclass(frozen=True)
class DownsampleSpec(LayerSpec):
    """Layers that see one token for every `factor` tokens.

    Args:
        body: the layers; they share nothing with layers outside (RWKV-7's first offers v_first).
        factor: k, at least 2.
        pooling, upsampling: see above.
    """

    kind: ClassVar[str] = "downsample"
    body: tuple[LayerSpec, ...]
    factor: int
    pooling: Literal["mean", "linear"] = "mean"
    upsampling: Literal["repeat", "linear"] = "repeat"

    def check(self, d_model: int, path: str) -> None:
        super().check(d_model, path)
        rule = f"{self.factor} leaves the rate as it is; give at least 2"
        require(self.factor >= 2, join(path, "factor"), rule)
        rule = "has a part that reads later tokens, which stand for others at a lower rate"
        require(self.causal, join(path, "body"), rule)

    def settle(self, offered: bool, path: str = "") -> tuple[DownsampleSpec, bool]:
        body, _ = settle_stack(self.body, False, join(path, "body"))
        return replace(self, body=body), offered

    def build(self, context: LayerContext, eps: float, dropout: float) -> Downsample:
        return Downsample(self, context, eps, dropout)

    def cost(self, context: LayerContext, seq_len: int, batch: int) -> Cost:
        d, k, n_inner = context.d_model, self.factor, -(-seq_len // self.factor)
        total = cost_of(self.body, context, n_inner, batch)
        if self.pooling == "linear":
            total += linear(n_inner * batch, k * d, d)
        if self.upsampling == "linear":
            total += linear(n_inner * batch, d, k * d)
        vectors = k - 1 + (k if self.upsampling == "linear" else 1)
        return total + Cost(state_bytes=batch * (8 + 4 * d * vectors))

    @property
    def depth(self) -> int:
        return depth_of(self.body)

    @property
    def context_window(self) -> float:
        return self.factor * window_of(self.body) + self.factor - 1


class DownsampleState(NamedTuple):
    """position  (b,) int64, place of the next token in its document.
    recent    (b, k - 1, d) the document's last tokens, zeros before its first.
    up        (b, 1 or k, d) what the last inner token adds, to each phase if they differ.
    body      a state per layer."""

    position: Tensor
    recent: Tensor
    up: Tensor
    body: tuple[Any, ...]


class Downsample(LayerModule):
    """See `DownsampleSpec`. In a step the body runs for the rows that have an inner token."""

    def __init__(
        self, spec: DownsampleSpec, context: LayerContext, eps: float, dropout: float
    ) -> None:
        super().__init__()
        d, k = context.d_model, spec.factor
        self.spec, self.d_model = spec, d
        self.body = Stack.of(spec.body, context, eps, dropout)
        self.pool_proj = nn.Linear(k * d, d, bias=False) if spec.pooling == "linear" else None
        self.up_proj = nn.Linear(d, k * d, bias=False) if spec.upsampling == "linear" else None

    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        self.body.reset_parameters(n_layers, generator)
        if self.pool_proj is not None:
            init.linear_(self.pool_proj, generator)
        if self.up_proj is not None:
            init.linear_(self.up_proj, generator, init.residual_scale(n_layers))

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> DownsampleState:
        k, n_up = self.spec.factor, 1 if self.up_proj is None else self.spec.factor
        recent, up = (
            torch.zeros(batch, n, self.d_model, device=device, dtype=dtype) for n in (k - 1, n_up)
        )
        position = torch.zeros(batch, dtype=torch.int64, device=device)
        return DownsampleState(position, recent, up, self.body.init_state(batch, device, dtype))

    def recurrent(self, x: Tensor, state: DownsampleState, call: Call) -> MixerOut:
        out = self.parallel(x[:, None], state, call)
        return out._replace(y=out.y[:, 0])

    def parallel(self, x: Tensor, state: DownsampleState | None, call: Call) -> MixerOut:
        k = self.spec.factor
        before = self.init_state(len(x), x.device, x.dtype) if state is None else state
        document, position = call.places(before.position)
        due = position % k == 0
        if call.real is not None:
            due, x = due & call.real, x.masked_fill(~call.real.unsqueeze(-1), 0.0)
        tokens = torch.cat([before.recent.to(x.dtype), x], 1)
        n_before = position.unsqueeze(-1) - torch.arange(k - 1, -1, -1, device=x.device)

        def inner(index: Tensor, rows: Tensor | None) -> tuple[Tensor, Call]:
            """z of the tokens at index (rows, m), and the body's call."""
            given, inside, ids = (
                part if rows is None else part.index_select(0, rows)
                for part in (tokens, n_before >= 0, document)
            )
            back = index.unsqueeze(-1) + torch.arange(k, device=x.device)
            window = given.gather(1, back.flatten(1).unsqueeze(-1).expand(-1, -1, x.shape[-1]))
            there = inside.gather(1, index.unsqueeze(-1).expand(-1, -1, k))
            window = window.unflatten(1, back.shape[1:]).where(there.unsqueeze(-1), 0.0)
            segments = None if call.segments is None else ids.gather(1, index)
            around = Call((len(index), index.shape[1]), x.device, segments=segments, step=call.step)
            return self._pool(window), around

        # Of a fresh call without documents all rows are alike: no number is asked for.
        memory = None if state is None else state.body
        alike = state is None and call.segments is None
        known = torch.arange(0, x.shape[1], k, device=x.device) if alike else None
        u, body, aux = each_length(self.body, x, due, inner, memory, known)
        up = torch.cat([before.up.to(u.dtype).unsqueeze(1), self._up(u)], 1)
        latest = due.cumsum(1)
        y = x + _pick(up, latest, position % k)
        last = position[:, -1]
        if call.real is not None:
            last = last.masked_fill(~call.real[:, -1], -1)
        held = last.unsqueeze(-1) - torch.arange(k - 2, -1, -1, device=x.device) >= 0
        recent = tokens[:, x.shape[1] :].where(held.unsqueeze(-1), 0.0)
        kept = up.gather(1, latest[:, -1].view(-1, 1, 1, 1).expand(-1, 1, *up.shape[2:]))[:, 0]
        return MixerOut(y, DownsampleState(last + 1, recent, kept, body), aux)

    def _pool(self, window: Tensor) -> Tensor:
        """(b, m, k, d) to (b, m, d)."""
        return window.mean(2) if self.pool_proj is None else self.pool_proj(window.flatten(2))

    def _up(self, u: Tensor) -> Tensor:
        """(b, m, d) to what each adds, (b, m, 1 or k, d)."""
        if self.up_proj is None:
            return u.unsqueeze(2)
        return self.up_proj(u).unflatten(2, (-1, u.shape[-1]))


def _pick(up: Tensor, latest: Tensor, phase: Tensor) -> Tensor:
    """(b, t, d): of up (b, m, 1 or k, d) that of the latest inner token, in the token's phase."""
    n_up, d = up.shape[2:]
    flat = latest * n_up + (phase if n_up > 1 else 0)
    return up.flatten(1, 2).gather(1, flat.unsqueeze(-1).expand(-1, -1, d))
