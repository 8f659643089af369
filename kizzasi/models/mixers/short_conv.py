"""Gated short convolution: two gates around a causal filter of a few tokens.

Symbols: b batch, t time, d d_model.

| here | LFM2 | meaning |
|---|---|---|
| in_proj | in_proj | makes B, C and x, in this order |
| B, C | B, C | gate before and gate after the convolution |
| conv | conv | one filter of d_conv taps per channel |

Source: Liquid AI 2025, LFM2 technical report, arXiv:2511.23404, section 2; parameters are named as
in transformers' `Lfm2ShortConv`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from kizzasi.models.call import Call
from kizzasi.models.cost import Cost, dense, linear
from kizzasi.models.init import linear_, residual_scale, uniform_
from kizzasi.models.mixer import LayerContext, Mixer, MixerOut, MixerSpec
from kizzasi.models.ops.conv import CAUSAL_CONV1D
from kizzasi.models.parts.causal_conv import CausalConv, convolve
from kizzasi.strict import register


@register
@dataclass(frozen=True)
class ShortConvSpec(MixerSpec):
    """Gated short convolution.

    d_conv: taps of the filter, so that an output depends on as many tokens.
    bias: of the projections and of the filter.
    """

    kind: ClassVar[str] = "short_conv"
    d_conv: int = 3
    bias: bool = False

    def check(self, d_model: int, path: str) -> None:
        self.require_positive(path, "d_conv")

    @property
    def context_window(self) -> float:
        return self.d_conv

    def build(self, layer: LayerContext) -> Mixer:
        return ShortConv(self, layer)

    def cost(self, layer: LayerContext, seq_len: int, batch: int) -> Cost:
        d, k = layer.d_model, self.d_conv
        return (
            linear(batch * seq_len, d, 3 * d, bias=self.bias)
            + linear(batch * seq_len, d, d, bias=self.bias)
            + dense(params=d * (k + self.bias), flops=0, state_bytes=4 * batch * d * (k - 1))
        )


class ShortConvState(NamedTuple):
    """conv: (b, d, d_conv - 1) the last inputs of the filter."""

    conv: Tensor


class ShortConv(Mixer):
    """B, C, x = in_proj(x);  y = out_proj(C * conv(B * x))."""

    ops = (CAUSAL_CONV1D,)

    def __init__(self, spec: ShortConvSpec, layer: LayerContext) -> None:
        super().__init__()
        self.spec, self.d = spec, layer.d_model
        d = layer.d_model
        self.in_proj = nn.Linear(d, 3 * d, bias=spec.bias)
        self.conv = CausalConv(d, d, spec.d_conv, groups=d, bias=spec.bias)
        self.out_proj = nn.Linear(d, d, bias=spec.bias)

    def parallel(self, x: Tensor, state: ShortConvState | None, call: Call) -> MixerOut:
        B, C, x = self.in_proj(x).chunk(3, -1)
        y, last = self._convolve(B * x, None if state is None else state.conv, call)
        return MixerOut(self.out_proj(C * y), ShortConvState(last))

    def recurrent(self, x: Tensor, state: ShortConvState, call: Call) -> MixerOut:
        B, C, x = self.in_proj(x).chunk(3, -1)
        y, last = self._convolve(B * x, state.conv, call)
        return MixerOut(self.out_proj(C * y), ShortConvState(last))

    def fused(self) -> Mapping[str, tuple[int, ...]]:
        return {"in_proj.weight": (self.d,) * 3}

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> ShortConvState:
        shape = batch, self.d, self.spec.d_conv - 1
        return ShortConvState(torch.zeros(shape, device=device, dtype=dtype))

    def _convolve(self, u: Tensor, state: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        k, engine = self.spec.d_conv, self.engine
        return convolve(self.conv, k, u, state, call, engine=engine)

    @torch.no_grad()
    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        linear_(self.in_proj, generator)
        linear_(self.out_proj, generator, residual_scale(n_layers))
        for parameter in self.conv.parameters():
            uniform_(parameter, 1 / math.sqrt(self.spec.d_conv), generator)
