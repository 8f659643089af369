"""Lightning attention: linear attention of positive features whose heads fade at fixed rates.

Symbols: b batch, t time, d d_model, h heads, n channels of a head.

| here | MiniMax-01 | meaning |
|---|---|---|
| qkv_proj | qkv_proj | queries, keys and values, grouped by head, through SiLU |
| slope (h,) | slope_rate | a head keeps exp(-slope) of itself in a token; smaller deeper down |
| norm, output_gate | | RMSNorm over all heads; a sigmoid gate |

Source: Qin et al. 2024, arXiv:2401.04658; MiniMax 2025, arXiv:2501.08313, section 2.2. Parameters
are named and laid out as in transformers' `MiniMaxLightningAttention`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kizzasi.models.call import Call
from kizzasi.models.cost import Cost, dense, linear
from kizzasi.models.init import linear_, residual_scale
from kizzasi.models.mixer import LayerContext, Mixer, MixerOut, MixerSpec, state_dtype
from kizzasi.models.norm import Norm
from kizzasi.models.ops.linear_attention import (
    LINEAR_ATTENTION,
    linear_attention_flops,
    linear_attention_step,
)
from kizzasi.models.ops.precision import full_precision
from kizzasi.strict import join, register, require


@register
@dataclass(frozen=True)
class LightningSpec(MixerSpec):
    """Lightning attention.

    n_heads: number of heads. head_dim: their width; None means d_model / n_heads.
    norm_eps: of the norm over all heads.
    """

    kind: ClassVar[str] = "lightning"
    n_heads: int
    head_dim: int | None = None
    norm_eps: float = 1e-5

    def check(self, d_model: int, path: str) -> None:
        self.require_positive(path, "n_heads", "norm_eps")
        if self.head_dim is not None:
            self.require_positive(path, "head_dim")
            return
        rule = f"{self.n_heads} does not divide d_model {d_model}; give a divisor, or head_dim"
        require(d_model % self.n_heads == 0, join(path, "n_heads"), rule)

    def width(self, d_model: int) -> int:
        """Channels of a head."""
        return self.head_dim or d_model // self.n_heads

    def build(self, layer: LayerContext) -> Mixer:
        return Lightning(self, layer)

    def cost(self, layer: LayerContext, seq_len: int, batch: int) -> Cost:
        d, h, tokens = layer.d_model, self.n_heads, batch * seq_len
        n = self.width(d)
        return (
            linear(tokens, d, 3 * h * n)
            + linear(tokens, d, h * n)
            + linear(tokens, h * n, d)
            + dense(
                params=h * n,
                flops=linear_attention_flops(batch, seq_len, h, n, n),
                state_bytes=4 * batch * h * n * n,
            )
        )


class LightningState(NamedTuple):
    """memory: (b, h, n, n) indexed [key, value], at least float32."""

    memory: Tensor


class Lightning(Mixer):
    """q, k, v = silu(qkv_proj(x));  y = out_proj(sigmoid(output_gate(x)) * norm(attention)).

    attention[t] = q[t] S[t],  S[t] = exp(-slope) S[t-1] + k[t] v[t]^T,
    slope of head i = 1..h in layer l of L: 2^(-8 i / h) (1 - l / (L - 1 + 1e-5) + 1e-5).
    """

    ops = (LINEAR_ATTENTION,)

    def __init__(self, spec: LightningSpec, layer: LayerContext) -> None:
        super().__init__()
        self.spec, self.n = spec, spec.width(layer.d_model)
        d, inner = layer.d_model, spec.n_heads * self.n
        self.depth = 1 - layer.index / (layer.n_layers - 1 + 1e-5) + 1e-5
        self.qkv_proj = nn.Linear(d, 3 * inner, bias=False)
        self.output_gate = nn.Linear(d, inner, bias=False)
        self.norm = Norm("rms", inner, spec.norm_eps)
        self.out_proj = nn.Linear(inner, d, bias=False)

    def parallel(self, x: Tensor, state: LightningState | None, call: Call) -> MixerOut:
        run = LINEAR_ATTENTION.pick(self.engine, x.device)
        q, k, v = self._streams(x)
        before = None if state is None else state.memory
        y, memory = run(q, k, v, self._decay(q)[None, None], None, before, call.starts)
        return MixerOut(self._leave(x, y), LightningState(memory))

    def recurrent(self, x: Tensor, state: LightningState, call: Call) -> MixerOut:
        q, k, v = self._streams(x)
        y, memory = linear_attention_step(state.memory, q, k, v, self._decay(q))
        return MixerOut(self._leave(x, y), LightningState(memory))

    def fused(self) -> Mapping[str, tuple[int, ...]]:
        return {"qkv_proj.weight": (self.n,) * (3 * self.spec.n_heads)}

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> LightningState:
        shape = batch, self.spec.n_heads, self.n, self.n
        return LightningState(torch.zeros(shape, device=device, dtype=state_dtype(dtype)))

    def _streams(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k and v (..., h, n) of x (..., d)."""
        heads = full_precision(F.silu(self.qkv_proj(x))).unflatten(-1, (self.spec.n_heads, -1))
        return heads.chunk(3, -1)

    def _decay(self, like: Tensor) -> Tensor:
        """(h, 1) log of what a head keeps."""
        h = self.spec.n_heads
        head = torch.arange(1, h + 1, device=like.device, dtype=like.dtype)
        return -self.depth * torch.exp2(-8 / h * head).unsqueeze(-1)

    def _leave(self, x: Tensor, y: Tensor) -> Tensor:
        gate = self.output_gate(x).sigmoid()
        return self.out_proj(gate * self.norm(y.flatten(-2)).to(gate.dtype))

    @torch.no_grad()
    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        linear_(self.qkv_proj, generator)
        linear_(self.output_gate, generator)
        linear_(self.out_proj, generator, residual_scale(n_layers))
        self.norm.reset_parameters()
