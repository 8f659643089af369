"""One pre-norm residual layer: a sequence mixer and, usually, a channel mixer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kizzasi.models.call import Call
from kizzasi.models.init import Ready
from kizzasi.models.mixer import LayerContext, Mixer, MixerOut, add_losses
from kizzasi.models.norm import Norm
from kizzasi.models.spec import BlockSpec
from kizzasi.models.state import BlockState


class Block(nn.Module, metaclass=Ready):
    """x += dropout(mixer(norm(x))), then x += dropout(channel(norm(x))) if there is a channel."""

    def __init__(
        self, spec: BlockSpec, layer: LayerContext, eps: float = 1e-5, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.mixer_norm = Norm(spec.norm, layer.d_model, eps)
        self.mixer = spec.mixer.build(layer)
        self.channel_norm: Norm | None = None
        self.channel: Mixer | None = None
        if spec.channel is not None:
            self.channel_norm = Norm(spec.norm, layer.d_model, eps)
            self.channel = spec.channel.build(layer)

    @classmethod
    def admit(cls, spec: BlockSpec, layer: LayerContext, *_: float, **__: float) -> None:
        spec.check(layer.d_model, "")

    def start(self, spec: BlockSpec, layer: LayerContext, *_: float, **__: float) -> None:
        self.reset_parameters(layer.n_layers)

    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        """Initialise all parameters, drawing from `generator`."""
        for module in self.modules():
            if isinstance(module, Norm):
                module.reset_parameters()
        for part in (self.mixer, self.channel):
            if part is not None:
                part.reset_parameters(n_layers, generator)

    def forward(
        self, x: Tensor, state: BlockState | None = None, *, call: Call | None = None
    ) -> MixerOut:
        """Either form; arguments and result as in `Mixer.forward`."""
        before = BlockState(None, None) if state is None else state
        call = Call.of(x) if call is None else call
        out = self.mixer(self.mixer_norm(x), before.mixer, call=call)
        x = x + self._drop(out.y)
        if self.channel is None or self.channel_norm is None:
            return MixerOut(x, BlockState(out.state, ()), out.aux, out.shared)
        wide = self.channel(self.channel_norm(x), before.channel, call=call)
        x = x + self._drop(wide.y)
        state = BlockState(out.state, wide.state)
        return MixerOut(x, state, add_losses(out.aux, wide.aux), out.shared)

    def step(self, x: Tensor, state: BlockState, *, call: Call | None = None) -> MixerOut:
        """Recurrent form; arguments and result as in `Mixer.step`."""
        return self(x, state, call=Call.of(x, step=True) if call is None else call)

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> BlockState:
        channel = () if self.channel is None else self.channel.init_state(batch, device, dtype)
        return BlockState(self.mixer.init_state(batch, device, dtype), channel)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x
