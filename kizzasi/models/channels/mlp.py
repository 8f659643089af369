"""The two-layer perceptron of GPT-2, or with squared ReLU that of Primer.

Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from kizzasi.models import init
from kizzasi.models.call import Call
from kizzasi.models.cost import Cost, linear
from kizzasi.models.mixer import ChannelSpec, LayerContext, Mixer, MixerOut
from kizzasi.models.ops.activations import ACTIVATIONS, Activation
from kizzasi.strict import register


@register
@dataclass(frozen=True)
class MLPSpec(ChannelSpec):
    """Up, activation, down.

    Args:
        hidden: inner width; None means 4 d_model.
        activation: "gelu", "gelu_tanh" (the approximation that GPT-2 was trained with), "relu",
            "relu2", "sigmoid" or "silu".
        bias: of both layers.
    """

    kind: ClassVar[str] = "mlp"
    hidden: int | None = None
    activation: Activation = "gelu"
    bias: bool = False

    def check(self, d_model: int, path: str) -> None:
        if self.hidden is not None:
            self.require_positive(path, "hidden")

    def build(self, layer: LayerContext) -> MLP:
        return MLP(self, layer)

    def cost(self, layer: LayerContext, seq_len: int, batch: int) -> Cost:
        d, hidden, n = layer.d_model, self.width(layer.d_model), batch * seq_len
        return linear(n, d, hidden, bias=self.bias) + linear(n, hidden, d, bias=self.bias)

    @property
    def context_window(self) -> float:
        return 1

    def width(self, d_model: int) -> int:
        """Inner width."""
        return 4 * d_model if self.hidden is None else self.hidden


class MLP(Mixer):
    """y = W_down activation(W_up x). Its state is the empty tuple."""

    def __init__(self, spec: MLPSpec, layer: LayerContext) -> None:
        super().__init__()
        hidden = spec.width(layer.d_model)
        self.spec = spec
        self.up_proj = nn.Linear(layer.d_model, hidden, bias=spec.bias)
        self.down_proj = nn.Linear(hidden, layer.d_model, bias=spec.bias)

    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        init.linear_(self.up_proj, generator)
        init.linear_(self.down_proj, generator, init.residual_scale(n_layers))

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> tuple[()]:
        return ()

    def parallel(self, x: Tensor, state: tuple[()] | None, call: Call) -> MixerOut:
        activation = ACTIVATIONS[self.spec.activation]
        return MixerOut(self.down_proj(activation(self.up_proj(x))), ())

    def recurrent(self, x: Tensor, state: tuple[()], call: Call) -> MixerOut:
        return self.parallel(x, state, call)
