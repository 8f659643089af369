"""Gated linear attention: linear attention whose every key channel forgets as the data says.

Symbols: b batch, t time, d d_model, h heads, n key channels of a head, m value channels of a head.

| here | paper | meaning |
|---|---|---|
| q_proj, k_proj, v_proj | W_Q, W_K, W_V | queries, keys, values |
| gk_proj | W_alpha^1, W_alpha^2, b_alpha | decay: log alpha = logsigmoid(gk_proj(x)) / tau |
| gate_normalizer | tau | how much slower than a sigmoid the memory fades |
| g_proj, o_proj | W_r, W_O | output gate, swish(W_r x); output |
| g_norm (m) | LayerNorm | normalises every head's output, one weight for all heads |

Source: Yang et al. 2023, arXiv:2312.06635, section 4; parameters are named as in
flash-linear-attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kizzasi.models.call import Call
from kizzasi.models.cost import Cost, dense, linear
from kizzasi.models.init import uniform_
from kizzasi.models.mixer import (
    LayerContext,
    Mixer,
    MixerOut,
    MixerSpec,
    state_dtype,
)
from kizzasi.models.norm import Norm, WideLinear
from kizzasi.models.ops.linear_attention import (
    LINEAR_ATTENTION,
    linear_attention_flops,
    linear_attention_step,
)
from kizzasi.strict import join, register, require


@register
@dataclass(frozen=True)
class GLASpec(MixerSpec):
    """Gated linear attention.

    Args:
        n_heads: divides the widths of all keys and of all values.
        expand_k, expand_v: width of all keys and of all values / d_model.
        gate_rank: inner width of the map to decays.
        gate_normalizer: what the logarithm of a gate is divided by.
        norm_eps: of the norm of every head's output.
    """

    kind: ClassVar[str] = "gla"
    n_heads: int
    expand_k: float = 0.5
    expand_v: float = 1.0
    gate_rank: int = 16
    gate_normalizer: float = 16.0
    norm_eps: float = 1e-5

    def check(self, d_model: int, path: str) -> None:
        self.require_positive(path, "n_heads", "gate_rank", "gate_normalizer", "norm_eps")
        for name in ("expand_k", "expand_v"):
            width = getattr(self, name) * d_model / self.n_heads
            rule = f"{getattr(self, name)} times d_model {d_model} over {self.n_heads} heads is "
            rule += f"{width:g}, not a whole number >= 1"
            require(width >= 1 and width == round(width), join(path, name), rule)

    def head_widths(self, d_model: int) -> tuple[int, int]:
        """Channels of a key and of a value."""
        h = self.n_heads
        return round(self.expand_k * d_model / h), round(self.expand_v * d_model / h)

    def build(self, layer: LayerContext) -> Mixer:
        return GLA(self, layer)

    def cost(self, layer: LayerContext, seq_len: int, batch: int) -> Cost:
        d, h, tokens = layer.d_model, self.n_heads, batch * seq_len
        n, m = self.head_widths(d)
        total = dense(
            params=m,
            flops=linear_attention_flops(batch, seq_len, h, n, m),
            state_bytes=4 * batch * h * n * m,
        )
        for _ in range(2):
            total += linear(tokens, d, h * n) + linear(tokens, d, h * m)
        total += linear(tokens, d, self.gate_rank)
        total += linear(tokens, self.gate_rank, h * n, bias=True)
        return total + linear(tokens, h * m, d)


class GLAState(NamedTuple):
    """memory: (b, h, n, m), at least float32."""

    memory: Tensor


class GLA(Mixer):
    """y = W_o (swish(W_g x) norm(gla(W_q x / sqrt(n), W_k x, W_v x, decay)))."""

    ops = (LINEAR_ATTENTION,)
    float32_parameters = ("gk_proj.1.weight", "gk_proj.1.bias")

    def __init__(self, spec: GLASpec, layer: LayerContext) -> None:
        super().__init__()
        self.spec = spec
        d, h, rank = layer.d_model, spec.n_heads, spec.gate_rank
        self.n, self.m = spec.head_widths(d)
        self.q_proj = nn.Linear(d, h * self.n, bias=False)
        self.k_proj = nn.Linear(d, h * self.n, bias=False)
        self.v_proj = nn.Linear(d, h * self.m, bias=False)
        self.gk_proj = nn.Sequential(nn.Linear(d, rank, bias=False), WideLinear(rank, h * self.n))
        self.g_proj = nn.Linear(d, h * self.m, bias=False)
        self.g_norm = Norm("rms", self.m, spec.norm_eps)
        self.o_proj = nn.Linear(h * self.m, d, bias=False)

    def parallel(self, x: Tensor, state: GLAState | None, call: Call) -> MixerOut:
        run = LINEAR_ATTENTION.pick(self.engine, x.device)
        streams = self._project(x)
        y, memory = run(*streams, None, None if state is None else state.memory, call.starts)
        return MixerOut(self._finish(x, y), GLAState(memory))

    def recurrent(self, x: Tensor, state: GLAState, call: Call) -> MixerOut:
        streams = self._project(x)
        y, memory = linear_attention_step(state.memory, *streams)
        return MixerOut(self._finish(x, y), GLAState(memory))

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> GLAState:
        shape = (batch, self.spec.n_heads, self.n, self.m)
        return GLAState(torch.zeros(shape, device=device, dtype=state_dtype(dtype)))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """From (..., d) to q, k (..., h, n), v (..., h, m) and the log decay (..., h, n)."""
        decay = F.logsigmoid(self.gk_proj(x)) / self.spec.gate_normalizer
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v, decay = (s.unflatten(-1, (self.spec.n_heads, -1)) for s in (q, k, v, decay))
        return q * self.n**-0.5, k, v, decay

    def _finish(self, x: Tensor, y: Tensor) -> Tensor:
        gate = F.silu(self.g_proj(x))
        return self.o_proj(self.g_norm(y).flatten(-2).to(gate.dtype) * gate)

    @torch.no_grad()
    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        """Source: the gains of the authors' code, berlino/gated_linear_attention."""
        enter, leave, bias = self.gk_proj.parameters()
        into = (self.q_proj, self.k_proj, self.v_proj, self.g_proj)
        for weight in (*(layer.weight for layer in into), enter, leave):
            nn.init.xavier_uniform_(weight, 2**-2.5, generator)
        uniform_(bias, self.spec.gate_rank**-0.5, generator)
        nn.init.xavier_uniform_(self.o_proj.weight, 2**-1, generator)
        self.g_norm.reset_parameters()
