"""The plain layer: two residual branches, a sequence mixer and, usually, a channel mixer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.call import HERE, Call
from kizzasi.models.cost import Cost, norm
from kizzasi.models.layers.layer import LayerModule, LayerSpec
from kizzasi.models.mixer import ChannelSpec, LayerContext, Mixer, MixerOut, MixerSpec, add_losses
from kizzasi.models.norm import Norm, NormKind
from kizzasi.models.parts.turns import Tap, Taps, turned
from kizzasi.models.state import BlockState
from kizzasi.strict import added, join, register, require


@register
@dataclass(frozen=True)
class BlockSpec(LayerSpec):
    """One residual layer: x += mixer(norm(x)), then x += channel(norm(x)) if there is a channel.

    Args:
        mixer, channel: what the two branches do; a layer may do without a channel.
        norm: kind of the layer's norms.
        norm_at: "pre" norms what a branch reads, "post" what it adds (OLMo 2), "both" do both
            (Gemma 2 and 3's sandwich).
        parallel: the channel reads what the mixer reads, x += mixer(norm(x)) + channel(norm(x)),
            through a norm of its own ("separate", GPT-NeoX) or through the mixer's ("shared",
            Cohere, Phi); None means one after the other.
        residual_scale: factor of what a branch adds (Granite's residual_multiplier).
        stream_scale: factor of x where a branch is added to it (DeepNet's alpha; Wang et al. 2022,
            arXiv:2203.00555).
    """

    kind: ClassVar[str] = "block"
    mixer: MixerSpec
    channel: ChannelSpec | None = None
    norm: NormKind = "rms"
    norm_at: Literal["pre", "post", "both"] = added("pre")
    parallel: Literal["shared", "separate"] | None = added(None)
    residual_scale: float = added(1.0)
    stream_scale: float = added(1.0)

    def check(self, d_model: int, path: str) -> None:
        """Raise SpecError for every rule that the parts break at this width."""
        for name, family in (("mixer", MixerSpec), ("channel", ChannelSpec)):
            part, where = getattr(self, name), join(path, name)
            if part is None:
                continue
            require(not isinstance(part, LayerSpec), where, f"{part.kind!r} is a whole layer")
            rule = f"{part.kind!r} is a {'channel' if family is MixerSpec else 'sequence'} mixer"
            require(isinstance(part, family), where, f"{rule}; exchange the block's two")
            part.check(d_model, where)
        if self.parallel is not None:
            path_ = join(path, "parallel")
            require(self.channel is not None, path_, "there is no channel beside the mixer")
            lone = self.parallel == "shared" and self.norm_at == "post"
            require(not lone, path_, "no norm to share where norms come after; give 'separate'")

    @property
    def n_norms(self) -> int:
        """How many norms of width d_model the layer has."""
        branches = 1 if self.channel is None else 2
        before = branches - (self.parallel == "shared")
        return before * (self.norm_at != "post") + branches * (self.norm_at != "pre")

    def build(self, context: LayerContext, eps: float, dropout: float) -> Block:
        return Block(self, context, eps, dropout)

    def cost(self, context: LayerContext, seq_len: int, batch: int) -> Cost:
        total = self.mixer.cost(context, seq_len, batch)
        if self.channel is not None:
            total += self.channel.cost(context, seq_len, batch)
        for _ in range(self.n_norms):
            total += norm(self.norm, context.d_model)
        return total

    @property
    def sources(self) -> Mapping[str, int]:
        return self.mixer.sources

    def lends(self, d_model: int) -> tuple[tuple[str, object], ...] | None:
        return self.mixer.lends(d_model)

    @property
    def crosses(self) -> bool:
        return self.mixer.crosses

    def taps(self, d_model: int) -> Taps:
        n = self.n_norms if self.norm_at == "pre" else self.n_norms // 2
        own = {} if self.norm_at == "post" else {"norm": Tap(d_model, d_model, 1, n)}
        return {**own, **self.mixer.taps(d_model)}

    def reading(self, source: int) -> BlockSpec:
        return replace(self, mixer=self.mixer.reading(source))

    @property
    def context_window(self) -> float:
        channel = 1 if self.channel is None else self.channel.context_window
        return self.mixer.context_window + channel - 1

    def _data(self, *, brief: bool) -> dict[str, Any]:
        data = super()._data(brief=brief)
        del data["kind"]  # what names no kind is a block, as it was before there were others
        return data


class Block(LayerModule):
    """Two residual branches, a mixer and, usually, a channel; `BlockSpec` says where norms stand.

    x <- stream_scale x + residual_scale dropout(post_norm(branch(norm(x))))
    """

    def __init__(
        self, spec: BlockSpec, layer: LayerContext, eps: float = 1e-5, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dropout, self.beside, self.sources = dropout, spec.parallel, spec.sources
        self.residual_scale, self.stream_scale = spec.residual_scale, spec.stream_scale
        before, after = spec.norm_at != "post", spec.norm_at != "pre"

        def make(wanted: bool) -> Norm | None:
            return Norm(spec.norm, layer.d_model, eps) if wanted else None

        self.mixer_norm = make(before)
        self.mixer = spec.mixer.build(layer)
        self.mixer_post_norm = make(after)
        self.channel_norm: Norm | None = None
        self.channel: Mixer | None = None
        self.channel_post_norm: Norm | None = None
        if spec.channel is not None:
            self.channel_norm = make(before and spec.parallel != "shared")
            self.channel = spec.channel.build(layer)
            self.channel_post_norm = make(after)

    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        """Initialise all parameters, drawing from `generator`."""
        for module in self.modules():
            if isinstance(module, Norm):
                module.reset_parameters()
        for part in (self.mixer, self.channel):
            if part is not None:
                part.reset_parameters(n_layers, generator)

    def parallel(self, x: Tensor, state: BlockState | None, call: Call) -> MixerOut:
        before = BlockState(None, None) if state is None else state
        read = x if self.mixer_norm is None else self._read(x, self.mixer_norm, call)
        memory = call.lent.get(("memory", HERE))
        if memory is not None and self.mixer_norm is not None:
            call = call.lending({**call.lent, ("memory", HERE): self.mixer_norm(memory)})
        out = self.mixer(read, before.mixer, call=call)
        y = self._leave(out.y, self.mixer_post_norm)
        if self.channel is None:
            return out._replace(y=self._add(x, y), state=BlockState(out.state, ()))
        if self.beside is None:
            x = self._add(x, y)
        if self.beside != "shared":
            read = x if self.channel_norm is None else self._read(x, self.channel_norm, call)
        wide = self.channel(read, before.channel, call=call)
        z = self._leave(wide.y, self.channel_post_norm)
        x = self._add(x, z if self.beside is None else y + z)
        state = BlockState(out.state, wide.state)
        return out._replace(y=x, state=state, aux=add_losses(out.aux, wide.aux))

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> BlockState:
        channel = () if self.channel is None else self.channel.init_state(batch, device, dtype)
        return BlockState(self.mixer.init_state(batch, device, dtype), channel)

    def _read(self, x: Tensor, norm: Norm, call: Call) -> Tensor:
        """What a branch reads."""
        z = norm(x)
        return turned(call, "norm", z, z)

    def _leave(self, y: Tensor, norm: Norm | None) -> Tensor:
        """What a branch adds."""
        y = y if norm is None else norm(y)
        y = y if self.residual_scale == 1 else self.residual_scale * y
        return F.dropout(y, self.dropout, self.training) if self.dropout else y

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y if self.stream_scale == 1 else self.stream_scale * x + y
