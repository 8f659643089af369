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
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from kizzasi.errors import ShapeError
from kizzasi.models import init
from kizzasi.models.attention.attending import Scores, attend, attend_in_blocks
from kizzasi.models.attention.cache import (
    Lent,
    layout,
    now,
    seen_now,
    visible,
)
from kizzasi.models.attention.costs import attention_cost
from kizzasi.models.attention.fields import (
    ROTATED,
    Position,
    check_codes,
    check_heads,
    check_positions,
    check_sources,
    check_stencil,
    lendable,
    stencil_of,
)
from kizzasi.models.attention.grouped import GroupedMemory, beside_own
from kizzasi.models.attention.memory import Memory, Remembers, State
from kizzasi.models.attention.rope_scaling import RopeScaling, Rotary
from kizzasi.models.call import HERE, Call
from kizzasi.models.cost import Cost
from kizzasi.models.mixer import LayerContext, Mixer, MixerOut, MixerSpec, state_dtype
from kizzasi.models.norm import HeadNorm, Norm, NormKind
from kizzasi.models.ops.attention import ATTENTION
from kizzasi.models.ops.kv_codes import KVQuant, turn
from kizzasi.models.ops.position_bias import alibi_bias, distance_bucket
from kizzasi.models.ops.precision import full_precision
from kizzasi.models.ops.rope import rotate
from kizzasi.models.ops.stencil import STENCIL_ATTENTION, Places, Stencil
from kizzasi.models.parts.turns import Tap, Taps, turned
from kizzasi.strict import added, join, register, require

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
        dilation: of a window: every so many positions back one is seen.
        block: positions of a block; a query sees its own block up to itself. None: no blocks.
        n_blocks: blocks that a query sees, its own included.
        n_global: the first positions of a document, which all later ones see besides their window
            or blocks.
        position: "rope" (Su et al. 2021), "xpos" (rope that fades with the distance; Sun et al.
            2022), "alibi" (Press et al. 2021), "relative" (T5's learned bias) or "none".
        rope_theta: base of the rotary frequencies.
        rope_dims: entries of a head that are rotated; None means all.
        rope_scaling: extension of the context beyond that of training.
        xpos_base: positions in which xPos fades by its rate, 3.5 for the fastest pair. Queries grow
            and keys shrink by it: a document of more than 70 bases leaves float32's range.
        n_buckets, max_distance: of "relative": rows of its table, and the distance from which on
            all share the last.
        qk_norm: normalise queries and keys before the rotation: True, every head by itself;
            "head", the same with a scale of its own for every head (Cohere's Command R+); "full",
            all heads of a token together.
        qk_norm_eps: its epsilon.
        qk_norm_kind: its kind.
        clip_qkv: bound on the size of every entry of queries, keys and values, after the norm.
        softcap: bound on the scores, c tanh(z / c).
        gate: multiply the output of every head with a sigmoid of the layer's input. q_proj is twice
            as wide: for every head its queries, then its gates.
        value_glu: multiply the values with a sigmoid of the layer's input, W_u x.
        qkv_rank: width of a bottleneck before q_proj, k_proj and v_proj; None: none. Linformer's
            projection (arXiv:2006.04768) goes over time, which no causal model can have; this one
            goes over features.
        qkv_shared: one bottleneck for all three.
        qkv_bias, out_bias: biases of q_proj, k_proj, v_proj, and of o_proj.
        scale: factor of the scores q . k; None means head_dim^-0.5.
        sinks: a learned score for each head beside those of its keys, which every query sees and
            whose value is zero, so that a head may attend to nothing (gpt-oss).
        kv_from: index, in its stack, of the earlier layer whose keys and values it reads, in place
            of its own (Gemma 3n; CLA, Brandon et al. 2024, arXiv:2405.12981); its cache holds
            nothing.
        memory_from: index, in its stack, of the earlier layer whose output, normalised, its keys
            and values are made of, in place of x (cross-attention; YOCO, Sun et al. 2024,
            arXiv:2405.05254). A token sees that of tokens up to its own.
        kv_quant: how keys and values are remembered, and so how they are seen, in training too:
            "none", as they are; "int8", "fp8" (E4M3) or "nf4" (4 bits), in groups of up to 64
            entries of a head with a scale of 2 bytes, the head turned by a Hadamard matrix. The
            first n_global stay as they are.
        kv_group: code keys channel by channel instead, so many tokens of a document together, as
            soon as they are complete, in even steps of as many bits; a query sees its own group as
            it is. Values are coded token by token. nf4 loses little so; 64 is usual (KIVI, Liu et
            al. 2024, arXiv:2402.02750).
        causal: no token sees a later one. False makes an encoder's layer: whole documents only, no
            state and no step; a window then reaches as far ahead as behind.
    """

    kind: ClassVar[str] = "attention"
    n_heads: int
    n_kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    position: Position = "rope"
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
    dilation: int = added(1)
    block: int | None = added(None)
    n_blocks: int = added(1)
    n_global: int = added(0)
    xpos_base: float = added(512.0)
    n_buckets: int = added(32)
    max_distance: int = added(128)
    qkv_rank: int | None = added(None)
    qkv_shared: bool = added(False)
    value_glu: bool = added(False)
    kv_from: int | None = added(None)
    memory_from: int | None = added(None)
    kv_quant: KVQuant = added("none")
    kv_group: int | None = added(None)

    def check(self, d_model: int, path: str) -> None:
        self.require_positive(path, "n_heads", "qk_norm_eps")
        for name in (
            "n_kv_heads",
            "head_dim",
            "window",
            "softcap",
            "clip_qkv",
            "scale",
            "qkv_rank",
        ):
            if getattr(self, name) is not None:
                self.require_positive(path, name)
        check_heads(self, d_model, path)
        rule = "there is no bottleneck to share; give qkv_rank too"
        require(self.qkv_rank is not None or not self.qkv_shared, join(path, "qkv_shared"), rule)
        check_sources(self, path)
        check_positions(self, self.width(d_model), path)
        check_stencil(self, path)
        check_codes(self, path)

    def build(self, layer: LayerContext) -> Attention:
        return Attention(self, layer)

    def cost(self, layer: LayerContext, seq_len: int, batch: int) -> Cost:
        return attention_cost(self, layer.d_model, seq_len, batch)

    @property
    def stencil(self) -> Stencil:
        """Who sees whom."""
        return stencil_of(self)

    def memory(self, head_dim: int) -> Remembers:
        """What heads of this width remember."""
        what = self.kv_heads, (head_dim, head_dim), self.stencil, self.kv_quant
        return Memory(*what) if self.kv_group is None else GroupedMemory(*what, self.kv_group)

    @property
    def coded(self) -> bool:
        return self.kv_quant != "none"

    @property
    def sources(self) -> Mapping[str, int]:
        named = {"kv": self.kv_from, "memory": self.memory_from}
        return {what: i for what, i in named.items() if i is not None}

    def lends(self, d_model: int) -> tuple[tuple[str, object], ...] | None:
        return lendable(self, self.kv_heads, self.width(d_model))

    @property
    def crosses(self) -> bool:
        return not self.sources and self.qkv_rank is None and not self.value_glu

    def taps(self, d_model: int) -> Taps:
        n_in = d_model if self.qkv_rank is None else self.qkv_rank
        width = self.width(d_model)
        places = {"q": Tap(n_in, self.n_heads * width, self.n_heads)}
        if self.kv_from is None:
            places["v"] = Tap(n_in, self.kv_heads * width, self.kv_heads)
        return places

    def reading(self, source: int) -> AttentionSpec:
        return replace(self, kv_from=source, memory_from=None)

    @property
    def context_window(self) -> float:
        span = self.stencil.span
        return math.inf if span is None or self.n_global else span

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

    ops = (ATTENTION, STENCIL_ATTENTION)
    float32_parameters = ("sinks",)

    def __init__(self, spec: AttentionSpec, layer: LayerContext) -> None:
        super().__init__()
        d, rank = layer.d_model, spec.qkv_rank
        self.head_dim = spec.width(d)
        self.remember(spec)
        self.rotary = Rotary(spec.rope_dims or self.head_dim, spec.rope_theta, spec.rope_scaling)
        d_q, d_kv = spec.n_heads * self.head_dim, spec.kv_heads * self.head_dim
        n_in = d
        if rank is not None:
            n_in = rank
            self.qkv_down = nn.Linear(d, rank * (1 if spec.qkv_shared else 3), bias=False)
        self.q_proj = nn.Linear(n_in, d_q * (1 + spec.gate), bias=spec.qkv_bias)
        reads, self.lends = spec.kv_from is not None, layer.lends
        if not reads:
            self.k_proj = nn.Linear(n_in, d_kv, bias=spec.qkv_bias)
            self.v_proj = nn.Linear(n_in, d_kv, bias=spec.qkv_bias)
        self.memory_norm = None if spec.memory_from is None else Norm("rms", d)
        self.o_proj = nn.Linear(d_q, d, bias=spec.out_bias)
        self.u_proj = nn.Linear(d, d_kv, bias=spec.qkv_bias) if spec.value_glu else None
        self.q_norm = self._norm(spec.n_heads)
        self.k_norm = None if reads else self._norm(spec.kv_heads)
        self.sinks = nn.Parameter(torch.empty(spec.n_heads)) if spec.sinks else None
        relative = spec.position == "relative"
        self.relative_bias = nn.Embedding(spec.n_buckets, spec.n_heads) if relative else None

    def remember(self, spec: AttentionSpec) -> None:
        """Take the spec, or one that differs from it in window, n_global and kv_quant alone."""
        self.spec, self.stencil = spec, spec.stencil
        self.memory = spec.memory(self.head_dim)

    def _norm(self, n_heads: int) -> Norm | HeadNorm | None:
        spec, width = self.spec, self.head_dim
        if spec.qk_norm == "head":
            return HeadNorm(n_heads * width, spec.qk_norm_eps, spec.qk_norm_kind == "layer")
        width = width * n_heads if spec.qk_norm == "full" else width
        return Norm(spec.qk_norm_kind, width, spec.qk_norm_eps) if spec.qk_norm else None

    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        for name, part in self.named_children():
            if isinstance(part, nn.Linear):
                last = name == "o_proj"
                init.linear_(part, generator, init.residual_scale(n_layers) if last else 1.0)
            elif isinstance(part, (Norm, HeadNorm)):
                part.reset_parameters()
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)
        if self.relative_bias is not None:
            nn.init.normal_(self.relative_bias.weight, std=0.02, generator=generator)

    def fused(self) -> Mapping[str, tuple[int, ...]]:
        parts: dict[str, tuple[int, ...]] = {}
        if self.spec.gate:
            n = 2 * self.spec.n_heads  # the queries and the gates of every head
            parts["q_proj.weight"] = (self.q_proj.out_features // n,) * n
        if self.spec.qkv_rank is not None and not self.spec.qkv_shared:
            parts["qkv_down.weight"] = (self.spec.qkv_rank,) * 3
        return parts

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> State | tuple[()]:
        if not self.spec.causal or self.spec.kv_from is not None:
            return ()
        return self.memory.empty(batch, self.stencil.slots or 0, device, dtype)

    def parallel(self, x: Tensor, state: State | None, call: Call) -> MixerOut:
        causal, stencil = self.spec.causal, self.stencil
        if not (causal or state is None):
            raise ShapeError(f"state: {NO_STATE}")
        lent = self._borrowed(call)
        before = state or self.memory.empty(x.shape[0], 0, x.device, x.dtype)
        before = before if lent is None else lent.before
        sight = layout(call, before, stencil)
        q, k, v, gate = self._project(x, sight.position, sight.counted, call)
        n_before, apart = before.k.shape[2], call.segments is not None
        plan = stencil.plan(x.shape[1], n_before, apart)
        by = self.memory.turning(call, x)
        read = self.memory.read(sight, before, k, v, by)
        q = turn(q, by) if by is not None and self.memory.turns_keys else q
        if plan is None:
            keys, values, seen, key = read.keys, read.values, None, sight.key
            if read.own is None:
                seen = visible(call, before, stencil)
            else:
                keys, values, seen, key = beside_own(call, sight, stencil, read)
            places = sight.query, lambda: key
            y = attend(self._scores(q), q, keys, values, seen, *places, causal=causal)
        else:
            y = attend_in_blocks(self._scores(q), q, read, before, stencil, plan, call)
        y = y if by is None else turn(y, by)
        if lent is not None:
            return MixerOut(self._leave(y, gate), ())
        after = self.memory.keep(sight, before, read) if causal else ()
        return MixerOut(self._leave(y, gate), after, lent=self._lend(k, v, before))

    def recurrent(self, x: Tensor, state: State, call: Call) -> MixerOut:
        if not self.spec.causal:
            raise ShapeError(f"step: {NO_STATE}")
        lent = self._borrowed(call)
        state = state if lent is None else lent.before
        position, counted = now(call, state, self.stencil)
        q, k, v, gate = self._project(x[:, None], position, counted, call)
        position = position.expand(len(x), -1)
        by = self.memory.turning(call, x)
        after = self.memory.add(state, self.memory.enter(k, v, position, by), position)
        q = turn(q, by) if by is not None and self.memory.turns_keys else q
        query = Places(torch.zeros_like(position), position)
        seen = seen_now(call, after, query, self.stencil)
        keys, values = self.memory.seen(after, k)
        y = attend(self._scores(q), q, keys, values, seen, query, after.places)
        y = self._leave(y if by is None else turn(y, by), gate)[:, 0]
        return MixerOut(y, after, lent=self._lend(k, v, state)) if lent is None else MixerOut(y, ())

    def _borrowed(self, call: Call) -> Lent | None:
        """What another layer, or an earlier iterate of this one, has lent it."""
        if self.spec.kv_from is None:
            return call.lent.get(("kv", HERE))
        lent = call.lent.get(("kv", self.spec.kv_from))
        assert lent is not None, "a stack runs what is read before"
        return lent

    def _memory(self, call: Call) -> Tensor | None:
        """(b, t, d) what keys and values are made of in place of x, normalised; None for x."""
        if self.memory_norm is None or self.spec.memory_from is None:
            memory = call.lent.get(("memory", HERE))
        else:
            memory = self.memory_norm(call.lent["memory", self.spec.memory_from])
        return memory[:, None] if memory is not None and call.step else memory

    def _lend(self, k: Tensor, v: Tensor, before: State) -> Lent | None:
        return Lent(k, v, before) if self.lends else None

    def _project(
        self, x: Tensor, position: Tensor, counted: str, call: Call
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys and values (b, heads, t, head_dim), normalised, clipped and rotated; and
        gates (b, t, d_q).
        """
        parts, lent = (x, x, x), self._borrowed(call)
        if self.spec.qkv_rank is not None:
            down = self.qkv_down(x)
            parts = (down,) * 3 if self.spec.qkv_shared else down.chunk(3, -1)
        elif (memory := self._memory(call)) is not None:
            parts = (x, memory, memory)
        q, gate = self.q_proj(parts[0]), None
        if self.spec.gate:
            q, gate = q.unflatten(-1, (self.spec.n_heads, -1)).chunk(2, dim=-1)
            q, gate = q.flatten(-2), gate.flatten(-2)
        q = self._heads(turned(call, "q", q, parts[0]), self.q_norm)
        if self.spec.scale is not None:  # beside the usual one, which the op applies
            q = q * (self.spec.scale * self.head_dim**0.5)
        if lent is None:
            k, v = self.k_proj(parts[1]), self.v_proj(parts[2])
            v = turned(call, "v", v, parts[2])
            v = v if self.u_proj is None else v * self.u_proj(x).sigmoid()
            k, v = self._heads(k, self.k_norm), self._heads(v, None)
        else:
            k, v = lent.k, lent.v
        if self.spec.position not in ROTATED:
            return q, k, v, gate
        about = call, counted, position, state_dtype(x.dtype)
        if self.spec.position == "rope":
            tables = self.rotary.tables(*about) * 2
        else:
            tables = self.rotary.fading_tables(*about, self.spec.xpos_base)
        k = rotate(k, *tables[2:]) if lent is None else k
        return rotate(q, *tables[:2]), k, v, gate

    def _heads(self, z: Tensor, norm: Norm | HeadNorm | None) -> Tensor:
        """(b, t, heads head_dim) to (b, heads, t, head_dim), normalised and clipped."""
        heads = z.unflatten(-1, (-1, self.head_dim))
        if norm is not None:
            full = self.spec.qk_norm == "full"
            heads = norm(z if full else heads).to(z.dtype).reshape(heads.shape)
        heads = heads.transpose(1, 2)
        bound = self.spec.clip_qkv
        return heads if bound is None else heads.clamp(-bound, bound)

    def _scores(self, q: Tensor) -> Scores:
        sinks = None if self.sinks is None else full_precision(self.sinks)
        return Scores(self.engine, self.spec.softcap, sinks, self._bias(q.dtype))

    def _bias(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
        """What positions add to scores, of (b, t, s) distances."""
        spec, dtype = self.spec, state_dtype(dtype)
        if spec.position == "alibi":
            return partial(alibi_bias, n_heads=spec.n_heads, dtype=dtype)
        return None if self.relative_bias is None else partial(self._relative, dtype=dtype)

    def _relative(self, distance: Tensor, dtype: torch.dtype) -> Tensor:
        """(b, n_heads, t, s), a row of the table for each distance."""
        assert self.relative_bias is not None, "asked for by its own layer"
        spec = self.spec
        bucket = distance_bucket(distance, spec.n_buckets, spec.max_distance, spec.causal)
        return self.relative_bias(bucket).to(dtype).movedim(-1, 1)

    def _leave(self, y: Tensor, gate: Tensor | None) -> Tensor:
        """Heads (b, heads, t, head_dim) to (b, t, d)."""
        y = y.transpose(1, 2).flatten(-2)
        return self.o_proj(y if gate is None else y * gate.sigmoid())
