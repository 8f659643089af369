"""Two copies of a causal mixer: one reads every document forwards, one backwards.

    y = combine(mixer_1(x), reverse(mixer_2(reverse(x))))

    sum  a + b        mean  (a + b) / 2        concat  W_out [a, b]

For encoders, and for masked or labelled sequences. The result of a token depends on later tokens,
so a model with such a layer has a parallel form only: no step, no carried state, no generation.

Symbols: b batch, t time, d d_model.
Source: Schuster & Paliwal 1997, "Bidirectional recurrent neural networks"; of Mamba: Zhu et al.
2024, arXiv:2401.09417, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from kizzasi.errors import SpecError
from kizzasi.models import init
from kizzasi.models.call import Call
from kizzasi.models.cost import Cost, linear
from kizzasi.models.mixer import (
    LayerContext,
    Mixer,
    MixerOut,
    MixerSpec,
    add_losses,
)
from kizzasi.strict import join, register, require


@register
@dataclass(frozen=True)
class BidirectionalSpec(MixerSpec):
    """A mixer and its mirror image.

    Args:
        mixer: any causal mixer. Each copy stands alone: it takes nothing from other layers and
            offers nothing to them (an RWKV-7 is always a first one, without v0, v1 and v2).
        combine: "sum", "mean", or "concat" with a linear map back to d_model.
        tied: both directions use the same weights.
    """

    kind: ClassVar[str] = "bidirectional"
    mixer: MixerSpec
    combine: Literal["sum", "mean", "concat"] = "sum"
    tied: bool = False

    def check(self, d_model: int, path: str) -> None:
        rule = f"{self.mixer.kind!r} reads later tokens by itself; give a causal mixer"
        require(self.mixer.causal, join(path, "mixer"), rule)
        self.mixer.check(d_model, join(path, "mixer"))

    def build(self, layer: LayerContext) -> Mixer:
        return Bidirectional(self, layer)

    def cost(self, layer: LayerContext, seq_len: int, batch: int) -> Cost:
        d, one = layer.d_model, self.mixer.cost(layer, seq_len, batch)
        copies = 1 if self.tied else 2
        total = Cost(copies * one.params, copies * one.active_params, 2 * one.flops)
        return total + linear(batch * seq_len, 2 * d, d) if self.combine == "concat" else total

    def settle(self, offered: bool, path: str = "") -> tuple[MixerSpec, bool]:
        mixer, _ = self.mixer.settle(False, join(path, "mixer"))
        return replace(self, mixer=mixer), offered

    @property
    def causal(self) -> bool:
        return False


def reversal(starts: Tensor) -> Tensor:
    """(b, t) int64: for each token its mirror image within its document. Padding counts as one."""
    last = starts.shape[1] - 1
    time = torch.arange(last + 1, device=starts.device).expand_as(starts)
    begin = torch.where(starts, time, 0).cummax(1).values
    ends = torch.cat([starts[:, 1:], torch.ones_like(starts[:, :1])], 1)
    end = torch.where(ends, time, last).flip(1).cummin(1).values.flip(1)
    return begin + end - time


class Bidirectional(Mixer):
    """See `BidirectionalSpec`. Its state is the empty tuple."""

    def __init__(self, spec: BidirectionalSpec, layer: LayerContext) -> None:
        super().__init__()
        d = layer.d_model
        self.spec = spec
        self.forwards = spec.mixer.build(layer)
        self.backwards = None if spec.tied else spec.mixer.build(layer)
        self.out_proj = nn.Linear(2 * d, d, bias=False) if spec.combine == "concat" else None

    def parallel(self, x: Tensor, state: tuple[()] | None, call: Call) -> MixerOut:
        starts, alone = call.starts, call.alone()
        order = None if starts is None else reversal(starts).unsqueeze(-1)

        def mirror(z: Tensor) -> Tensor:
            return z.flip(1) if order is None else z.gather(1, order.expand_as(z))

        # Documents stay where they are, so the call is its own mirror image.
        a = self.forwards(x, call=alone)
        backwards = self.forwards if self.backwards is None else self.backwards
        b = backwards(mirror(x), call=alone)
        return MixerOut(self._combine(a.y, mirror(b.y)), (), add_losses(a.aux, b.aux))

    def recurrent(self, x: Tensor, state: tuple[()], call: Call) -> MixerOut:
        raise SpecError(
            "bidirectional: a token's result depends on later tokens, so there is no step; "
            f"use {self.spec.mixer.kind!r} by itself in a model that steps or generates"
        )

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> tuple[()]:
        return ()

    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        self.forwards.reset_parameters(n_layers, generator)
        if self.backwards is not None:
            self.backwards.reset_parameters(n_layers, generator)
        if self.out_proj is not None:
            init.linear_(self.out_proj, generator)

    def _combine(self, a: Tensor, b: Tensor) -> Tensor:
        if self.out_proj is not None:
            return self.out_proj(torch.cat([a, b], -1))
        return (a + b) / 2 if self.spec.combine == "mean" else a + b
