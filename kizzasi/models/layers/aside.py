"""A Transformer block beside the stream: a layer whose mixer reads what the block made, too.

b batch · t time · d d_model · h heads · n head_dim · e the stream before the stack's first layer

The block's weights may stand in several layers, and exist once, in the first of them; what each has
of its own are low-rank adapters of them, the map behind the block, and its mixer.

Source: Glorioso et al. 2024, arXiv:2411.15242 (Zamba2), section 2; e beside the stream: Glorioso et
al. 2024, arXiv:2405.16712 (Zamba).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kizzasi.models.attention.cache import (
    AttentionState,
    append,
    empty_cache,
    layout,
    now,
    visible,
)
from kizzasi.models.attention.rope_scaling import Rotary
from kizzasi.models.call import Call
from kizzasi.models.cost import Cost, dense, linear, norm
from kizzasi.models.init import linear_
from kizzasi.models.layers.layer import LayerModule, LayerSpec
from kizzasi.models.mixer import LayerContext, MixerOut, MixerSpec, state_dtype
from kizzasi.models.norm import Norm, NormKind
from kizzasi.models.ops.activations import ACTIVATIONS, Activation
from kizzasi.models.ops.attention import ATTENTION
from kizzasi.models.ops.rope import rotate
from kizzasi.strict import join, register, require


@register
@dataclass(frozen=True)
class AsideSpec(LayerSpec):
    """x += mixer(norm(x + linear(block([x, e])))), e the stream before the first layer.

    The block is attention over vectors of 2 d_model and a gated channel, each behind a norm and
    without a residual. Every layer adapts its weights by low-rank maps of its own.

    Args:
        mixer: the layer's own.
        n_heads: heads of the block.
        hidden: inner width of its channel.
        head_dim: None means 2 d_model / n_heads.
        position: "none", or "rope".
        rope_theta: base of the rotary frequencies.
        scale: factor of the scores; None means (head_dim / 2)^-0.5.
        activation: of the channel's gate.
        bias: of the channel's maps.
        adapter_rank: inner width of the adapters.
        adapt_heads: adapt queries, keys and values too, not the channel alone.
        norm: kind of all its norms.
        layer: index, in its stack, of the earlier layer whose block it runs; None: its own.
    """

    kind: ClassVar[str] = "aside"
    mixer: MixerSpec
    n_heads: int
    hidden: int
    head_dim: int | None = None
    position: Literal["none", "rope"] = "none"
    rope_theta: float = 10000.0
    scale: float | None = None
    activation: Activation = "gelu"
    bias: bool = False
    adapter_rank: int = 128
    adapt_heads: bool = False
    norm: NormKind = "rms"
    layer: int | None = None

    def check(self, d_model: int, path: str) -> None:
        super().check(d_model, path)
        for name in ("n_heads", "hidden", "head_dim", "scale", "adapter_rank"):
            value = getattr(self, name)
            rule = f"{value} is not positive"
            require(value is None or value > 0, join(path, name), rule)
        rule = (
            f"{self.n_heads} does not divide 2 d_model, {2 * d_model}; give a divisor, or head_dim"
        )
        fits = self.head_dim is not None or 2 * d_model % self.n_heads == 0
        require(fits, join(path, "n_heads"), rule)
        n = self.width(d_model)
        rule = f"{n} entries cannot be rotated in pairs; give an even number"
        require(self.position == "none" or n % 2 == 0, join(path, "head_dim"), rule)
        require(self.rope_theta > 1, join(path, "rope_theta"), f"{self.rope_theta} is not above 1")

    def check_after(self, earlier: Sequence[LayerSpec], path: str) -> None:
        if self.layer is None:
            return
        where, i = join(path, "layer"), self.layer
        found = earlier[i] if 0 <= i < len(earlier) else None
        owns = isinstance(found, AsideSpec) and found.layer is None
        rule = f"{i} is no earlier layer with a block of its own; give the index of one"
        require(owns, where, rule)
        same = (
            replace(self, layer=None, mixer=found.mixer) if isinstance(found, AsideSpec) else None
        )
        rule = f"the block of layer {i} is another; all fields but mixer and layer must be equal"
        require(same == found, where, rule)

    def width(self, d_model: int) -> int:
        """Entries of a head."""
        return 2 * d_model // self.n_heads if self.head_dim is None else self.head_dim

    def build(self, context: LayerContext, eps: float, dropout: float) -> Aside:
        return Aside(self, context, eps, dropout)

    def cost(self, context: LayerContext, seq_len: int, batch: int) -> Cost:
        d, tokens, rank = context.d_model, batch * seq_len, self.adapter_rank
        inner, hidden = self.n_heads * self.width(d), self.hidden
        block = norm(self.norm, 2 * d) + norm(self.norm, d) + linear(tokens, inner, d)
        for _ in "qkv":
            block += linear(tokens, 2 * d, inner)
        block += linear(tokens, d, 2 * hidden, bias=self.bias)
        block += linear(tokens, hidden, d, bias=self.bias)
        if self.layer is not None:
            block = block._replace(params=0, active_params=0)
        own = self.mixer.cost(context, seq_len, batch) + norm(self.norm, d) + linear(tokens, d, d)
        own += linear(tokens, d, rank) + linear(tokens, rank, 2 * hidden)
        for _ in "qkv" if self.adapt_heads else "":
            own += linear(tokens, 2 * d, rank) + linear(tokens, rank, inner)
        scores = dense(0, flops=4 * tokens * seq_len * inner, state_bytes=8 * tokens * inner)
        return block + own + scores


class AsideState(NamedTuple):
    """mixer: the state of the layer's own. cache: what the block remembers in this layer."""

    mixer: Any
    cache: AttentionState


class Adapter(nn.Module):
    """up(down(x)): added to what a map makes of x, and nothing at first."""

    def __init__(self, n_in: int, rank: int, n_out: int) -> None:
        super().__init__()
        self.down = nn.Linear(n_in, rank, bias=False)
        self.up = nn.Linear(rank, n_out, bias=False)

    def reset_parameters(self, generator: torch.Generator | None) -> None:
        linear_(self.down, generator)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class AsideBlock(nn.Module):
    """Attention and a channel without residuals, as any layer with its adapters runs them."""

    def __init__(self, spec: AsideSpec, d: int, eps: float) -> None:
        super().__init__()
        self.head_dim = n = spec.width(d)
        inner = spec.n_heads * n
        self.scale = (n / 2) ** -0.5 if spec.scale is None else spec.scale
        self.activation = ACTIVATIONS[spec.activation]
        self.rotary = Rotary(n, spec.rope_theta, None) if spec.position == "rope" else None
        self.norm = Norm(spec.norm, 2 * d, eps)
        self.q_proj = nn.Linear(2 * d, inner, bias=False)
        self.k_proj = nn.Linear(2 * d, inner, bias=False)
        self.v_proj = nn.Linear(2 * d, inner, bias=False)
        self.o_proj = nn.Linear(inner, d, bias=False)
        self.channel_norm = Norm(spec.norm, d, eps)
        self.gate_up_proj = nn.Linear(d, 2 * spec.hidden, bias=spec.bias)
        self.down_proj = nn.Linear(spec.hidden, d, bias=spec.bias)

    def forward(
        self,
        x: Tensor,
        cache: AttentionState,
        call: Call,
        adapters: nn.ModuleDict,
        engine: str,
    ) -> tuple[Tensor, AttentionState]:
        """x (b, t, 2 d), or (b, 1, 2 d) in a step, to (b, t, d) and the cache after."""
        x = self.norm(x)

        def heads(name: str, project: nn.Module) -> Tensor:
            z = project(x) + adapters[name](x) if name in adapters else project(x)
            return z.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        q, k, v = heads("q", self.q_proj), heads("k", self.k_proj), heads("v", self.v_proj)
        y, cache = self._attend(q, k, v, cache, call, engine)
        y = self.channel_norm(self.o_proj(y.transpose(1, 2).flatten(-2)))
        gate, up = (self.gate_up_proj(y) + adapters["gate_up"](y)).chunk(2, -1)
        return self.down_proj(self.activation(gate) * up), cache

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, cache: AttentionState, call: Call, engine: str
    ) -> tuple[Tensor, AttentionState]:
        attend = ATTENTION.pick(engine, q.device)
        if call.step:
            position, counted = now(call, cache)
            q, k = self._rotate(q, k, position, counted, call)
            after = cache.add(k, v, position.expand(len(k), -1))
            seen = after.alive
            return attend(q, after.k, after.v, visible=seen, scale=self.scale), after
        sight = layout(call, cache)
        q, k = self._rotate(q, k, sight.position, sight.counted, call)
        k, v = append(cache.k, k), append(cache.v, v)
        y = attend(q, k, v, visible=visible(call, cache), scale=self.scale)
        return y, sight.cache(k, v)

    def _rotate(
        self, q: Tensor, k: Tensor, position: Tensor, counted: str, call: Call
    ) -> tuple[Tensor, Tensor]:
        if self.rotary is None:
            return q, k
        cos, sin = self.rotary.tables(call, counted, position, state_dtype(q.dtype))
        return rotate(q, cos, sin), rotate(k, cos, sin)

    def reset_parameters(self, generator: torch.Generator | None) -> None:
        for part in self.children():
            if isinstance(part, nn.Linear):
                linear_(part, generator)
            elif isinstance(part, Norm):
                part.reset_parameters()


class Aside(LayerModule):
    """y = block([x, e]) with the layer's adapters;  x <- x + dropout(mixer(norm(x + linear(y)))).

    Attributes:
        block: its own, if it has one.
        runs: the block that it runs, in a tuple, so that another layer's stays that layer's part.
    """

    ops = (ATTENTION,)
    reads_start = True

    def __init__(self, spec: AsideSpec, context: LayerContext, eps: float, dropout: float) -> None:
        super().__init__()
        d, rank = context.d_model, spec.adapter_rank
        inner = spec.n_heads * spec.width(d)
        self.spec, self.dropout = spec, dropout
        self.block = AsideBlock(spec, d, eps) if spec.layer is None else None
        self.runs: tuple[AsideBlock, ...] = () if self.block is None else (self.block,)
        names = ("q", "k", "v") if spec.adapt_heads else ()
        adapters = {name: Adapter(2 * d, rank, inner) for name in names}
        self.adapters = nn.ModuleDict({**adapters, "gate_up": Adapter(d, rank, 2 * spec.hidden)})
        self.linear = nn.Linear(d, d, bias=False)
        self.norm = Norm(spec.norm, d, eps)
        self.mixer = spec.mixer.build(context)

    def join(self, stack: Sequence[LayerModule]) -> None:
        if self.spec.layer is not None:
            owner = stack[self.spec.layer]
            assert isinstance(owner, Aside), "checked"
            self.runs = owner.runs

    def parallel(self, x: Tensor, state: AsideState | None, call: Call) -> MixerOut:
        before = (
            AsideState(None, self._empty(len(x), x.device, x.dtype)) if state is None else state
        )
        both = torch.cat([x, call.lent["start", 0]], -1)
        both = both.unsqueeze(1) if call.step else both
        y, cache = self.runs[0](both, before.cache, call, self.adapters, self.engine)
        y = y.squeeze(1) if call.step else y
        out = self.mixer(self.norm(x + self.linear(y)), before.mixer, call=call)
        y = F.dropout(out.y, self.dropout, self.training) if self.dropout else out.y
        return out._replace(y=x + y, state=AsideState(out.state, cache))

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> AsideState:
        mixer = self.mixer.init_state(batch, device, dtype)
        return AsideState(mixer, self._empty(batch, device, dtype))

    def _empty(
        self, batch: int, device: torch.device | None, dtype: torch.dtype | None
    ) -> AttentionState:
        n = self.runs[0].head_dim
        return empty_cache(batch, self.spec.n_heads, 0, (n, n), device, dtype)

    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        """The adapters add nothing, as in Hu et al. 2021, arXiv:2106.09685."""
        if self.block is not None:
            self.block.reset_parameters(generator)
        for adapter in self.adapters.children():
            adapter.reset_parameters(generator)  # pyright: ignore[reportCallIssue]
        linear_(self.linear, generator)
        self.norm.reset_parameters()
        self.mixer.reset_parameters(n_layers, generator)
