"""Gated DeltaProduct: several corrections of a matrix memory per token, so that states can rotate.

Symbols: b batch, t time, d d_model, h heads, d_k and d_v widths of a key and a value, r n_updates.

| here | paper | meaning |
|---|---|---|
| n_updates | n_h | generalised Householder steps per token |
| in_proj_q, in_proj_k, in_proj_v | W_q, W_k, W_v | a query, r keys, r values per head and token |
| in_proj_beta | W_beta | how far each of the r steps goes |
| in_proj_a, A_log, dt_bias | | the decay, before the first step of a token |
| memory (b,h,d_k,d_v) | H_t^T | what the layer remembers |

Source: Siems et al. 2025, arXiv:2502.10297, sections 3 and 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kizzasi.models.call import Call
from kizzasi.models.cost import Cost, dense, linear
from kizzasi.models.init import linear_, residual_scale, softplus_inverse, uniform_
from kizzasi.models.mixer import LayerContext, Mixer, MixerOut, MixerSpec, state_dtype
from kizzasi.models.norm import Norm
from kizzasi.models.ops.conv import CAUSAL_CONV1D
from kizzasi.models.ops.delta import (
    DELTA_RULE,
    delta_rule_flops,
    delta_rule_step,
    l2_normalise,
)
from kizzasi.models.ops.precision import full_precision
from kizzasi.models.parts.causal_conv import CausalConv, convolve
from kizzasi.strict import join, register, require


@register
@dataclass(frozen=True)
class DeltaProductSpec(MixerSpec):
    """Gated DeltaProduct mixer.

    n_heads: heads, each with a memory.
    n_updates: corrections of the memory per token; 1 is gated DeltaNet.
    head_dim: width of a key; None means d_model / n_heads.
    expand_v: width of a value / width of a key.
    d_conv: length of the causal convolution over queries, keys and values.
    gated: False takes the decay away.
    negative_eigenvalues: steps in (0, 2) instead of (0, 1), without which products of steps cannot
        rotate.
    norm_eps: epsilon of the norm over each head's output.
    """

    kind: ClassVar[str] = "delta_product"
    n_heads: int
    n_updates: int = 2
    head_dim: int | None = None
    expand_v: float = 1.0
    d_conv: int = 4
    gated: bool = True
    negative_eigenvalues: bool = True
    norm_eps: float = 1e-5

    def check(self, d_model: int, path: str) -> None:
        self.require_positive(path, "n_heads", "n_updates", "d_conv", "norm_eps")
        if self.head_dim is not None:
            self.require_positive(path, "head_dim")
        rule = f"{self.n_heads} does not divide d_model {d_model}; give a divisor, or head_dim"
        fits = self.head_dim is not None or d_model % self.n_heads == 0
        require(fits, join(path, "n_heads"), rule)
        width = self.expand_v * (self.head_dim or d_model // self.n_heads)
        rule = f"{self.expand_v} gives values of {width:g} channels; make that a whole number >= 1"
        require(width >= 1 and width == round(width), join(path, "expand_v"), rule)

    def widths(self, d_model: int) -> tuple[int, int]:
        """d_k and d_v."""
        d_k = self.head_dim or d_model // self.n_heads
        return d_k, round(self.expand_v * d_k)

    def build(self, layer: LayerContext) -> Mixer:
        return DeltaProduct(self, layer)

    def cost(self, layer: LayerContext, seq_len: int, batch: int) -> Cost:
        d, h, r, tokens = layer.d_model, self.n_heads, self.n_updates, batch * seq_len
        d_k, d_v = self.widths(d)
        convolved = h * (d_k + r * (d_k + d_v))
        return (
            linear(tokens, d, convolved)
            + linear(tokens, d, h * (r + self.gated))
            + linear(tokens, d, h * d_v)
            + linear(tokens, h * d_v, d)
            + dense(
                params=convolved * self.d_conv + 2 * h * self.gated + d_v,
                flops=delta_rule_flops(batch, seq_len * r, h, d_k, d_v, per_channel=False),
                state_bytes=4 * batch * (convolved * (self.d_conv - 1) + h * d_k * d_v),
            )
        )


class DeltaProductState(NamedTuple):
    """conv: (b, q k v channels, d_conv - 1) last inputs. memory: (b, h, d_k, d_v), >= float32."""

    conv: Tensor
    memory: Tensor


class DeltaProduct(Mixer):
    """q, k, v = silu(conv(.));  y = out_proj(norm(memory read by q) * silu(g_proj(x))).

    A token fades the memory once and corrects it r times, with keys of length 1:
    S <- exp(g) S, then r times S <- (I - beta_j k_j k_j^T) S + beta_j k_j v_j^T; y = S^T q.
    """

    ops = (CAUSAL_CONV1D, DELTA_RULE)
    float32_parameters = ("A_log", "dt_bias")

    def __init__(self, spec: DeltaProductSpec, layer: LayerContext) -> None:
        super().__init__()
        self.spec = spec
        d, h, r = layer.d_model, spec.n_heads, spec.n_updates
        self.d_k, self.d_v = d_k, d_v = spec.widths(d)
        self.parts = [h * d_k, r * h * d_k, r * h * d_v]
        convolved = sum(self.parts)
        self.in_proj_q = nn.Linear(d, self.parts[0], bias=False)
        self.in_proj_k = nn.Linear(d, self.parts[1], bias=False)
        self.in_proj_v = nn.Linear(d, self.parts[2], bias=False)
        self.in_proj_beta = nn.Linear(d, r * h, bias=False)
        self.conv1d = CausalConv(convolved, convolved, spec.d_conv, groups=convolved, bias=False)
        if spec.gated:
            self.in_proj_a = nn.Linear(d, h, bias=False)
            self.A_log = nn.Parameter(torch.empty(h))
            self.dt_bias = nn.Parameter(torch.empty(h))
        self.g_proj = nn.Linear(d, h * d_v, bias=False)
        self.norm = Norm("rms", d_v, spec.norm_eps)
        self.out_proj = nn.Linear(h * d_v, d, bias=False)

    def parallel(self, x: Tensor, state: DeltaProductState | None, call: Call) -> MixerOut:
        run = DELTA_RULE.pick(self.engine, x.device)
        conv_state, memory = (None, None) if state is None else state
        qkv, conv_state = self._convolve(self._project(x), conv_state, call)
        q, k, v, g, beta = (s.flatten(1, 2) for s in self._streams(x, qkv))  # r updates a token
        starts, r = call.starts, self.spec.n_updates
        if starts is not None:  # a document starts at the first update of its token
            starts = F.pad(starts.unsqueeze(-1), (0, r - 1)).flatten(1)
        y, memory = run(q, k, v, g, beta, memory, starts)
        return MixerOut(self._leave(x, y[:, r - 1 :: r]), DeltaProductState(conv_state, memory))

    def recurrent(self, x: Tensor, state: DeltaProductState, call: Call) -> MixerOut:
        qkv, conv_state = self._convolve(self._project(x), state.conv, call)
        memory = y = state.memory
        for update in zip(*(s.unbind(1) for s in self._streams(x, qkv)), strict=True):
            y, memory = delta_rule_step(memory, *update)
        return MixerOut(self._leave(x, y), DeltaProductState(conv_state, memory))

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> DeltaProductState:
        conv = batch, sum(self.parts), self.spec.d_conv - 1
        memory = batch, self.spec.n_heads, self.d_k, self.d_v
        return DeltaProductState(
            torch.zeros(conv, device=device, dtype=dtype),
            torch.zeros(memory, device=device, dtype=state_dtype(dtype)),
        )

    def _convolve(self, u: Tensor, state: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        k, engine = self.spec.d_conv, self.engine
        return convolve(self.conv1d, k, u, state, call, silu=True, engine=engine)

    def _project(self, x: Tensor) -> Tensor:
        """The convolution's input: all q, all k, all v."""
        return torch.cat([self.in_proj_q(x), self.in_proj_k(x), self.in_proj_v(x)], -1)

    def _streams(self, x: Tensor, qkv: Tensor) -> tuple[Tensor, ...]:
        """q, k (..., r, h, d_k), v (..., r, h, d_v), g (..., r, h, 1), beta (..., r, h) of
        `delta_rule`, in at least float32. Only a token's last update is read, its first fades."""
        r, h = self.spec.n_updates, self.spec.n_heads
        q, k, v = qkv.split(self.parts, -1)
        q = l2_normalise(q.unflatten(-1, (1, h, -1))) * self.d_k**-0.5
        q = torch.cat([torch.zeros_like(q)] * (r - 1) + [q], -3)
        k, v = l2_normalise(k.unflatten(-1, (r, h, -1))), v.unflatten(-1, (r, h, -1))
        beta = full_precision(self.in_proj_beta(x)).sigmoid().unflatten(-1, (r, h))
        if self.spec.negative_eigenvalues:
            beta = 2.0 * beta
        if not self.spec.gated:
            return q, k, v, torch.zeros_like(beta).unsqueeze(-1), beta
        dt = F.softplus(full_precision(self.in_proj_a(x)) + full_precision(self.dt_bias))
        g = (-full_precision(self.A_log).exp() * dt).unsqueeze(-2)
        g = torch.cat([g] + [torch.zeros_like(g)] * (r - 1), -2)
        return q, k, v, g.unsqueeze(-1), beta

    def _leave(self, x: Tensor, y: Tensor) -> Tensor:
        gate = F.silu(self.g_proj(x))
        return self.out_proj(self.norm(y).flatten(-2).to(gate.dtype) * gate)

    @torch.no_grad()
    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        """Source: decays and steps as in Yang et al. 2024, arXiv:2412.06464."""
        into = [self.in_proj_q, self.in_proj_k, self.in_proj_v, self.in_proj_beta, self.g_proj]
        for layer in into:
            linear_(layer, generator)
        linear_(self.out_proj, generator, residual_scale(n_layers))
        uniform_(self.conv1d.weight, self.spec.d_conv**-0.5, generator)
        self.norm.reset_parameters()
        if self.spec.gated:
            linear_(self.in_proj_a, generator)
            self.A_log.uniform_(0.01, 16.0, generator=generator).log_()
            self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1), generator=generator)
            self.dt_bias.copy_(softplus_inverse(self.dt_bias.exp()))
