"""One residual layer: a sequence mixer and, usually, a channel mixer."""

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
    """Two residual branches, a mixer and, usually, a channel; `BlockSpec` says where norms stand.

    x <- stream_scale x + residual_scale dropout(post_norm(branch(norm(x))))
    """

    def __init__(
        self, spec: BlockSpec, layer: LayerContext, eps: float = 1e-5, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dropout, self.parallel = dropout, spec.parallel
        self.residual_scale, self.stream_scale = spec.residual_scale, spec.stream_scale
        before, after = spec.norm_at != "post", spec.norm_at != "pre"

        def norm(wanted: bool) -> Norm | None:
            return Norm(spec.norm, layer.d_model, eps) if wanted else None

        self.mixer_norm = norm(before)
        self.mixer = spec.mixer.build(layer)
        self.mixer_post_norm = norm(after)
        self.channel_norm: Norm | None = None
        self.channel: Mixer | None = None
        self.channel_post_norm: Norm | None = None
        if spec.channel is not None:
            self.channel_norm = norm(before and spec.parallel != "shared")
            self.channel = spec.channel.build(layer)
            self.channel_post_norm = norm(after)

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
        read = x if self.mixer_norm is None else self.mixer_norm(x)
        out = self.mixer(read, before.mixer, call=call)
        y = self._leave(out.y, self.mixer_post_norm)
        if self.channel is None:
            return MixerOut(self._add(x, y), BlockState(out.state, ()), out.aux, out.shared)
        if self.parallel is None:
            x = self._add(x, y)
        if self.parallel != "shared":
            read = x if self.channel_norm is None else self.channel_norm(x)
        wide = self.channel(read, before.channel, call=call)
        z = self._leave(wide.y, self.channel_post_norm)
        x = self._add(x, z if self.parallel is None else y + z)
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

    def _leave(self, y: Tensor, norm: Norm | None) -> Tensor:
        """What a branch adds."""
        y = y if norm is None else norm(y)
        y = y if self.residual_scale == 1 else self.residual_scale * y
        return F.dropout(y, self.dropout, self.training) if self.dropout else y

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y if self.stream_scale == 1 else self.stream_scale * x + y
