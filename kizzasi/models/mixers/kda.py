"""Kimi delta attention: gated DeltaNet with a decay for every channel of a key.

Symbols: b batch, t time, d d_model, h heads, n head_dim.

| here | paper | meaning |
|---|---|---|
| q_proj, q_conv1d, .. | W_q, CausalConv | queries, keys and values: silu(conv(W x)) |
| f_a_proj, f_b_proj | W_alpha down, up | low-rank input of the decay |
| g | log alpha_t | log of the decay, -exp(A_log) softplus(f_b_proj(f_a_proj(x)) + dt_bias) |
| b_proj | W_beta | beta = sigmoid(b_proj(x)), share of the old value that a write removes |
| g_a_proj, g_b_proj | W_g down, up | low-rank output gate |
| memory (b,h,n,n) | S_t | what the layer remembers, indexed [key, value] |

Source: Kimi Team 2025, arXiv:2510.26692, section 4. Parameters are named as in Kimi-Linear-48B-A3B.
"""

from __future__ import annotations

import math
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
class KDASpec(MixerSpec):
    """Kimi delta attention.

    Args:
        n_heads: heads, of keys and values alike.
        head_dim: width of a head, and inner width of the low-rank maps; None means d_model /
            n_heads.
        d_conv: length of the causal convolutions over queries, keys and values.
        norm_eps: epsilon of the norm over each head's output.
    """

    kind: ClassVar[str] = "kda"
    n_heads: int
    head_dim: int | None = None
    d_conv: int = 4
    norm_eps: float = 1e-5

    def check(self, d_model: int, path: str) -> None:
        self.require_positive(path, "n_heads", "d_conv", "norm_eps")
        if self.head_dim is not None:
            self.require_positive(path, "head_dim")
        require(
            self.head_dim is not None or d_model % self.n_heads == 0,
            join(path, "n_heads"),
            f"d_model {d_model} is not divisible by {self.n_heads} heads; "
            "give a divisor of d_model, or head_dim",
        )

    def width(self, d_model: int) -> int:
        """Of a head."""
        return self.head_dim or d_model // self.n_heads

    def build(self, layer: LayerContext) -> Mixer:
        return KDA(self, layer)

    def cost(self, layer: LayerContext, seq_len: int, batch: int) -> Cost:
        d, h, k, tokens = layer.d_model, self.n_heads, self.d_conv, batch * seq_len
        n = self.width(d)
        total = linear(tokens, d, h) + dense(
            params=3 * h * n * k + h * n + h + n,
            flops=delta_rule_flops(batch, seq_len, h, n, n, per_channel=n > 1),
            state_bytes=4 * batch * (3 * h * n * (k - 1) + h * n * n),
        )
        for _ in range(4):  # q, k, v, o
            total += linear(tokens, d, h * n)
        for _ in range(2):  # f, g
            total += linear(tokens, d, n) + linear(tokens, n, h * n)
        return total


class KDAState(NamedTuple):
    """conv: (b, q k v channels, d_conv - 1) last inputs. memory: (b, h, n, n), >= float32."""

    conv: Tensor
    memory: Tensor


class KDA(Mixer):
    """q, k, v = silu(conv(.));  y = o_proj(o_norm(delta_rule(...)) * sigmoid(gate)).

    Keys have length 1, queries n^-0.5. The three convolutions keep their state as one.
    """

    ops = (CAUSAL_CONV1D, DELTA_RULE)
    float32_parameters = ("A_log", "dt_bias")

    def __init__(self, spec: KDASpec, layer: LayerContext) -> None:
        super().__init__()
        self.spec = spec
        d, h = layer.d_model, spec.n_heads
        self.head_dim = n = spec.width(d)

        self.q_proj = nn.Linear(d, h * n, bias=False)
        self.k_proj = nn.Linear(d, h * n, bias=False)
        self.v_proj = nn.Linear(d, h * n, bias=False)
        self.q_conv1d, self.k_conv1d, self.v_conv1d = (
            CausalConv(h * n, h * n, spec.d_conv, groups=h * n, bias=False) for _ in range(3)
        )
        self.f_a_proj = nn.Linear(d, n, bias=False)
        self.f_b_proj = nn.Linear(n, h * n, bias=False)
        self.A_log = nn.Parameter(torch.empty(h))
        self.dt_bias = nn.Parameter(torch.empty(h * n))
        self.b_proj = nn.Linear(d, h, bias=False)
        self.g_a_proj = nn.Linear(d, n, bias=False)
        self.g_b_proj = nn.Linear(n, h * n, bias=False)
        self.o_norm = Norm("rms", n, spec.norm_eps)
        self.o_proj = nn.Linear(h * n, d, bias=False)

    def parallel(self, x: Tensor, state: KDAState | None, call: Call) -> MixerOut:
        run = DELTA_RULE.pick(self.engine, x.device)
        conv_state, memory = (None, None) if state is None else state
        q, k, v, conv_state = self._convolve(x, conv_state, call)
        streams = self._streams(x, q, k, v)
        y, memory = run(*streams, memory, call.starts)
        return MixerOut(self._finish(x, y), KDAState(conv_state, memory))

    def recurrent(self, x: Tensor, state: KDAState, call: Call) -> MixerOut:
        q, k, v, conv_state = self._convolve(x, state.conv, call)
        streams = self._streams(x, q, k, v)
        y, memory = delta_rule_step(state.memory, *streams)
        return MixerOut(self._finish(x, y), KDAState(conv_state, memory))

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> KDAState:
        h, n, k = self.spec.n_heads, self.head_dim, self.spec.d_conv
        return KDAState(
            torch.zeros(batch, 3 * h * n, k - 1, device=device, dtype=dtype),
            torch.zeros(batch, h, n, n, device=device, dtype=state_dtype(dtype)),
        )

    def _convolve(
        self, x: Tensor, state: Tensor | None, call: Call
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k and v (..., h n) after their convolutions, whose states are one tensor."""
        engine, length = self.engine, self.spec.d_conv
        before = (None,) * 3 if state is None else state.chunk(3, 1)
        done = [
            convolve(conv, length, project(x), one, call, silu=True, engine=engine)
            for project, conv, one in zip(
                (self.q_proj, self.k_proj, self.v_proj),
                (self.q_conv1d, self.k_conv1d, self.v_conv1d),
                before,
                strict=True,
            )
        ]
        (q, _), (k, _), (v, _) = done
        return q, k, v, torch.cat([after for _, after in done], 1)

    def _streams(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Streams:
        """Inputs of `delta_rule`."""
        heads = (self.spec.n_heads, self.head_dim)
        q, k, v = (part.unflatten(-1, heads) for part in (q, k, v))
        q, k = l2_normalise(q) * self.head_dim**-0.5, l2_normalise(k)
        dt = F.softplus(
            full_precision(self.f_b_proj(self.f_a_proj(x))) + full_precision(self.dt_bias)
        )
        g = -full_precision(self.A_log).exp().unsqueeze(-1) * dt.unflatten(-1, heads)
        return q, k, v, g, full_precision(self.b_proj(x)).sigmoid()

    def _finish(self, x: Tensor, y: Tensor) -> Tensor:
        gate = self.g_b_proj(self.g_a_proj(x))
        y = self.o_norm(y).flatten(-2) * full_precision(gate).sigmoid()
        return self.o_proj(y.to(gate.dtype))

    @torch.no_grad()
    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        """Decay rates exp(A_log) uniform in [1, 16], steps log-uniform in [1e-3, 1e-1].

        Source: huggingface/transformers, models/kimi_linear/modeling_kimi_linear.py.
        """
        for name, layer in self.named_children():
            if name == "o_norm":
                self.o_norm.reset_parameters()
            elif name == "o_proj":
                linear_(self.o_proj, generator, residual_scale(n_layers))
            elif isinstance(layer, nn.Linear):
                linear_(layer, generator)
            elif isinstance(layer, nn.Conv1d):
                uniform_(layer.weight, self.spec.d_conv**-0.5, generator)
        self.A_log.uniform_(1.0, 16.0, generator=generator).log_()
        self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1), generator=generator)
        self.dt_bias.copy_(softplus_inverse(self.dt_bias.exp()))
