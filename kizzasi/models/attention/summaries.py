"""Latent attention to fading summaries of a document, of which every so many tokens one is kept.

    u       what a token puts into a summary: latents, kv_lora_rank wide, and a rotary key
    h       the summary up to and including a token
    m       n_latents, into which a latent is parted; heads are parted likewise
    c, r    what a summary is read as: c[1..m], and the rotary key, one for all heads
    p       position in the document, from 0

    u = W_D x;    h[t] = sum_i fade^(t-i) u[i] / sum_i fade^(t-i)        i <= t, in the document
    c, r = norm(h's latents), rope(h's key)
    k = [W_UK c[g], r];    v = W_UV c[g]                                 of a head of group g
    y = W_o concat(attention(q, k, v))
        t sees h[t], and h[i] of earlier i where p_i + 1 is a multiple of every

The cache is smaller by rank and in time: a summary for every so many tokens, and the open one. A
token is in all summaries after it, the less the longer ago.

Source: parted latents: Zadouri et al. 2025, arXiv:2505.21487 (grouped latent attention). A latent
cache that a moving average updates now and then: EvoForge's `kv_policy.latent`, which builds none.
Differs: the norm is of all latents of a token together.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from kizzasi.models import init
from kizzasi.models.attention.cache import ALL, append, pack
from kizzasi.models.attention.memory import Memory, State
from kizzasi.models.attention.rope_scaling import RopeScaling, Rotary
from kizzasi.models.call import Call
from kizzasi.models.cost import Cost, dense, linear, norm
from kizzasi.models.mixer import LayerContext, Mixer, MixerOut, state_dtype
from kizzasi.models.norm import Norm
from kizzasi.models.ops.attention import ATTENTION
from kizzasi.models.ops.decay_scan import decay_scan
from kizzasi.models.ops.devices import eager
from kizzasi.models.ops.precision import full_precision
from kizzasi.models.ops.rope import rotate, split_pairs
from kizzasi.models.ops.stencil import Places
from kizzasi.strict import join, require


class SummaryFields(Protocol):
    """The fields of an `MLASpec` that summaries read."""

    @property
    def n_heads(self) -> int: ...
    @property
    def kv_lora_rank(self) -> int: ...
    @property
    def qk_nope_head_dim(self) -> int: ...
    @property
    def qk_rope_head_dim(self) -> int: ...
    @property
    def v_head_dim(self) -> int: ...
    @property
    def q_lora_rank(self) -> int | None: ...
    @property
    def rope_theta(self) -> float: ...
    @property
    def rope_scaling(self) -> RopeScaling | None: ...
    @property
    def scale(self) -> float | None: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def position(self) -> Literal["rope", "none"]: ...
    @property
    def n_latents(self) -> int: ...
    @property
    def every(self) -> int: ...
    @property
    def fade(self) -> float: ...
    @property
    def memory(self) -> Memory: ...
    @property
    def qk_head_dim(self) -> int: ...


def check_summaries(spec: SummaryFields, path: str) -> None:
    """Raise SpecError for every rule that summaries break."""
    for name in ("n_latents", "every"):
        value = getattr(spec, name)
        require(value > 0, join(path, name), f"{value} is not positive; give at least 1")
    for name in ("n_heads", "kv_lora_rank"):
        rule = f"{spec.n_latents} does not divide {name} {getattr(spec, name)}; give a divisor"
        require(getattr(spec, name) % spec.n_latents == 0, join(path, "n_latents"), rule)
    rule = f"{spec.fade} is outside [0, 1); 0 forgets at once, 0.9 remembers about ten tokens"
    require(0 <= spec.fade < 1, join(path, "fade"), rule)
    rule = "queries that meet summaries have no latent; leave it out"
    require(spec.q_lora_rank is None, join(path, "q_lora_rank"), rule)


def summary_cost(spec: SummaryFields, d_model: int, seq_len: int, batch: int) -> Cost:
    """Of the layer."""
    d, n, m, rank = d_model, batch * seq_len, spec.n_latents, spec.kv_lora_rank
    qk, width = spec.qk_head_dim, rank + spec.qk_rope_head_dim
    total = linear(n, d, width) + norm("rms", rank) + linear(n, d, spec.n_heads * qk)
    for _ in range(m):
        each = spec.qk_nope_head_dim + spec.v_head_dim
        total += linear(n, rank // m, spec.n_heads // m * each)
    read = max(qk, spec.v_head_dim) if seq_len > 1 else spec.v_head_dim  # `attention` pads
    flops = 2 * n * seq_len * spec.n_heads * (qk + read)  # masked scores too
    kept = seq_len // spec.every * (spec.memory.bytes_per_slot() + 8)
    total += dense(0, flops=flops, state_bytes=batch * (kept + 4 * width + 8))
    return total + linear(n, spec.n_heads * spec.v_head_dim, d)


class SummaryState(NamedTuple):
    """kept: the summaries that are kept, each with its position. total (b, width): sum of u, faded.
    seen (b,) int64: tokens of the open document."""

    kept: State
    total: Tensor
    seen: Tensor


class SummaryMLA(Mixer):
    """The layer of an `MLASpec` that has summaries; see the top of the file."""

    ops = (ATTENTION,)

    def __init__(self, spec: SummaryFields, layer: LayerContext) -> None:
        super().__init__()
        d, m, self.spec = layer.d_model, spec.n_latents, spec
        self.width = spec.kv_lora_rank + spec.qk_rope_head_dim
        self.scale = spec.scale or spec.qk_head_dim**-0.5
        self.rotary = Rotary(spec.qk_rope_head_dim, spec.rope_theta, spec.rope_scaling)
        self.q_proj = nn.Linear(d, spec.n_heads * spec.qk_head_dim, bias=False)
        self.kv_a_proj = nn.Linear(d, self.width, bias=False)
        self.kv_a_layernorm = Norm("rms", spec.kv_lora_rank, spec.norm_eps)
        each = spec.kv_lora_rank // m, spec.n_heads // m * (spec.qk_nope_head_dim + spec.v_head_dim)
        self.kv_b_proj = nn.ModuleList(nn.Linear(*each, bias=False) for _ in range(m))
        self.o_proj = nn.Linear(spec.n_heads * spec.v_head_dim, d, bias=False)

    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        for part in self.modules():
            if isinstance(part, nn.Linear):
                last = part is self.o_proj
                init.linear_(part, generator, init.residual_scale(n_layers) if last else 1.0)
        self.kv_a_layernorm.reset_parameters()

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> SummaryState:
        total = torch.zeros(batch, self.width, device=device, dtype=state_dtype(dtype))
        seen = torch.zeros(batch, dtype=torch.int64, device=device)
        return SummaryState(self.spec.memory.empty(batch, 0, device, dtype), total, seen)

    def parallel(self, x: Tensor, state: SummaryState | None, call: Call) -> MixerOut:
        before = self.init_state(len(x), x.device, x.dtype) if state is None else state
        place = Places(*(part.expand(len(x), -1) for part in call.places(before.seen)))
        h, total = self._summaries(x, before.total, place.position, call)
        q, k_rope, latent = self._read(x, h, place.position, call)
        new = self.spec.memory.enter(k_rope, latent, place.position)
        past = self.spec.memory.seen(before.kept, latent)
        keys, values = map(append, past, (new.seen_k, new.seen_v))
        key = Places(
            *(torch.cat(both, 1) for both in zip(before.kept.places(), place, strict=True))
        )
        k, v = self._keys_and_values(keys, values)
        attend = ATTENTION.pick(self.engine, x.device)
        seen = self._visible(place, key)
        y = attend(q, k, v, visible=seen, causal=False, scale=self.scale)
        y = self.o_proj(y.transpose(1, 2).flatten(-2))
        leaves = tuple(map(append, before.kept[: len(new.leaves)], new.leaves))
        last = place.position[:, -1]
        if call.real is not None:
            last = torch.where(call.real[:, -1], last, -1)
        kept = self._after(before.kept, leaves, place.document[:, -1:], key, last)
        total = total.masked_fill((last < 0).unsqueeze(-1), 0.0)
        return MixerOut(y, SummaryState(kept, total, last + 1))

    def _summaries(
        self, x: Tensor, total: Tensor, position: Tensor, call: Call
    ) -> tuple[Tensor, Tensor]:
        """h (b, t, width), and the sum after the last token."""
        u, fade = full_precision(self.kv_a_proj(x)), self.spec.fade
        if not fade:
            return u, u[:, -1]
        log_fade = math.log(fade)
        sums, total = decay_scan(torch.full_like(u, log_fade), u, total, call.starts)
        weight = torch.expm1(log_fade * (position + 1).to(u.dtype)) / (fade - 1)
        return sums / weight.unsqueeze(-1), total

    def _read(
        self, x: Tensor, h: Tensor, position: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (b, n_heads, t, qk_head_dim), rotary keys and latents (b, 1, t, ...)."""
        spec = self.spec
        q = self.q_proj(x).unflatten(-1, (spec.n_heads, -1)).transpose(1, 2)
        q_nope, q_rope = q.split([spec.qk_nope_head_dim, spec.qk_rope_head_dim], dim=-1)
        h = h.to(q.dtype)[:, None]
        latent, k_rope = h.split([spec.kv_lora_rank, spec.qk_rope_head_dim], dim=-1)
        if spec.position == "rope":
            tables = self.rotary.tables(call, "summaries", position, state_dtype(x.dtype))
            q_rope, k_rope = (rotate(split_pairs(part), *tables) for part in (q_rope, k_rope))
        return torch.cat([q_nope, q_rope], -1), k_rope, self.kv_a_layernorm(latent)

    def _keys_and_values(self, k_rope: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        """(b, n_heads, s, ...) of rotary keys and latents (b, 1, s, ...)."""
        spec, parts = self.spec, latent[:, 0].chunk(self.spec.n_latents, -1)
        made = [up(part) for up, part in zip(self.kv_b_proj, parts, strict=True)]
        heads = torch.cat(made, -1).unflatten(-1, (spec.n_heads, -1)).transpose(1, 2)
        k_nope, v = heads.split([spec.qk_nope_head_dim, spec.v_head_dim], dim=-1)
        return torch.cat([k_nope, k_rope.expand(-1, spec.n_heads, -1, -1)], -1), v

    def _visible(self, query: Places, key: Places) -> Tensor:
        """(b, 1, t, s + t): a token's own summary, and earlier ones that are kept."""
        t, s = query.position.shape[1], key.position.shape[1]
        own = torch.ones(t, s, dtype=torch.bool, device=key.position.device)
        own = own.tril(s - t).triu(s - t)
        ends = (key.position + 1) % self.spec.every == 0
        return ALL.visible(query, key) & (ends[:, None, None] | own)

    def _after(
        self,
        before: State,
        leaves: tuple[Tensor, ...],
        document: Tensor,
        key: Places,
        last: Tensor,
    ) -> State:
        """The summaries after a call. A graph, whose shapes are fixed, keeps dead slots too."""
        alive = (key.document == document) & (last >= 0)[:, None] & (key.position >= 0)
        alive = alive & ((key.position + 1) % self.spec.every == 0)
        position = torch.where(alive, key.position, -1)
        # Zeros: nobody sees a dead slot, but a weight of zero does not hide NaN.
        leaves = tuple(x.masked_fill(~alive[:, None, :, None], 0) for x in leaves)
        if eager() and not position.is_meta:
            leaves, position = pack(leaves, position, int(alive.sum(1).max()))
        return before._make((*leaves, *before[len(leaves) : -1], position))
