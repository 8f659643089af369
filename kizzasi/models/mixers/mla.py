"""Multi-head latent attention: all heads' keys and values are read from one small latent.

    c      latent, c_KV in the paper: what is remembered of a token, kv_lora_rank wide
    r      rotary key, k_R: one for all heads, qk_rope_head_dim wide
    q_N    the part of a query that meets the latent, qk_nope_head_dim wide; q_R meets r
    W_UK, W_UV   the halves of kv_b_proj, which read keys and values from the latent

Source: DeepSeek-V2, arXiv:2405.04434, section 2.1; names and layout of DeepSeek-V3's checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from kizzasi.models import init
from kizzasi.models.attention.cache import ALL, layout, now, visible
from kizzasi.models.attention.memory import Memory, State
from kizzasi.models.attention.rope_scaling import RopeScaling, Rotary
from kizzasi.models.attention.summaries import SummaryMLA, check_summaries, summary_cost
from kizzasi.models.call import Call
from kizzasi.models.cost import Cost, dense, linear, norm
from kizzasi.models.mixer import LayerContext, Mixer, MixerOut, MixerSpec, state_dtype
from kizzasi.models.norm import Norm
from kizzasi.models.ops.attention import ATTENTION
from kizzasi.models.ops.kv_codes import KVQuant
from kizzasi.models.ops.rope import rotate, split_pairs
from kizzasi.models.parts.linear import is_plain
from kizzasi.strict import added, join, register, require


@register
@dataclass(frozen=True)
class MLASpec(MixerSpec):
    """Multi-head latent attention.

    Args:
        n_heads: heads.
        kv_lora_rank: width of the latent that is remembered.
        qk_nope_head_dim: entries of a head's query and key that are not rotated.
        qk_rope_head_dim: entries that are; even. Their keys are shared by all heads.
        v_head_dim: entries of a head's value.
        q_lora_rank: width of a latent for the queries; None projects them directly.
        rope_theta: base of the rotary frequencies. Pairs are (2i, 2i + 1), as DeepSeek stores them.
        rope_scaling: extension of the context beyond that of training.
        scale: of the scores; None means 1 / sqrt(qk_nope_head_dim + qk_rope_head_dim). DeepSeek
            puts the sharpening of yarn here instead of in rope_scaling.attention_factor.
        norm_eps: epsilon of the latents' norms.
        position: "none" rotates nothing; the entries that would be are still shared (Kimi Linear).
        kv_quant: how latents and rotary keys are remembered; see `AttentionSpec.kv_quant`. There
            is no kv_group: c is key and value at once. Steps by channel suit keys, scales by token
            values; both would take the bytes that one latent saves, and an open group in half
            precision (64 tokens of 576 entries) those of 240 coded ones. What checkpoints would
            gain by steps for c has not been measured.
        n_latents: parts of the latent, of which every head reads one; a divisor of n_heads and of
            kv_lora_rank.
        every, fade: of summaries; see `attention.summaries`. One latent is kept of so many tokens,
            a mean of those so far in which each one weighs `fade` times what its successor does.
    """

    kind: ClassVar[str] = "mla"
    n_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    scale: float | None = None
    norm_eps: float = 1e-6
    kv_quant: KVQuant = added("none")
    position: Literal["rope", "none"] = added("rope")
    n_latents: int = added(1)
    every: int = added(1)
    fade: float = added(0.0)

    def check(self, d_model: int, path: str) -> None:
        self.require_positive(path, "n_heads", "kv_lora_rank", "qk_nope_head_dim")
        self.require_positive(path, "qk_rope_head_dim", "v_head_dim", "norm_eps")
        for name in ("q_lora_rank", "scale"):
            if getattr(self, name) is not None:
                self.require_positive(path, name)
        n = self.qk_rope_head_dim
        rule = f"{n} entries cannot be rotated in pairs; give an even number"
        require(n % 2 == 0, join(path, "qk_rope_head_dim"), rule)
        require(self.rope_theta > 1, join(path, "rope_theta"), f"{self.rope_theta} is not above 1")
        rule = '"none" takes no rope_scaling; leave it out'
        fits = self.position == "rope" or self.rope_scaling is None
        require(fits, join(path, "position"), rule)
        if self.rope_scaling is not None:
            self.rope_scaling.check(n, join(path, "rope_scaling"))
        if self.summarises:
            check_summaries(self, path)

    def build(self, layer: LayerContext) -> MLA | SummaryMLA:
        return (SummaryMLA if self.summarises else MLA)(self, layer)

    def cost(self, layer: LayerContext, seq_len: int, batch: int) -> Cost:
        if self.summarises:
            return summary_cost(self, layer.d_model, seq_len, batch)
        d, n, heads, rank = layer.d_model, batch * seq_len, self.n_heads, self.kv_lora_rank
        qk, kept = self.qk_head_dim, rank + self.qk_rope_head_dim
        total = linear(n, d, kept) + norm("rms", rank)
        if self.q_lora_rank is None:
            total += linear(n, d, heads * qk)
        else:
            total += linear(n, d, self.q_lora_rank) + norm("rms", self.q_lora_rank)
            total += linear(n, self.q_lora_rank, heads * qk)
        total += linear(n, rank, heads * (self.qk_nope_head_dim + self.v_head_dim))
        read = max(qk, self.v_head_dim) if seq_len > 1 else self.v_head_dim  # `attention` pads
        flops = 2 * n * seq_len * heads * (qk + read)  # masked scores too
        state_bytes = batch * seq_len * self.memory.bytes_per_slot()
        total += dense(0, flops=flops, state_bytes=state_bytes)
        return total + linear(n, heads * self.v_head_dim, d)

    @property
    def memory(self) -> Memory:
        """What is remembered: r and c, as keys and values of one head."""
        return Memory(1, (self.qk_rope_head_dim, self.kv_lora_rank), ALL, self.kv_quant)

    @property
    def coded(self) -> bool:
        return self.kv_quant != "none"

    @property
    def summarises(self) -> bool:
        """Whether what is kept is not every token's own latent, whole for all heads."""
        return (self.n_latents, self.every, self.fade) != (1, 1, 0)

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim


class MLA(Mixer):
    """The layer of an `MLASpec`. Its cache is an `AttentionState` of one head: k is r and v is c.

        c, r = norm(W_DKV x), rope(W_KR x);    q_N, q_R = split(W_Q x), q_R rotated
        k = [W_UK c, r];    v = W_UV c;        y = W_o concat(attention([q_N, q_R], k, v))

    A step never writes out the keys and values of the past: W_UK moves to the query and W_UV to the
    result, q_N . (W_UK c) = (W_UK^T q_N) . c, so that all heads attend to the latents themselves.
    Hooks on kv_b_proj are to see keys and values: with them, a step runs the parallel form.
    """

    ops = (ATTENTION,)

    def __init__(self, spec: MLASpec, layer: LayerContext) -> None:
        super().__init__()
        d, rank, q_rank = layer.d_model, spec.kv_lora_rank, spec.q_lora_rank
        self.remember(spec)
        self.scale = spec.scale or spec.qk_head_dim**-0.5
        self.rotary = Rotary(spec.qk_rope_head_dim, spec.rope_theta, spec.rope_scaling)
        d_q = spec.n_heads * spec.qk_head_dim
        if q_rank is None:
            self.q_proj = nn.Linear(d, d_q, bias=False)
        else:
            self.q_a_proj = nn.Linear(d, q_rank, bias=False)
            self.q_a_layernorm = Norm("rms", q_rank, spec.norm_eps)
            self.q_b_proj = nn.Linear(q_rank, d_q, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(d, rank + spec.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = Norm("rms", rank, spec.norm_eps)
        d_kv = spec.n_heads * (spec.qk_nope_head_dim + spec.v_head_dim)
        self.kv_b_proj = nn.Linear(rank, d_kv, bias=False)
        self.o_proj = nn.Linear(spec.n_heads * spec.v_head_dim, d, bias=False)

    def remember(self, spec: MLASpec) -> None:
        """Take the spec, or one that differs from it in kv_quant alone."""
        self.spec, self.memory = spec, spec.memory

    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        for part in self.children():
            if isinstance(part, Norm):
                part.reset_parameters()
            elif isinstance(part, nn.Linear):
                last = part is self.o_proj
                init.linear_(part, generator, init.residual_scale(n_layers) if last else 1.0)

    def fused(self) -> Mapping[str, tuple[int, ...]]:
        spec = self.spec
        head = spec.qk_nope_head_dim, spec.v_head_dim
        return {
            "kv_a_proj_with_mqa.weight": (spec.kv_lora_rank, spec.qk_rope_head_dim),
            "kv_b_proj.weight": head * spec.n_heads,
        }

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> State:
        return self.memory.empty(batch, 0, device, dtype)

    def parallel(self, x: Tensor, state: State | None, call: Call) -> MixerOut:
        spec = self.spec
        before = self.init_state(len(x), x.device, x.dtype) if state is None else state
        sight = layout(call, before)
        q_nope, q_rope, k_rope, latent = self._project(x, sight.position, sight.counted, call)
        read = self.memory.read(sight, before, k_rope, latent)
        k_rope, latent = read.keys, read.values
        heads = self.kv_b_proj(latent[:, 0]).unflatten(-1, (spec.n_heads, -1)).transpose(1, 2)
        k_nope, v = heads.split([spec.qk_nope_head_dim, spec.v_head_dim], dim=-1)
        q = torch.cat([q_nope, q_rope], dim=-1)
        k = torch.cat([k_nope, k_rope.expand(-1, spec.n_heads, -1, -1)], dim=-1)
        attend = ATTENTION.pick(self.engine, x.device)
        y = attend(q, k, v, visible=visible(call, before), scale=self.scale)
        y = self.o_proj(y.transpose(1, 2).flatten(-2))
        return MixerOut(y, self.memory.keep(sight, before, read))

    def recurrent(self, x: Tensor, state: State, call: Call) -> MixerOut:
        if hooked(self.kv_b_proj):
            return super().recurrent(x, state, call)
        spec, (position, counted) = self.spec, now(call, state)
        q_nope, q_rope, k_rope, latent = self._project(x[:, None], position, counted, call)
        new = self.memory.enter(k_rope, latent, position)
        after = self.memory.add(state, new, position.expand(len(x), -1))
        k_rope, latent = self.memory.seen(after, latent)
        up = self._up(x).unflatten(0, (spec.n_heads, -1))
        up_k, up_v = up.split([spec.qk_nope_head_dim, spec.v_head_dim], dim=1)
        q_latent = torch.einsum("bhtn,hnr->bhtr", q_nope, up_k)
        # All heads look at the same keys: they stand where the queries of one head would.
        q = torch.cat([q_latent, q_rope], dim=-1).transpose(1, 2)
        k = torch.cat([latent, k_rope], dim=-1)
        attend = ATTENTION.pick(self.engine, x.device)
        y = attend(q, k, latent, visible=after.alive, causal=False, scale=self.scale)
        y = torch.einsum("bthr,hvr->bthv", y, up_v)
        return MixerOut(self.o_proj(y.flatten(1)), after)

    def _up(self, x: Tensor) -> Tensor:
        """W_UK and W_UV, a weight as `nn.Linear` has it. What stands in place of that layer, an
        adapter or a quantized one, or lies elsewhere, is asked what it makes of the identity."""
        if is_plain(self.kv_b_proj) and self.kv_b_proj.weight.device == x.device:
            return self.kv_b_proj.weight
        return self.kv_b_proj(torch.eye(self.spec.kv_lora_rank, device=x.device, dtype=x.dtype)).mT

    def _project(
        self, x: Tensor, position: Tensor, counted: str, call: Call
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q_N and q_R (b, n_heads, t, width), r and c (b, 1, t, width)."""
        spec = self.spec
        if spec.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.unflatten(-1, (spec.n_heads, -1)).transpose(1, 2)
        q_nope, q_rope = q.split([spec.qk_nope_head_dim, spec.qk_rope_head_dim], dim=-1)
        kept = self.kv_a_proj_with_mqa(x)[:, None]
        latent, k_rope = kept.split([spec.kv_lora_rank, spec.qk_rope_head_dim], dim=-1)
        if spec.position == "none":
            return q_nope, q_rope, k_rope, self.kv_a_layernorm(latent)
        cos, sin = self.rotary.tables(call, counted, position, state_dtype(x.dtype))
        q_rope, k_rope = (rotate(split_pairs(part), cos, sin) for part in (q_rope, k_rope))
        return q_nope, q_rope, k_rope, self.kv_a_layernorm(latent)


def hooked(module: nn.Module) -> bool:
    """Whether someone watches or changes what passes through a module."""
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)
