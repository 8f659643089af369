"""Retention: linear attention whose heads forget at fixed rates, with rotated queries and keys.

Symbols: b batch, t time, d d_model, h heads, n key channels of a head, m value channels of a head.

| here | paper | meaning |
|---|---|---|
| q_proj, k_proj, v_proj | W_Q, W_K, W_V | queries, keys, values; m = expand_v n |
| gamma (h) | gamma | what head i keeps per token: 1 - 2^(-5 - i) |
| rotation by position | Theta | rotary angles; with gamma they make xPos |
| g_proj, o_proj | W_G, W_O | output gate, swish(W_G x); output |
| g_norm | GroupNorm_h | normalises every head's output |

Source: Sun et al. 2023, arXiv:2307.08621, section 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kizzasi.models.attention.rope_scaling import Rotary
from kizzasi.models.call import Call
from kizzasi.models.cost import Cost, dense, linear
from kizzasi.models.mixer import (
    LayerContext,
    Mixer,
    MixerOut,
    MixerSpec,
    state_dtype,
)
from kizzasi.models.norm import HeadNorm
from kizzasi.models.ops.linear_attention import (
    LINEAR_ATTENTION,
    linear_attention_flops,
    linear_attention_step,
)
from kizzasi.models.ops.precision import without_autocast
from kizzasi.models.ops.rope import rope_frequencies, rope_tables, rotate
from kizzasi.strict import join, register, require


@register
@dataclass(frozen=True)
class RetentionSpec(MixerSpec):
    """Multi-scale retention.

    Args:
        n_heads: divides d_model into heads of an even width.
        expand_v: width of all values / d_model.
        rope_theta: base of the rotary frequencies.
        norm_eps: of the norm of every head's output.
    """

    kind: ClassVar[str] = "retention"
    n_heads: int
    expand_v: float = 2.0
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def check(self, d_model: int, path: str) -> None:
        self.require_positive(path, "n_heads", "norm_eps")
        rule = f"{self.n_heads} heads of d_model {d_model} have no even width; give another number"
        require(d_model % (2 * self.n_heads) == 0, join(path, "n_heads"), rule)
        width = self.expand_v * d_model / self.n_heads
        rule = f"{self.expand_v} gives heads {width:g} values wide; make that a whole number >= 1"
        require(width >= 1 and width == round(width), join(path, "expand_v"), rule)
        require(self.rope_theta > 1, join(path, "rope_theta"), f"{self.rope_theta} is not above 1")

    def head_widths(self, d_model: int) -> tuple[int, int]:
        """Channels of a key and of a value."""
        return d_model // self.n_heads, round(self.expand_v * d_model / self.n_heads)

    def build(self, layer: LayerContext) -> Mixer:
        return Retention(self, layer)

    def cost(self, layer: LayerContext, seq_len: int, batch: int) -> Cost:
        d, h, tokens = layer.d_model, self.n_heads, batch * seq_len
        n, m = self.head_widths(d)
        total = dense(
            params=2 * h * m,
            flops=linear_attention_flops(batch, seq_len, h, n, m),
            state_bytes=4 * batch * h * n * m,
        )
        for _ in range(2):
            total += linear(tokens, d, d) + linear(tokens, d, h * m)
        return total + linear(tokens, h * m, d)


class RetentionState(NamedTuple):
    """memory: (b, h, n, m), at least float32, its keys turned as the next token sees them."""

    memory: Tensor


class Retention(Mixer):
    """y = W_o (swish(W_g x) norm(retention(rotate(W_q x), rotate(W_k x) / sqrt(n), W_v x))).

    Differs: the norm makes the paper's three scalings of scores superfluous; only 1 / sqrt(n) is
    kept. Entries (i, i + n / 2) are rotated together, and the slowest has Llama's frequency. Only
    distances count, so places are counted from each call's first token, and the memory is turned.
    """

    ops = (LINEAR_ATTENTION,)

    def __init__(self, spec: RetentionSpec, layer: LayerContext) -> None:
        super().__init__()
        self.spec = spec
        d = layer.d_model
        self.rotary = Rotary(d // spec.n_heads, spec.rope_theta, None)
        self.n, self.m = spec.head_widths(d)
        values = spec.n_heads * self.m
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, d, bias=False)
        self.v_proj = nn.Linear(d, values, bias=False)
        self.g_proj = nn.Linear(d, values, bias=False)
        self.g_norm = HeadNorm(values, spec.norm_eps)
        self.o_proj = nn.Linear(values, d, bias=False)

    def parallel(self, x: Tensor, state: RetentionState | None, call: Call) -> MixerOut:
        q, k, v = self._project(x, call)
        run = LINEAR_ATTENTION.pick(self.engine, x.device)
        before = None if state is None else state.memory
        with without_autocast(x):
            y, memory = run(q, k, v, self._decay(q)[None, None], None, before, call.starts)
            memory = self._turn_back(memory, x.shape[1])
        return MixerOut(self._finish(x, y), RetentionState(memory))

    def recurrent(self, x: Tensor, state: RetentionState, call: Call) -> MixerOut:
        q, k, v = (s.squeeze(1) for s in self._project(x.unsqueeze(1), call))
        with without_autocast(x):
            y, memory = linear_attention_step(state.memory, q, k, v, self._decay(q))
            memory = self._turn_back(memory, 1)
        return MixerOut(self._finish(x, y), RetentionState(memory))

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> RetentionState:
        shape = (batch, self.spec.n_heads, self.n, self.m)
        return RetentionState(torch.zeros(shape, device=device, dtype=state_dtype(dtype)))

    def _project(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """From x (b, t, d) to q, k (b, t, h, n), rotated, and v (b, t, h, m)."""
        heads = (self.spec.n_heads, -1)
        q, k, v = (
            project(x).unflatten(-1, heads) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        time = torch.arange(call.shape[1], device=x.device)[None]
        tables = self.rotary.tables(call, "from the call's first token", time, state_dtype(x.dtype))
        cos, sin = (table.transpose(1, 2) for table in tables)
        return rotate(q, cos, sin), rotate(k, cos, sin) * self.n**-0.5, v

    def _turn_back(self, memory: Tensor, t: int) -> Tensor:
        """The memory (b, h, n, m) after t tokens, as the next one sees it from place 0."""
        frequencies = rope_frequencies(
            self.n, self.spec.rope_theta, device=memory.device, dtype=memory.dtype
        )
        place = torch.full((1, 1), -t, device=memory.device)
        return rotate(memory.mT, *rope_tables(place, frequencies).unbind()).mT

    def _decay(self, like: Tensor) -> Tensor:
        """(h, 1) log gamma."""
        head = torch.arange(self.spec.n_heads, device=like.device, dtype=state_dtype(like.dtype))
        return torch.log1p(-torch.exp2(-5 - head)).unsqueeze(-1)

    def _finish(self, x: Tensor, y: Tensor) -> Tensor:
        gate = F.silu(self.g_proj(x))
        return self.o_proj(self.g_norm(y).flatten(-2).to(gate.dtype) * gate)

    @torch.no_grad()
    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        """Source: the gains of microsoft/torchscale."""
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.g_proj):
            nn.init.xavier_uniform_(layer.weight, 2**-2.5, generator)
        nn.init.xavier_uniform_(self.o_proj.weight, 2**-1, generator)
        self.g_norm.reset_parameters()
