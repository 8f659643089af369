"""RWKV's channel mixes: a two-layer MLP that also looks at the token before.

Symbols: b batch, t time, d d_model.

| version | share of the tokens | receptance gate |
|---|---|---|
| 4 (also of v5) | time_mix_k, time_mix_r (d): of the present one | receptance |
| 6 | time_maa_k, time_maa_r (d): of the one before | receptance |
| 7 | x_k (d): of the one before | none |

Source: Peng et al. 2023, arXiv:2305.13048, section 3; Peng et al. 2024, arXiv:2404.05892; Peng et
al. 2025, arXiv:2503.14456, section 4.2. Parameters are named as in RWKV-LM.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kizzasi.models.call import Call
from kizzasi.models.cost import Cost, dense, linear
from kizzasi.models.mixer import ChannelSpec, LayerContext, Mixer, MixerOut
from kizzasi.models.ops.shift import token_shift
from kizzasi.strict import register

ChannelVersion = Literal[4, 6, 7]
SHARES: dict[int, tuple[str, ...]] = {
    4: ("time_mix_k", "time_mix_r"),
    6: ("time_maa_k", "time_maa_r"),
    7: ("x_k",),
}


@register
@dataclass(frozen=True)
class RWKVChannelSpec(ChannelSpec):
    """RWKV channel mix.

    Args:
        hidden: inner width; None means 4 d_model.
        version: of RWKV; 4 and 6 gate the output by a receptance.
    """

    kind: ClassVar[str] = "rwkv_channel"
    hidden: int | None = None
    version: ChannelVersion = 7

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
        total = dense(d, state_bytes=4 * batch * d)
        if self.version != 7:
            total += dense(d) + linear(tokens, d, d)
        return total + linear(tokens, d, hidden) + linear(tokens, hidden, d)


class RWKVChannelState(NamedTuple):
    """shift: (b, d) the last token."""

    shift: Tensor


class RWKVChannel(Mixer):
    """y = gate W_value relu(W_key (share of x and before))^2, gate = sigmoid(W_receptance (share)).

    Version 4 stores the share of x, versions 6 and 7 that of the token before it.
    """

    def __init__(self, spec: RWKVChannelSpec, layer: LayerContext) -> None:
        super().__init__()
        self.spec, self.layer = spec, layer
        d, hidden = layer.d_model, spec.width(layer.d_model)
        self.receptance = None if spec.version == 7 else nn.Linear(d, d, bias=False)
        for name in SHARES[spec.version]:
            self.register_parameter(name, nn.Parameter(torch.empty(d)))
        self.key = nn.Linear(d, hidden, bias=False)
        self.value = nn.Linear(hidden, d, bias=False)

    def parallel(self, x: Tensor, state: RWKVChannelState | None, call: Call) -> MixerOut:
        before, last = token_shift(x, None if state is None else state.shift, call.starts)
        return MixerOut(self._mix(x, before), RWKVChannelState(last))

    def recurrent(self, x: Tensor, state: RWKVChannelState, call: Call) -> MixerOut:
        return MixerOut(self._mix(x, state.shift.to(x.dtype)), RWKVChannelState(x))

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> RWKVChannelState:
        shape = (batch, self.layer.d_model)
        return RWKVChannelState(torch.zeros(shape, device=device, dtype=dtype))

    @torch.no_grad()
    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        """RWKV-LM's initialisation: deeper layers look back less; output and gate weight are zero.

        Source: BlinkDL/RWKV-LM, src/model.py of RWKV-v4neo, RWKV-v5 and RWKV-v7/train_temp.
        """
        d, version = self.layer.d_model, self.spec.version
        left = 1.0 - self.layer.index / n_layers
        present = (torch.arange(d, dtype=torch.float32) / d) ** (left**4 if version == 7 else left)
        for name in SHARES[version]:
            self.get_parameter(name).copy_(present if version == 4 else 1.0 - present)
        gain = 1.0 if version == 7 else max(1.0, math.sqrt(self.key.out_features / d))
        nn.init.orthogonal_(self.key.weight, gain, generator)
        self.value.weight.zero_()
        if self.receptance is not None:
            self.receptance.weight.zero_()

    def _mix(self, x: Tensor, before: Tensor) -> Tensor:
        start, end = (before, x) if self.spec.version == 4 else (x, before)
        mixed = [
            torch.addcmul(start, end - start, getattr(self, name))
            for name in SHARES[self.spec.version]
        ]
        y = self.value(F.relu(self.key(mixed[0])).square())
        return y if self.receptance is None else self.receptance(mixed[1]).sigmoid() * y
