"""Softmax attention: many, grouped or one key head; rotary, ALiBi or no positions; causal or not.

    q, k, v   queries, keys, values: (b, heads, t, head_dim); keys and values have n_kv_heads heads
    window    how many positions a query sees, its own included
    gate      what the heads' output is multiplied with, sigmoid(W_g x)

Source: Vaswani et al. 2017, arXiv:1706.03762. Window: Beltagy et al. 2020, arXiv:2004.05150.
QK-norm: Henry et al. 2020, arXiv:2010.04245, in the form of Qwen3, arXiv:2505.09388, or of OLMoE,
arXiv:2409.02060. Gate: Qiu et al. 2025, arXiv:2505.06708, as in Qwen3-Next. Sinks: gpt-oss,
arXiv:2508.10925.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from kizzasi.errors import ShapeError
from kizzasi.models import init
from kizzasi.models.call import Call
from kizzasi.models.cost import Cost, dense, linear, norm
from kizzasi.models.kv_cache import AttentionState, append, empty_cache, layout, now, visible
from kizzasi.models.mixer import LayerContext, Mixer, MixerOut, MixerSpec, state_dtype
from kizzasi.models.norm import HeadNorm, Norm, NormKind
from kizzasi.models.ops.attention import ATTENTION, alibi_slopes
from kizzasi.models.ops.precision import full_precision
from kizzasi.models.ops.rope import rotate
from kizzasi.models.rope_scaling import RopeScaling, Rotary
from kizzasi.models.strict import added, join, register, require

NO_STATE = (
    "this attention is not causal: a token sees later ones, so there is nothing to continue; "
    "call forward on whole sequences, or set causal to true"
)


@register
@dataclass(frozen=True)
class AttentionSpec(MixerSpec):
    """Softmax attention.

    Args:
        n_heads: query heads.
        n_kv_heads: key and value heads, a divisor of n_heads; None means n_heads (1 is MQA).
        head_dim: width of a head; None means d_model / n_heads.
        window: positions that a query sees, its own included; None means all.
        position: "rope" (Su et al. 2021), "alibi" (Press et al. 2021) or "none".
        rope_theta: base of the rotary frequencies.
        rope_dims: entries of a head that are rotated; None means all.
        rope_scaling: extension of the context beyond that of training.
        qk_norm: normalise queries and keys before the rotation: True, every head by itself;
            "head", the same with a scale of its own for every head (Cohere's Command R+); "full",
            all heads of a token together.
        qk_norm_eps: its epsilon.
        qk_norm_kind: its kind.
        clip_qkv: bound on the size of every entry of queries, keys and values, after the norm.
        softcap: bound on the scores, c tanh(z / c).
        gate: multiply the output of every head with a sigmoid of the layer's input. q_proj is twice
            as wide: for every head its queries, then its gates.
        qkv_bias, out_bias: biases of q_proj, k_proj, v_proj, and of o_proj.
        scale: factor of the scores q . k; None means head_dim^-0.5.
        sinks: a learned score for each head beside those of its keys, which every query sees and
            whose value is zero, so that a head may attend to nothing (gpt-oss).
        causal: no token sees a later one. False makes an encoder's layer: whole documents only, no
            state and no step; a window then reaches as far ahead as behind.
    """

    kind: ClassVar[str] = "attention"
    n_heads: int
    n_kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    position: Literal["rope", "alibi", "none"] = "rope"
    rope_theta: float = 10000.0
    rope_dims: int | None = None
    rope_scaling: RopeScaling | None = None
    qk_norm: Literal[False, True, "full", "head"] = False
    qk_norm_eps: float = 1e-6
    softcap: float | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm_kind: NormKind = "rms"
    clip_qkv: float | None = None
    gate: bool = False
    causal: bool = True  # pyright: ignore[reportIncompatibleMethodOverride]
    scale: float | None = added(None)
    sinks: bool = added(False)

    def check(self, d_model: int, path: str) -> None:
        self.require_positive(path, "n_heads", "qk_norm_eps")
        for name in ("n_kv_heads", "head_dim", "window", "softcap", "clip_qkv", "scale"):
            if getattr(self, name) is not None:
                self.require_positive(path, name)
        require(
            self.head_dim is not None or d_model % self.n_heads == 0,
            join(path, "n_heads"),
            f"d_model {d_model} is not divisible by {self.n_heads} heads; "
            "give a divisor of d_model, or head_dim",
        )
        require(
            self.n_heads % self.kv_heads == 0,
            join(path, "n_kv_heads"),
            f"{self.kv_heads} does not divide n_heads {self.n_heads}; give a divisor",
        )
        layers = ("layer", "layer_unbiased")
        rule = f'"head" scales layer norms alone; give one of {layers} as qk_norm_kind'
        fits = self.qk_norm != "head" or self.qk_norm_kind in layers
        require(fits, join(path, "qk_norm"), rule)
        if self.position == "rope":
            self._check_rope(self.width(d_model), path)
        else:
            unused = self.rope_dims is None and self.rope_scaling is None
            rule = f"{self.position!r} takes no rope_dims and no rope_scaling; leave them out"
            require(unused, join(path, "position"), rule)

    def _check_rope(self, head_dim: int, path: str) -> None:
        require(self.rope_theta > 1, join(path, "rope_theta"), f"{self.rope_theta} is not above 1")
        n = head_dim if self.rope_dims is None else self.rope_dims
        require(
            2 <= n <= head_dim and n % 2 == 0,
            join(path, "rope_dims"),
            f"{n} of {head_dim} entries of a head cannot be rotated in pairs; "
            "give an even number up to the head's width, or another head_dim",
        )
        if self.rope_scaling is not None:
            self.rope_scaling.check(n, join(path, "rope_scaling"))

    def build(self, layer: LayerContext) -> Attention:
        return Attention(self, layer)

    def cost(self, layer: LayerContext, seq_len: int, batch: int) -> Cost:
        d, n = layer.d_model, batch * seq_len
        head_dim = self.width(d)
        d_q, d_kv = self.n_heads * head_dim, self.kv_heads * head_dim
        slots = seq_len if self.window is None else self.window
        places = 0 if self.window is None else slots  # int64; see AttentionState
        cache = batch * (slots * 2 * d_kv * 4 + places * 8) if self.causal else 0
        scores = dense(0, flops=self._score_flops(seq_len, batch, head_dim), state_bytes=cache)
        q = linear(n, d, d_q * (1 + self.gate), bias=self.qkv_bias)
        k = v = linear(n, d, d_kv, bias=self.qkv_bias)
        total = q + k + v + scores + linear(n, d_q, d, bias=self.out_bias)
        for heads in (self.n_heads, self.kv_heads) if self.qk_norm else ():
            total += norm(self.qk_norm_kind, head_dim * (1 if self.qk_norm is True else heads))
        if self.sinks:
            total += dense(self.n_heads)
        return total

    def _score_flops(self, seq_len: int, batch: int, head_dim: int) -> int:
        """Of both products with the scores, masked ones too."""
        queries, keys = seq_len, seq_len
        if self.sinks and self.softcap is None:  # see `ops.attention`: one more key, one more entry
            masked = self.window is not None and self.window < seq_len
            queries += self.causal and not masked and seq_len > 1
            keys, head_dim = keys + 1, head_dim + 1
        return 2 * (2 * batch * self.n_heads * queries * keys * head_dim)

    @property
    def context_window(self) -> float:
        return math.inf if self.window is None else self.window

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    def width(self, d_model: int) -> int:
        """Entries of one head."""
        return d_model // self.n_heads if self.head_dim is None else self.head_dim


class Attention(Mixer):
    """Multi-head attention of an `AttentionSpec`.

    q, k, v = split(W_q x), split(W_k x), split(W_v x);    q, k = rope(norm(q)), rope(norm(k))
    y = W_o (concat(attention(q, k, v)) * sigmoid(W_g x))
    """

    ops = (ATTENTION,)
    float32_parameters = ("sinks",)

    def __init__(self, spec: AttentionSpec, layer: LayerContext) -> None:
        super().__init__()
        d = layer.d_model
        self.spec, self.head_dim = spec, spec.width(d)
        self.rotary = Rotary(spec.rope_dims or self.head_dim, spec.rope_theta, spec.rope_scaling)
        d_q, d_kv = spec.n_heads * self.head_dim, spec.kv_heads * self.head_dim
        self.q_proj = nn.Linear(d, d_q * (1 + spec.gate), bias=spec.qkv_bias)
        self.k_proj = nn.Linear(d, d_kv, bias=spec.qkv_bias)
        self.v_proj = nn.Linear(d, d_kv, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(d_q, d, bias=spec.out_bias)
        self.q_norm, self.k_norm = self._norm(spec.n_heads), self._norm(spec.kv_heads)
        self.sinks = nn.Parameter(torch.empty(spec.n_heads)) if spec.sinks else None

    def _norm(self, n_heads: int) -> Norm | HeadNorm | None:
        spec, width = self.spec, self.head_dim
        if spec.qk_norm == "head":
            return HeadNorm(n_heads * width, spec.qk_norm_eps, spec.qk_norm_kind == "layer")
        width = width * n_heads if spec.qk_norm == "full" else width
        return Norm(spec.qk_norm_kind, width, spec.qk_norm_eps) if spec.qk_norm else None

    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        for layer in (self.q_proj, self.k_proj, self.v_proj):
            init.linear_(layer, generator)
        init.linear_(self.o_proj, generator, init.residual_scale(n_layers))
        for part in (self.q_norm, self.k_norm):
            if part is not None:
                part.reset_parameters()
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    def fused(self) -> Mapping[str, tuple[int, ...]]:
        if not self.spec.gate:
            return {}
        parts = 2 * self.spec.n_heads  # the queries and the gates of every head
        return {"q_proj.weight": (self.q_proj.out_features // parts,) * parts}

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> AttentionState | tuple[()]:
        if not self.spec.causal:
            return ()
        return self._empty(batch, self.spec.window or 0, device, dtype)

    def parallel(self, x: Tensor, state: AttentionState | None, call: Call) -> MixerOut:
        causal, window = self.spec.causal, self.spec.window
        if not (causal or state is None):
            raise ShapeError(f"state: {NO_STATE}")
        before = state or self._empty(x.shape[0], 0, x.device, x.dtype)
        sight = layout(call, before, window)
        q, k, v, gate = self._project(x, sight.position, sight.counted, call)
        k, v = append(before.k, k), append(before.v, v)
        seen = visible(call, before, window, causal)
        y = self._attend(q, k, v, seen, sight.position, lambda: sight.key_position)
        return MixerOut(self._leave(y, gate), sight.cache(k, v, window) if causal else ())

    def recurrent(self, x: Tensor, state: AttentionState, call: Call) -> MixerOut:
        if not self.spec.causal:
            raise ShapeError(f"step: {NO_STATE}")
        position, counted = now(call, state, self.spec.window)
        q, k, v, gate = self._project(x[:, None], position, counted, call)
        position = position.expand(len(x), -1)
        after = state.add(k, v, position, self.spec.window)
        y = self._attend(q, after.k, after.v, after.alive, position, after.positions)
        return MixerOut(self._leave(y, gate)[:, 0], after)

    def _empty(
        self, batch: int, slots: int, device: torch.device | None, dtype: torch.dtype | None
    ) -> AttentionState:
        widths = self.head_dim, self.head_dim
        return empty_cache(batch, self.spec.kv_heads, slots, widths, device, dtype)

    def _project(
        self, x: Tensor, position: Tensor, counted: str, call: Call
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys and values (b, heads, t, head_dim), normalised, clipped and rotated; and
        gates (b, t, d_q).
        """
        q, k, v, gate = self.q_proj(x), self.k_proj(x), self.v_proj(x), None
        if self.spec.gate:
            q, gate = q.unflatten(-1, (self.spec.n_heads, -1)).chunk(2, dim=-1)
            q, gate = q.flatten(-2), gate.flatten(-2)
        if self.q_norm is not None and self.k_norm is not None:
            full = self.spec.qk_norm == "full"
            q, k = (part if full else part.unflatten(-1, (-1, self.head_dim)) for part in (q, k))
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (part.reshape(heads).transpose(1, 2) for part in (q, k, v))
        if self.spec.clip_qkv is not None:
            bound = self.spec.clip_qkv
            q, k, v = (part.clamp(-bound, bound) for part in (q, k, v))
        if self.spec.scale is not None:  # beside the usual one, which the op applies
            q = q * (self.spec.scale * self.head_dim**0.5)
        if self.spec.position != "rope":
            return q, k, v, gate
        cos, sin = self.rotary.tables(call, counted, position, state_dtype(x.dtype))
        return rotate(q, cos, sin), rotate(k, cos, sin), v, gate

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visible: Tensor | None,
        position: Tensor,
        key_positions: Callable[[], Tensor],
    ) -> Tensor:
        """`attention` with ALiBi's bias, which alone asks for the positions (b, s) of the keys."""
        bias = None
        if self.spec.position == "alibi":
            distance = (key_positions()[:, None, None] - position[:, None, :, None]).abs()
            dtype = state_dtype(q.dtype)
            slopes = alibi_slopes(self.spec.n_heads, device=q.device, dtype=dtype)
            bias = -slopes[:, None, None] * distance
        attend = ATTENTION.pick(self.engine, q.device)
        causal = self.spec.causal
        sinks = None if self.sinks is None else full_precision(self.sinks)
        how = {"bias": bias, "softcap": self.spec.softcap, "causal": causal, "sinks": sinks}
        return attend(q, k, v, visible=visible, **how)

    def _leave(self, y: Tensor, gate: Tensor | None) -> Tensor:
        """Heads (b, heads, t, head_dim) to (b, t, d)."""
        y = y.transpose(1, 2).flatten(-2)
        return self.o_proj(y if gate is None else y * gate.sigmoid())
