"""Kimi delta attention: gated DeltaNet with a decay for every channel of a key.

Symbols: b batch, t time, d d_model, h key heads, n head_dim, v value heads, m width of a value.

| here | paper | meaning |
|---|---|---|
| q_proj, q_conv1d, .. | W_q, CausalConv | queries, keys and values: silu(conv(W x)) |
| f_a_proj, f_b_proj | W_alpha down, up | low-rank input of the decay |
| g | log alpha_t | log of the decay, -exp(A_log) softplus(f_b_proj(f_a_proj(x)) + dt_bias) |
| b_proj | W_beta | beta = sigmoid(b_proj(x)), share of the old value that a write removes |
| g_a_proj, g_b_proj | W_g down, up | low-rank output gate |
| memory (b,v,n,m) | S_t | what the layer remembers, indexed [key, value] |

Source: Kimi Team 2025, arXiv:2510.26692, section 4. Parameters are named as in Kimi-Linear-48B-A3B.
Value heads, width of values, convolutions, gate_floor: flash-linear-attention's layer. Channel
gates: Gated DeltaNet-2, Hatamizadeh et al. 2026, arXiv:2605.22791. Negative eigenvalues: Grazzi et
al. 2024, arXiv:2411.12537.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
    DELTA_RULE_2,
    delta_rule_2_step,
    delta_rule_flops,
    delta_rule_step,
    l2_normalise,
)
from kizzasi.models.ops.precision import full_precision
from kizzasi.models.parts.causal_conv import CausalConv, convolve
from kizzasi.strict import added, join, register, require

Streams: TypeAlias = tuple[Tensor, ...]  # q, k, v, g, and beta or both channel gates


@register
@dataclass(frozen=True)
class KDASpec(MixerSpec):
    """Kimi delta attention.

    Args:
        n_heads: heads of queries and keys.
        head_dim: width of a key; None means d_model / n_heads.
        d_conv: length of the causal convolutions over queries, keys and values.
        norm_eps: epsilon of the norm over each head's output.
        n_value_heads: heads of values, each with a memory: a multiple of n_heads, so many in a row
            for each head of keys with its decays and gates. None means n_heads.
        expand_v: width of a value, and inner width of the low-rank maps, over that of a key.
        conv: False takes the convolutions away: silu of the projections is left.
        conv_bias: biases of the convolutions.
        gate_bias: bias of g_b_proj.
        negative_eigenvalues: what a write removes is doubled, beta in (0, 2), so that it can turn
            the sign of what it finds.
        gate_floor: bound of the log of a decay, in [-5, 0): g = gate_floor sigmoid(exp(A_log) (f +
            dt_bias)); None: g = -exp(A_log) softplus(f + dt_bias), which has none.
        channel_gates: in place of beta a gate for every channel of a key, which says what is
            removed, and one for every channel of a value, w_proj, which says what is written: Gated
            DeltaNet-2.
    """

    kind: ClassVar[str] = "kda"
    n_heads: int
    head_dim: int | None = None
    d_conv: int = 4
    norm_eps: float = 1e-5
    n_value_heads: int | None = added(None)
    expand_v: float = added(1.0)
    conv: bool = added(True)
    conv_bias: bool = added(False)
    gate_bias: bool = added(False)
    negative_eigenvalues: bool = added(False)
    gate_floor: float | None = added(None)
    channel_gates: bool = added(False)

    def check(self, d_model: int, path: str) -> None:
        self.require_positive(path, "n_heads", "d_conv", "norm_eps")
        for name in ("head_dim", "n_value_heads"):
            if getattr(self, name) is not None:
                self.require_positive(path, name)
        require(
            self.head_dim is not None or d_model % self.n_heads == 0,
            join(path, "n_heads"),
            f"d_model {d_model} is not divisible by {self.n_heads} heads; "
            "give a divisor of d_model, or head_dim",
        )
        rule = f"{self.value_heads} is no multiple of n_heads {self.n_heads}; give one"
        require(self.value_heads % self.n_heads == 0, join(path, "n_value_heads"), rule)
        n, m = self.width(d_model), self.expand_v * self.width(d_model)
        whole = m >= 1 and math.isclose(m, round(m), rel_tol=1e-9)
        rule = f"{self.expand_v} times head_dim {n} is {m:g}, not a whole number >= 1"
        require(whole, join(path, "expand_v"), rule)
        rule = "there are no convolutions to give biases to; leave it out"
        require(self.conv or not self.conv_bias, join(path, "conv_bias"), rule)
        floor = self.gate_floor
        rule = f"{floor} is not in [-5, 0); -5 is usual"
        require(floor is None or -5 <= floor < 0, join(path, "gate_floor"), rule)

    def width(self, d_model: int) -> int:
        """Of a key."""
        return self.head_dim or d_model // self.n_heads

    def value_width(self, d_model: int) -> int:
        """Of a value."""
        return round(self.expand_v * self.width(d_model))

    @property
    def value_heads(self) -> int:
        return self.n_value_heads or self.n_heads

    def parts(self, d_model: int) -> tuple[int, int, int]:
        """Channels of queries, keys and values."""
        keys = self.n_heads * self.width(d_model)
        return keys, keys, self.value_heads * self.value_width(d_model)

    def build(self, layer: LayerContext) -> Mixer:
        return KDA(self, layer)

    def cost(self, layer: LayerContext, seq_len: int, batch: int) -> Cost:
        d, h, tokens = layer.d_model, self.value_heads, batch * seq_len
        n, m = self.width(d), self.value_width(d)
        keys, _, values = self.parts(d)
        filters = self.d_conv + self.conv_bias if self.conv else 0
        kept = self.d_conv - 1 if self.conv else 0
        total = dense(
            params=(2 * keys + values) * filters + keys + self.n_heads + m,
            flops=delta_rule_flops(batch, seq_len, h, n, m, per_channel=n > 1),
            state_bytes=4 * batch * ((2 * keys + values) * kept + h * n * m),
        )
        gates = (keys, values) if self.channel_gates else (self.n_heads,)
        for width in (keys, keys, values, *gates):
            total += linear(tokens, d, width)
        total += linear(tokens, values, d)
        total += linear(tokens, d, m) + linear(tokens, m, keys)
        return total + linear(tokens, d, m) + linear(tokens, m, values, bias=self.gate_bias)


class KDAState(NamedTuple):
    """conv: (b, q k v channels, d_conv - 1) last inputs, () without convolutions. memory: (b, v, n,
    m), >= float32."""

    conv: Tensor | tuple[()]
    memory: Tensor


class KDA(Mixer):
    """q, k, v = silu(conv(.));  y = o_proj(o_norm(delta_rule(...)) * sigmoid(gate)).

    Keys have length 1, queries n^-0.5. The three convolutions keep their state as one.
    """

    ops = (CAUSAL_CONV1D, DELTA_RULE, DELTA_RULE_2)
    float32_parameters = ("A_log", "dt_bias")

    def __init__(self, spec: KDASpec, layer: LayerContext) -> None:
        super().__init__()
        self.spec = spec
        d, h = layer.d_model, spec.n_heads
        self.head_dim, self.value_dim = _, m = spec.width(d), spec.value_width(d)
        self.widths = keys, _, values = spec.parts(d)

        self.q_proj = nn.Linear(d, keys, bias=False)
        self.k_proj = nn.Linear(d, keys, bias=False)
        self.v_proj = nn.Linear(d, values, bias=False)
        if spec.conv:
            self.q_conv1d, self.k_conv1d, self.v_conv1d = (
                CausalConv(width, width, spec.d_conv, groups=width, bias=spec.conv_bias)
                for width in self.widths
            )
        self.f_a_proj = nn.Linear(d, m, bias=False)
        self.f_b_proj = nn.Linear(m, keys, bias=False)
        self.A_log = nn.Parameter(torch.empty(h))
        self.dt_bias = nn.Parameter(torch.empty(keys))
        self.b_proj = nn.Linear(d, keys if spec.channel_gates else h, bias=False)
        self.w_proj = nn.Linear(d, values, bias=False) if spec.channel_gates else None
        self.g_a_proj = nn.Linear(d, m, bias=False)
        self.g_b_proj = nn.Linear(m, values, bias=spec.gate_bias)
        self.o_norm = Norm("rms", m, spec.norm_eps)
        self.o_proj = nn.Linear(values, d, bias=False)

    def parallel(self, x: Tensor, state: KDAState | None, call: Call) -> MixerOut:
        op = DELTA_RULE if self.w_proj is None else DELTA_RULE_2
        run: Callable[..., tuple[Tensor, Tensor]] = op.pick(self.engine, x.device)
        conv_state, memory = (None, None) if state is None else state
        q, k, v, conv_state = self._convolve(x, conv_state, call)
        y, memory = run(*self._streams(x, q, k, v), memory, call.starts)
        return MixerOut(self._finish(x, y), KDAState(conv_state, memory))

    def recurrent(self, x: Tensor, state: KDAState, call: Call) -> MixerOut:
        step = delta_rule_step if self.w_proj is None else delta_rule_2_step
        q, k, v, conv_state = self._convolve(x, state.conv, call)
        y, memory = step(state.memory, *self._streams(x, q, k, v))
        return MixerOut(self._finish(x, y), KDAState(conv_state, memory))

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> KDAState:
        h, n, m = self.spec.value_heads, self.head_dim, self.value_dim
        memory = torch.zeros(batch, h, n, m, device=device, dtype=state_dtype(dtype))
        if not self.spec.conv:
            return KDAState((), memory)
        shape = batch, sum(self.widths), self.spec.d_conv - 1
        return KDAState(torch.zeros(shape, device=device, dtype=dtype), memory)

    def _convolve(
        self, x: Tensor, state: Tensor | tuple[()] | None, call: Call
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | tuple[()]]:
        """q, k and v (..., channels) after their convolutions, whose states are one tensor."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if not self.spec.conv:
            return F.silu(q), F.silu(k), F.silu(v), ()
        engine, length = self.engine, self.spec.d_conv
        before = state.split(self.widths, 1) if isinstance(state, Tensor) else (None,) * 3
        convs = self.q_conv1d, self.k_conv1d, self.v_conv1d
        done = [
            convolve(conv, length, part, one, call, silu=True, engine=engine)
            for conv, part, one in zip(convs, (q, k, v), before, strict=True)
        ]
        (q, _), (k, _), (v, _) = done
        return q, k, v, torch.cat([after for _, after in done], 1)

    def _streams(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Streams:
        """Inputs of `delta_rule` or `delta_rule_2`, those of keys once for each head of values."""
        spec, heads = self.spec, (self.spec.n_heads, self.head_dim)
        q, k = (part.unflatten(-1, heads) for part in (q, k))
        q, k = l2_normalise(q) * self.head_dim**-0.5, l2_normalise(k)
        f = full_precision(self.f_b_proj(self.f_a_proj(x))) + full_precision(self.dt_bias)
        rate, f = full_precision(self.A_log).exp().unsqueeze(-1), f.unflatten(-1, heads)
        if spec.gate_floor is None:
            g = -rate * F.softplus(f)
        else:
            g = spec.gate_floor * (rate * f).sigmoid()
        beta = full_precision(self.b_proj(x)).sigmoid()
        beta = 2.0 * beta if spec.negative_eigenvalues else beta
        beta = beta.unflatten(-1, (spec.n_heads, -1))
        group = spec.value_heads // spec.n_heads
        if group > 1:
            q, k, g, beta = (part.repeat_interleave(group, -2) for part in (q, k, g, beta))
        v = v.unflatten(-1, (spec.value_heads, -1))
        if self.w_proj is None:
            return q, k, v, g, beta.squeeze(-1)
        write = full_precision(self.w_proj(x)).sigmoid()
        return q, k, v, g, beta, write.unflatten(-1, (spec.value_heads, -1))

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
                for parameter in layer.parameters():
                    uniform_(parameter, self.spec.d_conv**-0.5, generator)
        self.A_log.uniform_(1.0, 16.0, generator=generator).log_()
        self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1), generator=generator)
        self.dt_bias.copy_(softplus_inverse(self.dt_bias.exp()))
