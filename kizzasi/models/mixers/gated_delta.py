"""Gated DeltaNet: a matrix memory whose writes correct what they find, and which fades.

Symbols: b batch, t time, d d_model, h value heads, d_k and d_v widths of a key and a value head.

| here | paper | meaning |
|---|---|---|
| in_proj_qkvz | W_q, W_k, W_v, W_g | queries, keys, values and output gates z of every head |
| in_proj_ba | W_beta, W_alpha | inputs of beta and of the decay |
| beta | beta_t | share of the old value that a write removes |
| g | log alpha_t | log of the decay, -exp(A_log) softplus(a + dt_bias) |
| memory (b,h,d_k,d_v) | S_t^T | what the layer remembers |

Source: Yang et al. 2024, arXiv:2412.06464, section 3. Parameters are named and laid out as in
Qwen3-Next's `linear_attn`: the rows of in_proj_qkvz and in_proj_ba are grouped by key head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kizzasi.models.call import Call
from kizzasi.models.cost import Cost, dense, linear
from kizzasi.models.init import linear_, residual_scale, softplus_inverse, uniform_
from kizzasi.models.mixer import (
    LayerContext,
    Mixer,
    MixerOut,
    MixerSpec,
    state_dtype,
)
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

Streams: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # q, k, v, g, beta


@register
@dataclass(frozen=True)
class GatedDeltaSpec(MixerSpec):
    """Gated DeltaNet mixer.

    Args:
        n_heads: value heads; each has a memory.
        n_key_heads: key and query heads, a divisor of n_heads; each serves as many value heads in
            a row. None means n_heads.
        key_head_dim: width of a key; None means d_model / n_heads.
        value_head_dim: width of a value; None means key_head_dim.
        d_conv: length of the causal convolution over queries, keys and values.
        gated: False takes the decay away, which leaves DeltaNet (arXiv:2406.06484).
        negative_eigenvalues: beta in (0, 2) instead of (0, 1), so that a write can turn the sign of
            what it finds (Grazzi et al. 2024, arXiv:2411.12537).
        norm_eps: epsilon of the norm over each head's output.
    """

    kind: ClassVar[str] = "gated_delta"
    n_heads: int
    n_key_heads: int | None = None
    key_head_dim: int | None = None
    value_head_dim: int | None = None
    d_conv: int = 4
    gated: bool = True
    negative_eigenvalues: bool = False
    norm_eps: float = 1e-6

    def check(self, d_model: int, path: str) -> None:
        self.require_positive(path, "n_heads", "d_conv", "norm_eps")
        for name in ("n_key_heads", "key_head_dim", "value_head_dim"):
            if getattr(self, name) is not None:
                self.require_positive(path, name)
        require(
            self.key_head_dim is not None or d_model % self.n_heads == 0,
            join(path, "n_heads"),
            f"d_model {d_model} is not divisible by {self.n_heads} heads; "
            "give a divisor of d_model, or key_head_dim",
        )
        require(
            self.n_heads % self.key_heads == 0,
            join(path, "n_key_heads"),
            f"{self.key_heads} does not divide n_heads {self.n_heads}; give a divisor",
        )

    @property
    def key_heads(self) -> int:
        return self.n_key_heads or self.n_heads

    def widths(self, d_model: int) -> tuple[int, int]:
        """d_k and d_v."""
        d_k = self.key_head_dim or d_model // self.n_heads
        return d_k, self.value_head_dim or d_k

    def build(self, layer: LayerContext) -> Mixer:
        return GatedDelta(self, layer)

    def cost(self, layer: LayerContext, seq_len: int, batch: int) -> Cost:
        d, h, tokens = layer.d_model, self.n_heads, batch * seq_len
        d_k, d_v = self.widths(d)
        keys, values = self.key_heads * d_k, h * d_v
        convolved = 2 * keys + values
        return (
            linear(tokens, d, convolved + values)
            + linear(tokens, d, h * (1 + self.gated))
            + linear(tokens, values, d)
            + dense(
                params=convolved * self.d_conv + 2 * h * self.gated + d_v,
                flops=delta_rule_flops(batch, seq_len, h, d_k, d_v, per_channel=False),
                state_bytes=4 * batch * (convolved * (self.d_conv - 1) + h * d_k * d_v),
            )
        )


class GatedDeltaState(NamedTuple):
    """conv: (b, q k v channels, d_conv - 1) last inputs. memory: (b, h, d_k, d_v), >= float32."""

    conv: Tensor
    memory: Tensor


class GatedDelta(Mixer):
    """q, k, v = silu(conv(.));  y = out_proj(norm(delta_rule(...)) * silu(z)).

    Keys have length 1, queries d_k^-0.5.

    Differs: with gated=False, in_proj_ba makes b alone; DeltaNet as published has no z.
    """

    ops = (CAUSAL_CONV1D, DELTA_RULE)
    float32_parameters = ("A_log", "dt_bias")

    def __init__(self, spec: GatedDeltaSpec, layer: LayerContext) -> None:
        super().__init__()
        self.spec = spec
        d, h = layer.d_model, spec.n_heads
        self.d_k, self.d_v = d_k, d_v = spec.widths(d)
        self.keys, self.values = spec.key_heads * d_k, h * d_v
        convolved = 2 * self.keys + self.values
        self.in_proj_qkvz = nn.Linear(d, convolved + self.values, bias=False)
        self.in_proj_ba = nn.Linear(d, h * (1 + spec.gated), bias=False)
        self.conv1d = CausalConv(convolved, convolved, spec.d_conv, groups=convolved, bias=False)
        if spec.gated:
            self.A_log = nn.Parameter(torch.empty(h))
            self.dt_bias = nn.Parameter(torch.empty(h))
        self.norm = Norm("rms", d_v, spec.norm_eps)
        self.out_proj = nn.Linear(self.values, d, bias=False)

    def parallel(self, x: Tensor, state: GatedDeltaState | None, call: Call) -> MixerOut:
        run = DELTA_RULE.pick(self.engine, x.device)
        conv_state, memory = (None, None) if state is None else state
        qkv, ba, z = self._project(x)
        qkv, conv_state = self._convolve(qkv, conv_state, call)
        streams = self._streams(qkv, ba)
        y, memory = run(*streams, memory, call.starts)
        return MixerOut(self._finish(y, z), GatedDeltaState(conv_state, memory))

    def recurrent(self, x: Tensor, state: GatedDeltaState, call: Call) -> MixerOut:
        qkv, ba, z = self._project(x)
        qkv, conv_state = self._convolve(qkv, state.conv, call)
        streams = self._streams(qkv, ba)
        y, memory = delta_rule_step(state.memory, *streams)
        return MixerOut(self._finish(y, z), GatedDeltaState(conv_state, memory))

    def fused(self) -> Mapping[str, tuple[int, ...]]:
        h = self.spec.key_heads
        head = self.d_k, self.d_k, self.values // h, self.values // h
        return {"in_proj_qkvz.weight": head * h}

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> GatedDeltaState:
        conv = (batch, 2 * self.keys + self.values, self.spec.d_conv - 1)
        memory = (batch, self.spec.n_heads, self.d_k, self.d_v)
        return GatedDeltaState(
            torch.zeros(conv, device=device, dtype=dtype),
            torch.zeros(memory, device=device, dtype=state_dtype(dtype)),
        )

    def _convolve(self, qkv: Tensor, state: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        k, engine = self.spec.d_conv, self.engine
        return convolve(self.conv1d, k, qkv, state, call, silu=True, engine=engine)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The convolution's input (all q, all k, all v), b and a by key head, and the gate."""
        n = self.spec.key_heads
        grouped = self.in_proj_qkvz(x).unflatten(-1, (n, -1))
        q, k, v, z = grouped.split([self.d_k, self.d_k, *[self.values // n] * 2], -1)
        qkv = torch.cat([part.flatten(-2) for part in (q, k, v)], -1)
        return qkv, self.in_proj_ba(x).unflatten(-1, (n, -1)), z.flatten(-2)

    def _streams(self, qkv: Tensor, ba: Tensor) -> Streams:
        """Inputs of `delta_rule`."""
        n, h = self.spec.key_heads, self.spec.n_heads
        ba = full_precision(ba)
        q, k, v = qkv.split([self.keys, self.keys, self.values], -1)
        q, k = (l2_normalise(x.unflatten(-1, (n, -1))) for x in (q, k))
        q, k = (x.repeat_interleave(h // n, -2) for x in (q, k))  # one key head to its value heads
        q, v = q * self.d_k**-0.5, v.unflatten(-1, (h, -1))
        beta = ba[..., : h // n].flatten(-2).sigmoid()
        if self.spec.gated:
            dt = F.softplus(ba[..., h // n :].flatten(-2) + full_precision(self.dt_bias))
            g = -full_precision(self.A_log).exp() * dt
        else:
            g = torch.zeros_like(beta)
        if self.spec.negative_eigenvalues:
            beta = 2.0 * beta
        return q, k, v, g.unsqueeze(-1), beta

    def _finish(self, y: Tensor, z: Tensor) -> Tensor:
        y = self.norm(y).flatten(-2) * F.silu(full_precision(z))
        return self.out_proj(y.to(z.dtype))

    @torch.no_grad()
    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        """Decay rates exp(A_log) uniform in (0, 16], steps log-uniform in [1e-3, 1e-1].

        Source: NVlabs/GatedDeltaNet, lit_gpt/gated_delta_net.py.
        Differs: the smallest decay rate is 0.01, as in Qwen3-Next, so that A_log is finite.
        """
        linear_(self.in_proj_qkvz, generator)
        linear_(self.in_proj_ba, generator)
        linear_(self.out_proj, generator, residual_scale(n_layers))
        uniform_(self.conv1d.weight, self.spec.d_conv**-0.5, generator)
        self.norm.reset_parameters()
        if self.spec.gated:
            self.A_log.uniform_(0.01, 16.0, generator=generator).log_()
            self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1), generator=generator)
            self.dt_bias.copy_(softplus_inverse(self.dt_bias.exp()))
