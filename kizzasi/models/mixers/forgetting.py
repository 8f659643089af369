"""Forgetting attention: softmax attention whose scores a gate fades, token by token.

Symbols: b batch, t time, d d_model, h heads, s slots of the cache.

| here | paper | meaning |
|---|---|---|
| q_proj, k_proj, v_proj, o_proj | W_q, W_k, W_v, W_o | as in softmax attention |
| f_proj | w_f, b_f | log f_t = log sigmoid(f_proj(x_t)), one gate a head |
| faded (b,h,s) | D_ij | sum of log f over all tokens after a key |
| g_proj | W_g | output gate, sigmoid |

Source: Lin et al. 2025, arXiv:2503.02130. Grouped queries, window and output gate as in
flash-linear-attention's ForgettingAttention.
Differs: qk_norm has one scale for all heads, as in the paper's own models; the shift of keys and
values of its "Pro" block is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kizzasi.models import init
from kizzasi.models.attention.cache import (
    AttentionState,
    add_slot,
    append,
    empty_cache,
    in_time,
    layout,
    now,
    pack,
    visible,
)
from kizzasi.models.attention.rope_scaling import Rotary
from kizzasi.models.call import Call
from kizzasi.models.cost import Cost, dense, linear, norm
from kizzasi.models.mixer import LayerContext, Mixer, MixerOut, MixerSpec, state_dtype
from kizzasi.models.norm import Norm, WideLinear
from kizzasi.models.ops.attention import ATTENTION
from kizzasi.models.ops.forgetting import FORGETTING_ATTENTION, fading, forgetting_flops
from kizzasi.models.ops.rope import rotate
from kizzasi.models.ops.stencil import Stencil
from kizzasi.strict import join, register, require


@register
@dataclass(frozen=True)
class ForgettingSpec(MixerSpec):
    """Forgetting attention.

    Args:
        n_heads: query heads, each with a forget gate.
        n_kv_heads: key and value heads, a divisor of n_heads; None means n_heads.
        head_dim: width of a head; None means d_model / n_heads.
        window: positions that a query sees, its own included; None means all.
        position: "none", as the gates tell near from far, or "rope".
        rope_theta: base of the rotary frequencies.
        qk_norm: normalise every head's queries and keys.
        gate: multiply the output with a sigmoid of the layer's input.
        qkv_bias: biases of q_proj, k_proj and v_proj.
        norm_eps: epsilon of qk_norm.
    """

    kind: ClassVar[str] = "forgetting"
    n_heads: int
    n_kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    position: Literal["none", "rope"] = "none"
    rope_theta: float = 500000.0
    qk_norm: bool = False
    gate: bool = False
    qkv_bias: bool = False
    norm_eps: float = 1e-6

    def check(self, d_model: int, path: str) -> None:
        self.require_positive(path, "n_heads", "norm_eps")
        for name in ("n_kv_heads", "head_dim", "window"):
            if getattr(self, name) is not None:
                self.require_positive(path, name)
        rule = f"{self.n_heads} does not divide d_model {d_model}; give a divisor, or head_dim"
        fits = self.head_dim is not None or d_model % self.n_heads == 0
        require(fits, join(path, "n_heads"), rule)
        rule = f"{self.kv_heads} does not divide n_heads {self.n_heads}; give a divisor"
        require(self.n_heads % self.kv_heads == 0, join(path, "n_kv_heads"), rule)
        require(self.rope_theta > 1, join(path, "rope_theta"), f"{self.rope_theta} is not above 1")
        rule = f"{self.width(d_model)} entries cannot be rotated in pairs; give an even number"
        even = self.position == "none" or self.width(d_model) % 2 == 0
        require(even, join(path, "head_dim"), rule)

    def build(self, layer: LayerContext) -> Mixer:
        return Forgetting(self, layer)

    def cost(self, layer: LayerContext, seq_len: int, batch: int) -> Cost:
        d, h, n, tokens = layer.d_model, self.n_heads, self.width(layer.d_model), batch * seq_len
        slots = self.window or seq_len
        place = 8 if self.window else 0  # int64
        total = dense(
            0,
            flops=forgetting_flops(batch, seq_len, h, n, self.window),
            state_bytes=batch * slots * (4 * (2 * self.kv_heads * n + h) + place),
        )
        total += linear(tokens, d, h * n, bias=self.qkv_bias) + linear(tokens, h * n, d)
        for _ in "kv":
            total += linear(tokens, d, self.kv_heads * n, bias=self.qkv_bias)
        total += linear(tokens, d, h, bias=True)
        for _ in "qk" if self.qk_norm else "":
            total += norm("rms", n)
        return total + linear(tokens, d, h * n) if self.gate else total

    @property
    def context_window(self) -> float:
        return super().context_window if self.window is None else self.window

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    def width(self, d_model: int) -> int:
        """Entries of one head."""
        return d_model // self.n_heads if self.head_dim is None else self.head_dim


class ForgettingState(NamedTuple):
    """An `AttentionState` with faded (b, h, s, 1), at least float32: what the score of every slot
    has lost up to the last token. It is counted back from there, so that near keys keep their
    digits however long the input is."""

    k: Tensor
    v: Tensor
    faded: Tensor
    position: Tensor

    in_order = AttentionState.in_order
    alive = AttentionState.alive
    positions = AttentionState.positions
    places = AttentionState.places
    next_position = AttentionState.next_position
    n_alive = AttentionState.n_alive

    def packed(self, slots: int) -> ForgettingState:
        """As of `AttentionState`."""
        leaves, position = pack(self[:3], self.positions(), slots)
        return ForgettingState._make((*leaves, position))


class Forgetting(Mixer):
    """y = o_proj(softmax(q k^T / sqrt(n) + faded) v * sigmoid(g_proj(x)))."""

    ops = (ATTENTION, FORGETTING_ATTENTION)

    def __init__(self, spec: ForgettingSpec, layer: LayerContext) -> None:
        super().__init__()
        d, h, h_kv = layer.d_model, spec.n_heads, spec.kv_heads
        self.spec, self.stencil = spec, Stencil(spec.window)
        self.head_dim = n = spec.width(d)
        self.rotary = Rotary(n, spec.rope_theta, None)
        self.q_proj = nn.Linear(d, h * n, bias=spec.qkv_bias)
        self.k_proj = nn.Linear(d, h_kv * n, bias=spec.qkv_bias)
        self.v_proj = nn.Linear(d, h_kv * n, bias=spec.qkv_bias)
        self.f_proj = WideLinear(d, h)
        self.g_proj = nn.Linear(d, h * n, bias=False) if spec.gate else None
        self.o_proj = nn.Linear(h * n, d, bias=False)
        self.q_norm = Norm("rms", n, spec.norm_eps) if spec.qk_norm else None
        self.k_norm = Norm("rms", n, spec.norm_eps) if spec.qk_norm else None

    def parallel(self, x: Tensor, state: ForgettingState | None, call: Call) -> MixerOut:
        before = self._empty(len(x), 0, x.device, x.dtype) if state is None else state
        sight = layout(call, before, self.stencil)
        q, k, v, log_f = self._project(x, sight.position, sight.counted, call)
        past = before.k.to(k.dtype), before.v.to(v.dtype), before.faded
        seen, in_order = visible(call, before, self.stencil), past
        if self.stencil.slots is not None and before.k.shape[2]:
            order, key = in_time(call, before, self.stencil)
            index = order[:, None, :, None]
            in_order = [leaf.gather(2, index.expand_as(leaf)) for leaf in past]
            seen = self.stencil.visible(sight.query, key)
        run = FORGETTING_ATTENTION.pick(self.engine, x.device)
        keys, values = map(append, in_order, (k, v))
        faded = in_order[2].squeeze(-1)
        y = run(q, keys, values, log_f, faded, visible=seen, window=self.spec.window)
        old = past[2] + log_f.sum(-1)[..., None, None]
        leaves = map(append, (past[0], past[1], old), (k, v, fading(log_f).unsqueeze(-1)))
        leaves, position = sight.kept(tuple(leaves), self.stencil)
        return MixerOut(self._leave(x, y), ForgettingState._make((*leaves, position)))

    def recurrent(self, x: Tensor, state: ForgettingState, call: Call) -> MixerOut:
        position, counted = now(call, state, self.stencil)
        q, k, v, log_f = self._project(x[:, None], position, counted, call)
        log_f, position = log_f.unsqueeze(-1), position.expand(len(x), -1)
        past = state.k, state.v, state.faded + log_f
        new = k, v, torch.zeros_like(log_f)
        leaves, position = add_slot(past, new, state.position, position, self.stencil)
        after = ForgettingState._make((*leaves, position))
        attend = ATTENTION.pick(self.engine, x.device)
        y = attend(q, after.k, after.v, visible=after.alive, bias=after.faded.mT)
        return MixerOut(self._leave(x[:, None], y)[:, 0], after)

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> ForgettingState:
        return self._empty(batch, self.stencil.slots or 0, device, dtype)

    def _empty(
        self, batch: int, slots: int, device: torch.device | None, dtype: torch.dtype | None
    ) -> ForgettingState:
        """A cache of dead slots."""
        n, h = self.head_dim, self.spec.n_heads
        k, v, position = empty_cache(batch, self.spec.kv_heads, slots, (n, n), device, dtype)
        faded = torch.zeros(batch, h, slots, 1, device=device, dtype=state_dtype(dtype))
        return ForgettingState(k, v, faded, position)

    def _project(
        self, x: Tensor, position: Tensor, counted: str, call: Call
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values (b, heads, t, n), normalised and rotated; log f (b, h, t)."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.spec.position == "rope":
            cos, sin = self.rotary.tables(call, counted, position, state_dtype(x.dtype))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q, k, v, F.logsigmoid(self.f_proj(x)).mT

    def _leave(self, x: Tensor, y: Tensor) -> Tensor:
        """Heads (b, h, t, n) to (b, t, d)."""
        y = y.transpose(1, 2).flatten(-2)
        return self.o_proj(y if self.g_proj is None else y * self.g_proj(x).sigmoid())

    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        for name, part in self.named_children():
            if isinstance(part, nn.Linear):
                last = name == "o_proj"
                init.linear_(part, generator, init.residual_scale(n_layers) if last else 1.0)
            elif isinstance(part, Norm):
                part.reset_parameters()
