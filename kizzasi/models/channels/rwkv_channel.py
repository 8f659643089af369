"""RWKV-7's channel mix: a two-layer MLP that also looks at the token before.

Symbols: b batch, t time, d d_model.

Source: Peng et al. 2025, arXiv:2503.14456, section 4.2; parameters are named as in RWKV-LM's x070.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kizzasi.models.cost import Cost, dense, linear
from kizzasi.models.mixer import ChannelSpec, LayerContext, Mixer, MixerOut, document_starts
from kizzasi.models.ops.shift import token_shift
from kizzasi.models.strict import register


@register
@dataclass(frozen=True)
class RWKVChannelSpec(ChannelSpec):
    """RWKV-7 channel mix.

    Args:
        hidden: inner width; None means 4 d_model.
    """

    kind: ClassVar[str] = "rwkv_channel"
    hidden: int | None = None

    def check(self, d_model: int, path: str) -> None:
        if self.hidden is not None:
            self.require_positive(path, "hidden")

    @property
    def context_window(self) -> float:
        return 2

    def width(self, d_model: int) -> int:
        return 4 * d_model if self.hidden is None else self.hidden

    def build(self, layer: LayerContext) -> Mixer:
        return RWKVChannel(self, layer)

    def cost(self, layer: LayerContext, seq_len: int, batch: int) -> Cost:
        d, tokens = layer.d_model, batch * seq_len
        hidden = self.width(d)
        shift = dense(d, state_bytes=4 * batch * d)
        return shift + linear(tokens, d, hidden) + linear(tokens, hidden, d)


class RWKVChannelState(NamedTuple):
    """shift: (b, d) the last token."""

    shift: Tensor


class RWKVChannel(Mixer):
    """y = W_value relu(W_key (x + x_k (before - x)))^2."""

    def __init__(self, spec: RWKVChannelSpec, layer: LayerContext) -> None:
        super().__init__()
        self.layer = layer
        hidden = spec.width(layer.d_model)
        self.x_k = nn.Parameter(torch.empty(layer.d_model))
        self.key = nn.Linear(layer.d_model, hidden, bias=False)
        self.value = nn.Linear(hidden, layer.d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        state: RWKVChannelState | None = None,
        *,
        segment_ids: Tensor | None = None,
        shared: Mapping[str, Tensor] | None = None,
    ) -> MixerOut:
        starts = None if segment_ids is None else document_starts(segment_ids)
        before, last = token_shift(x, None if state is None else state.shift, starts)
        return MixerOut(self._mix(x, before), RWKVChannelState(last))

    def step(
        self, x: Tensor, state: RWKVChannelState, *, shared: Mapping[str, Tensor] | None = None
    ) -> MixerOut:
        return MixerOut(self._mix(x, state.shift), RWKVChannelState(x))

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> RWKVChannelState:
        shape = (batch, self.layer.d_model)
        return RWKVChannelState(torch.zeros(shape, device=device, dtype=dtype))

    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        """RWKV-LM's initialisation: deeper layers look back less; the output is zero."""
        d = self.layer.d_model
        left = 1.0 - self.layer.index / n_layers
        with torch.no_grad():
            self.x_k.copy_(1.0 - (torch.arange(d) / d) ** left**4)
        nn.init.orthogonal_(self.key.weight, generator=generator)
        nn.init.zeros_(self.value.weight)

    def _mix(self, x: Tensor, before: Tensor) -> Tensor:
        mixed = torch.addcmul(x, before - x, self.x_k)
        return self.value(F.relu(self.key(mixed)).square())
