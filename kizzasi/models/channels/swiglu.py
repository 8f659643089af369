"""The gated perceptron of Llama.

Source: Shazeer 2020, arXiv:2002.05202; width rule: Touvron et al. 2023, arXiv:2302.13971.
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
from kizzasi.strict import added, register


@register
@dataclass(frozen=True)
class SwiGLUSpec(ChannelSpec):
    """A gated linear unit, with SiLU unless another activation is given.

    Args:
        hidden: inner width; None means 8/3 d_model (as many parameters as an MLP of 4 d_model),
            rounded up to a multiple of 8.
        bias: of all three layers.
        activation: of the gate: "silu" (SwiGLU), "gelu" or its tanh form "gelu_tanh" (GeGLU),
            "relu" (ReGLU), "sigmoid" (GLU), "gelu_quick" (gpt-oss).
        limit: bound on gates from above and on W_up x from both sides (gpt-oss); None bounds none.
        up_offset: what is added to W_up x (1 in gpt-oss, so that a gate alone can act).
    """

    kind: ClassVar[str] = "swiglu"
    hidden: int | None = None
    bias: bool = False
    activation: Activation = added("silu")
    limit: float | None = added(None)
    up_offset: float = added(0.0)

    def check(self, d_model: int, path: str) -> None:
        for name in ("hidden", "limit"):
            if getattr(self, name) is not None:
                self.require_positive(path, name)

    @property
    def plain(self) -> bool:
        """Without biases, silu(W_gate x) * W_up x: an expert that can be packed with others."""
        return self == SwiGLUSpec(self.hidden)

    def build(self, layer: LayerContext) -> SwiGLU:
        return SwiGLU(self, layer)

    def cost(self, layer: LayerContext, seq_len: int, batch: int) -> Cost:
        d, hidden, n = layer.d_model, self.width(layer.d_model), batch * seq_len
        enter = linear(n, d, hidden, bias=self.bias)
        return enter + enter + linear(n, hidden, d, bias=self.bias)

    @property
    def context_window(self) -> float:
        return 1

    def width(self, d_model: int) -> int:
        """Inner width."""
        return 8 * -(-d_model // 3) if self.hidden is None else self.hidden


class SwiGLU(Mixer):
    """y = W_down (activation(min(W_gate x, limit)) * (clamp(W_up x, limit) + up_offset)).

    Its state is the empty tuple.
    """

    def __init__(self, spec: SwiGLUSpec, layer: LayerContext) -> None:
        super().__init__()
        d, hidden = layer.d_model, spec.width(layer.d_model)
        self.spec, self.activation = spec, ACTIVATIONS[spec.activation]
        self.gate_proj = nn.Linear(d, hidden, bias=spec.bias)
        self.up_proj = nn.Linear(d, hidden, bias=spec.bias)
        self.down_proj = nn.Linear(hidden, d, bias=spec.bias)

    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        init.linear_(self.gate_proj, generator)
        init.linear_(self.up_proj, generator)
        init.linear_(self.down_proj, generator, init.residual_scale(n_layers))

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> tuple[()]:
        return ()

    def parallel(self, x: Tensor, state: tuple[()] | None, call: Call) -> MixerOut:
        return MixerOut(self.down_proj(self.mix(self.gate_proj(x), self.up_proj(x))), ())

    def mix(self, gate: Tensor, up: Tensor) -> Tensor:
        """(..., hidden) of what the two projections made."""
        limit, offset = self.spec.limit, self.spec.up_offset
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return self.activation(gate) * (up + offset if offset else up)

    def recurrent(self, x: Tensor, state: tuple[()], call: Call) -> MixerOut:
        return self.parallel(x, state, call)
