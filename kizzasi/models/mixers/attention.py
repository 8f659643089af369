"""Causal softmax attention: many, grouped or one key head; rotary, ALiBi or no positions.

    q, k, v   queries, keys, values: (b, heads, t, head_dim); keys and values have n_kv_heads heads
    s         slots of the cache
    slot      one remembered key and value with its position; position -1 marks a dead slot
    window    how many positions a query sees, its own included

Positions restart at 0 in every document of every row, so padding and packing leave no trace.

Source: Vaswani et al. 2017, arXiv:1706.03762. Window: Beltagy et al. 2020, arXiv:2004.05150.
QK-norm: Henry et al. 2020, arXiv:2010.04245, in the form of Qwen3, arXiv:2505.09388.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from kizzasi.models import init
from kizzasi.models.cost import Cost, dense, linear
from kizzasi.models.mixer import (
    LayerContext,
    Mixer,
    MixerOut,
    MixerSpec,
    document_starts,
    state_dtype,
)
from kizzasi.models.norm import Norm
from kizzasi.models.ops.attention import (
    alibi_slopes,
    attention,
    attention_ref,
    document_positions,
    visibility,
)
from kizzasi.models.ops.rope import (
    ntk_theta,
    rope_frequencies,
    rope_tables,
    rotate,
    yarn_attention_factor,
    yarn_frequencies,
)
from kizzasi.models.strict import Strict, join, register, require


@dataclass(frozen=True)
class RopeScaling(Strict):
    """How rotary positions are stretched beyond the context that a model was trained on.

    Args:
        method: "linear" divides every frequency by factor (Chen et al. 2023, arXiv:2306.15595),
            "ntk" raises the base, "yarn" divides the slow frequencies only.
        factor: context after extension / context of training.
        original_context: tokens that the model was trained on (yarn).
        beta_fast, beta_slow: turns within original_context at which yarn's blend begins and ends.
        attention_factor: yarn's scale of rotated queries and keys; None takes the paper's.
    """

    method: Literal["linear", "ntk", "yarn"]
    factor: float
    original_context: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def check(self, n_rotated: int, path: str) -> None:
        """Raise SpecError for a rule that the fields break with n_rotated entries per head."""
        require(self.factor >= 1, join(path, "factor"), f"{self.factor} is below 1; give 1 or more")
        if self.method == "ntk":
            require(n_rotated > 2, path, "ntk cannot stretch 2 rotated entries; use linear")
        if self.method != "yarn":
            for name in ("original_context", "attention_factor"):
                unused = getattr(self, name) is None
                require(unused, join(path, name), "only yarn reads it; leave it out")
        else:
            known = self.original_context is not None and self.original_context > 0
            require(known, join(path, "original_context"), "yarn needs it; give at least 1")
            rising = 0 < self.beta_slow < self.beta_fast
            require(rising, join(path, "beta_slow"), "outside (0, beta_fast); 1 is usual")
            positive = self.attention_factor is None or self.attention_factor > 0
            require(positive, join(path, "attention_factor"), "not positive; leave it out")

    def frequencies(
        self, n_rotated: int, theta: float, *, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """`rope_frequencies`, stretched."""
        if self.method == "ntk":
            theta = ntk_theta(theta, self.factor, n_rotated)
        plain = rope_frequencies(n_rotated, theta, device=device, dtype=dtype)
        if self.method == "ntk":
            return plain
        if self.method == "linear":
            return plain / self.factor
        assert self.original_context is not None, "checked"
        return yarn_frequencies(
            plain, theta, self.factor, self.original_context, self.beta_fast, self.beta_slow
        )

    @property
    def scale(self) -> float:
        """Factor of the rotated queries and keys."""
        if self.method != "yarn":
            return 1.0
        return self.attention_factor or yarn_attention_factor(self.factor)


UNSCALED = RopeScaling("linear", 1.0)


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
        qk_norm: RMS-normalise every query and key head before the rotation.
        qk_norm_eps: its epsilon.
        softcap: bound on the scores, c tanh(z / c).
        qkv_bias, out_bias: biases of q_proj, k_proj, v_proj, and of o_proj.
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
    qk_norm: bool = False
    qk_norm_eps: float = 1e-6
    softcap: float | None = None
    qkv_bias: bool = False
    out_bias: bool = False

    def check(self, d_model: int, path: str) -> None:
        self.require_positive(path, "n_heads", "qk_norm_eps")
        for name in ("n_kv_heads", "head_dim", "window", "softcap"):
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
        places = 1 if self.window is None else slots + 1  # int64; see AttentionState
        cache = batch * (slots * 2 * d_kv * 4 + places * 8)
        norms = dense(2 * head_dim if self.qk_norm else 0)
        scores = dense(0, flops=2 * (2 * n * seq_len * d_q), state_bytes=cache)  # masked ones too
        q = linear(n, d, d_q, bias=self.qkv_bias)
        k = v = linear(n, d, d_kv, bias=self.qkv_bias)
        return q + k + v + norms + scores + linear(n, d_q, d, bias=self.out_bias)

    @property
    def context_window(self) -> float:
        return math.inf if self.window is None else self.window

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    def width(self, d_model: int) -> int:
        """Entries of one head."""
        return d_model // self.n_heads if self.head_dim is None else self.head_dim


class AttentionState(NamedTuple):
    """The cache.

    k, v           (b, n_kv_heads, s, head_dim), keys after norm and rotation. Without a window one
                   slot per token; with one, a ring of `window` slots, position p in p % window.
    position       (b, s) int64, place in the open document; -1: dead, of another document or empty.
                   (b, 0) where slot i holds position i of every row, so that no slot is dead: the
                   shape alone says that nothing need be masked.
    next_position  (b,) int64, position of the next token.
    """

    k: Tensor
    v: Tensor
    position: Tensor
    next_position: Tensor

    @property
    def in_order(self) -> bool:
        """Slot i holds position i of every row; `position` is left out."""
        return self.position.shape[1] == 0

    def positions(self) -> Tensor:
        """(b, s), written out."""
        if not self.in_order:
            return self.position
        slots = torch.arange(self.k.shape[2], device=self.k.device)
        return slots.expand(self.k.shape[0], -1)


class Attention(Mixer):
    """Multi-head attention of an `AttentionSpec`.

        q, k, v = split(W_q x), split(W_k x), split(W_v x);    q, k = rope(norm(q)), rope(norm(k))
        y = W_o concat(attention(q, k, v))

    Queries at padding see padding, so that nothing is ever divided by zero; slots of padding die.
    """

    def __init__(self, spec: AttentionSpec, layer: LayerContext) -> None:
        super().__init__()
        d = layer.d_model
        self.spec, self.head_dim = spec, spec.width(d)
        n_rotated = spec.rope_dims or self.head_dim
        self.rope = f"rope of {n_rotated}, {spec.rope_theta}, {spec.rope_scaling}"
        d_q, d_kv = spec.n_heads * self.head_dim, spec.kv_heads * self.head_dim
        self.q_proj = nn.Linear(d, d_q, bias=spec.qkv_bias)
        self.k_proj = nn.Linear(d, d_kv, bias=spec.qkv_bias)
        self.v_proj = nn.Linear(d, d_kv, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(d_q, d, bias=spec.out_bias)
        eps = spec.qk_norm_eps
        self.q_norm = Norm("rms", self.head_dim, eps) if spec.qk_norm else None
        self.k_norm = Norm("rms", self.head_dim, eps) if spec.qk_norm else None

    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        for layer in (self.q_proj, self.k_proj, self.v_proj):
            init.linear_(layer, generator)
        init.linear_(self.o_proj, generator, init.residual_scale(n_layers))
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.reset_parameters()

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> AttentionState:
        return self._empty(batch, self.spec.window or 0, device, dtype)

    def forward(
        self,
        x: Tensor,
        state: AttentionState | None = None,
        *,
        segment_ids: Tensor | None = None,
        shared: Mapping[str, Tensor] | None = None,
    ) -> MixerOut:
        b, t, _ = x.shape
        if state is None:
            state = self._empty(b, 0, x.device, x.dtype)
        alike = segment_ids is None and state.in_order  # rows differ in nothing
        if segment_ids is None:
            segment_ids = torch.zeros(b, t, dtype=torch.int64, device=x.device)
        document, position = document_positions(document_starts(segment_ids), state.next_position)
        q, k, v, offered = self._project(x, position, shared)
        k, v = _append(state.k, k), _append(state.v, v)
        before = state.positions()
        key_document = torch.cat([before.clamp(-1, 0), document], dim=1)
        key_position = torch.cat([before, position], dim=1)

        rows = slice(1) if alike else slice(None)
        query = document[rows], position[rows]
        keys = key_document[rows], key_position[rows]
        plain = alike and self.spec.position != "alibi"
        causal = plain and k.shape[2] == t <= self.spec.context_window
        visible = None if causal else visibility(*query, *keys, self.spec.window)
        y = self._attend(q, k, v, visible, query[1], lambda: keys[1])
        y = self.o_proj(y.transpose(1, 2).flatten(-2))

        last = torch.where(segment_ids[:, -1] < 0, -1, position[:, -1])
        if self.spec.window is not None:
            after = _ring(k, v, last, t, self.spec.window)
        elif alike:
            after = AttentionState(k, v, state.position, last + 1)
        else:
            alive = (key_document == document[:, -1:]) & (last >= 0)[:, None]
            after = AttentionState(k, v, torch.where(alive, key_position, -1), last + 1)
        return MixerOut(y, after, shared=offered)

    def step(
        self, x: Tensor, state: AttentionState, *, shared: Mapping[str, Tensor] | None = None
    ) -> MixerOut:
        now = state.next_position[:, None]
        q, k, v, offered = self._project(x, now, shared)
        position = state.position
        if self.spec.window is None:
            k, v = _append(state.k, k), _append(state.v, v)
            if not state.in_order:
                position = torch.cat([position, now], dim=1)
        else:
            slot = now % self.spec.window
            position = position.scatter(1, slot, now)
            index = slot[:, None, :, None].expand_as(k)
            k = state.k.to(k.dtype).scatter(2, index, k)
            v = state.v.to(v.dtype).scatter(2, index, v)
        after = AttentionState(k, v, position, state.next_position + 1)
        visible = None if after.in_order else (position >= 0)[:, None, None]
        y = self._attend(q, k, v, visible, now, after.positions)
        return MixerOut(self.o_proj(y.flatten(1)), after, shared=offered)

    def _empty(
        self, batch: int, slots: int, device: torch.device | None, dtype: torch.dtype | None
    ) -> AttentionState:
        shape = (batch, self.spec.kv_heads, slots, self.head_dim)
        k, v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        position = torch.full((batch, slots), -1, dtype=torch.int64, device=device)
        return AttentionState(k, v, position, position.new_zeros(batch))

    def _project(
        self, x: Tensor, position: Tensor, shared: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor, Mapping[str, Tensor]]:
        """Queries, keys and values (b, heads, t, head_dim), normalised and rotated.

        x is (b, t, d), or (b, d) for t = 1; position is (b, t).
        Layers that rotate alike share one table: the first offers it to the others.
        """
        heads = (x.shape[0], position.shape[1], -1, self.head_dim)
        q = self.q_proj(x).view(heads).transpose(1, 2)
        k = self.k_proj(x).view(heads).transpose(1, 2)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.spec.position != "rope":
            return q, k, v, {}
        tables = shared.get(self.rope) if shared else None
        if tables is None:
            tables = self._rope_tables(position, state_dtype(x.dtype))
        cos, sin = tables.unbind()
        return rotate(q, cos, sin), rotate(k, cos, sin), v, {self.rope: tables}

    def _rope_tables(self, position: Tensor, dtype: torch.dtype) -> Tensor:
        n, theta = self.spec.rope_dims or self.head_dim, self.spec.rope_theta
        scaling = self.spec.rope_scaling or UNSCALED
        frequencies = scaling.frequencies(n, theta, device=position.device, dtype=dtype)
        return rope_tables(position, frequencies, scaling.scale)

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
            distance = key_positions()[:, None, None] - position[:, None, :, None]
            dtype = state_dtype(q.dtype)
            slopes = alibi_slopes(self.spec.n_heads, device=q.device, dtype=dtype)
            bias = slopes[:, None, None] * distance
        attend = attention_ref if self.backend == "reference" else attention
        return attend(q, k, v, visible=visible, bias=bias, softcap=self.spec.softcap)


def _append(old: Tensor, new: Tensor) -> Tensor:
    """Join along the slots, in the dtype of the new ones: autocast may have changed since."""
    return torch.cat([old.to(new.dtype), new], dim=2) if old.shape[2] else new


def _ring(k: Tensor, v: Tensor, last: Tensor, t: int, window: int) -> AttentionState:
    """The last `window` tokens of the open document, position p in slot p % window.

    Args:
        k, v: (b, n_kv_heads, s, head_dim), the earlier ring if there is one, then t new slots.
        last: (b,) int64, last position of the open document; -1 if none is open.
    """
    _, h, s, d = k.shape
    slot = torch.arange(window, device=k.device)
    age = (last[:, None] - slot) % window
    position = (last[:, None] - age).clamp(min=-1)
    source = torch.where(age < t, s - 1 - age, slot).clamp(max=s - 1)  # new, or where it was
    index = source[:, None, :, None].expand(-1, h, -1, d)
    dead = (position < 0)[:, None, :, None]
    k, v = (cache.gather(2, index).masked_fill(dead, 0.0) for cache in (k, v))
    return AttentionState(k, v, position, last + 1)
