"""A gated long convolution whose filter is itself a small network: Hyena of order 2.

    x1, x2, v = conv(W_in x),    z = x2 v         conv: a short causal convolution
    y = W_out x1 (h * z + D z)                    h * z: the long one
    h[j] = window[j] filter(features(j / max_len)),      j = 0 .. max_len - 1 tokens back

| here | paper | meaning |
|---|---|---|
| max_len, k | L | length of the filter |
| features | PositionalEncoding | j / L, and cos and sin of 2 pi f j / L for n_bands frequencies f |
| filter | FFN | four linear layers with sines between them |
| window | Window | exp(-rate j / L), rates spread over the channels |
| D | bias | what passes the convolution by |

Symbols: b batch, t time, d d_model.
Source: Poli et al. 2023, arXiv:2302.10866, sections 3.1-3.3 and appendix D; code of the authors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from kizzasi.models import init
from kizzasi.models.call import Call
from kizzasi.models.cost import Cost, dense, linear
from kizzasi.models.mixer import (
    NO_DECAY,
    LayerContext,
    Mixer,
    MixerOut,
    MixerSpec,
    state_dtype,
)
from kizzasi.models.norm import KeepFloat32, WideLinear
from kizzasi.models.ops.conv import CAUSAL_CONV1D, causal_conv1d_step
from kizzasi.models.ops.long_conv import LONG_CONV1D
from kizzasi.models.ops.precision import full_precision
from kizzasi.models.parts.causal_conv import CausalConv, convolve
from kizzasi.strict import register

# Where the slowest and the fastest window have fallen to 1 %, in units of max_len.
SLOWEST, FASTEST = 1.5, 0.3


@register
@dataclass(frozen=True)
class LongConvSpec(MixerSpec):
    """Hyena of order 2.

    A step costs O(max_len): it reads the last max_len inputs of the convolution from the state, and
    computes the filter anew. Tokens further back are forgotten.

    Args:
        max_len: length of the filter.
        d_conv: length of the short convolution.
        n_bands: frequencies in the features of a position.
        filter_width: inner width of the filter's network.
        sine_frequency: factor inside its sines; high ones start with rough filters.
    """

    kind: ClassVar[str] = "long_conv"
    max_len: int = 1024
    d_conv: int = 3
    n_bands: int = 16
    filter_width: int = 64
    sine_frequency: float = 14.0

    def check(self, d_model: int, path: str) -> None:
        self.require_positive(path, "max_len", "d_conv", "n_bands", "filter_width")
        self.require_positive(path, "sine_frequency")

    def build(self, layer: LayerContext) -> Mixer:
        return LongConv(self, layer)

    def cost(self, layer: LayerContext, seq_len: int, batch: int) -> Cost:
        d, k, n, tokens = layer.d_model, self.max_len, self.filter_width, batch * seq_len
        inner = linear(k, n, n, bias=True)
        return (
            linear(tokens, d, 3 * d)
            + linear(tokens, d, d)
            + linear(k, 1 + 2 * self.n_bands, n, bias=True)
            + (inner + inner + linear(k, n, d))
            + dense(
                params=3 * d * (self.d_conv + 1) + d,
                state_bytes=4 * batch * d * (3 * (self.d_conv - 1) + k - 1),
            )
        )

    @property
    def context_window(self) -> float:
        return self.max_len + self.d_conv - 1


class LongConvState(NamedTuple):
    """Last inputs, the newest last: of the short convolution (b, 3 d, d_conv - 1), and of the long
    one (b, d, max_len - 1)."""

    conv: Tensor
    history: Tensor


class ImplicitFilter(KeepFloat32):
    """Filters (d, max_len) of a `LongConvSpec`, the newest token last, in at least float32."""

    float32_parameters = tuple(
        f"layers.{i}.{name}" for i in range(4) for name in ("weight", "bias")
    )

    def __init__(self, spec: LongConvSpec, d: int) -> None:
        super().__init__()
        self.spec = spec
        n = spec.filter_width
        widths = (1 + 2 * spec.n_bands, n, n, n)
        self.layers = nn.ModuleList(WideLinear(width, n) for width in widths[:3])
        self.layers.append(WideLinear(n, d, bias=False))

    def reset_parameters(self, generator: torch.Generator | None) -> None:
        for layer in self.layers:
            init.linear_(layer, generator)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        """The filters, where x is."""
        *inner, last = self.layers
        dtype = full_precision(last.weight).dtype  # pyright: ignore[reportArgumentType]
        spec, like = self.spec, {"device": x.device, "dtype": dtype}
        time = torch.arange(spec.max_len - 1, -1, -1, **like)[:, None] / spec.max_len
        angle = 2 * math.pi * time * torch.arange(spec.n_bands, **like)
        h = torch.cat([time, angle.cos(), angle.sin()], 1)
        for layer in inner:
            h = (spec.sine_frequency * layer(h)).sin()
        h = last(h)
        rate = math.log(100) * torch.linspace(1 / SLOWEST, 1 / FASTEST, h.shape[1], **like)
        return (h * torch.exp(-rate * time)).mT


class LongConv(Mixer):
    """See the top of the file."""

    ops = (CAUSAL_CONV1D, LONG_CONV1D)
    float32_parameters = ("D",)
    param_rules: ClassVar = {"D": NO_DECAY}

    def __init__(self, spec: LongConvSpec, layer: LayerContext) -> None:
        super().__init__()
        d = layer.d_model
        self.spec, self.d = spec, d
        self.in_proj = nn.Linear(d, 3 * d, bias=False)
        self.conv1d = CausalConv(3 * d, 3 * d, spec.d_conv, groups=3 * d)
        self.filter = ImplicitFilter(spec, d)
        self.D = nn.Parameter(torch.empty(d))
        self.out_proj = nn.Linear(d, d, bias=False)

    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        init.linear_(self.in_proj, generator)
        for parameter in self.conv1d.parameters():
            init.uniform_(parameter, self.spec.d_conv**-0.5, generator)
        self.filter.reset_parameters(generator)
        init.normal_(self.D, 1.0, generator)
        init.linear_(self.out_proj, generator, init.residual_scale(n_layers))

    def fused(self) -> Mapping[str, tuple[int, ...]]:
        return {"in_proj.weight": (self.in_proj.in_features,) * 3}

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> LongConvState:
        return LongConvState(
            torch.zeros(batch, 3 * self.d, self.spec.d_conv - 1, device=device, dtype=dtype),
            torch.zeros(
                batch, self.d, self.spec.max_len - 1, device=device, dtype=state_dtype(dtype)
            ),
        )

    def parallel(self, x: Tensor, state: LongConvState | None, call: Call) -> MixerOut:
        conv, history = (None, None) if state is None else state
        gate, z, conv = self._enter(x, conv, call)
        run = LONG_CONV1D.pick(self.engine, x.device)
        y, history = run(z, self.filter(x), history, call.starts)
        return MixerOut(self._finish(gate, y, z), LongConvState(conv, history))

    def recurrent(self, x: Tensor, state: LongConvState, call: Call) -> MixerOut:
        gate, z, conv = self._enter(x, state.conv, call)
        y, history = causal_conv1d_step(z, self.filter(x), None, state.history)
        return MixerOut(self._finish(gate, y, z), LongConvState(conv, history))

    def _enter(self, x: Tensor, state: Tensor | None, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """The outer gate x1, the input of the long convolution in at least float32, and the state
        of the short one."""
        k, engine = self.spec.d_conv, self.engine
        mixed, state = convolve(self.conv1d, k, self.in_proj(x), state, call, engine=engine)
        x1, x2, v = mixed.chunk(3, -1)
        return x1, full_precision(x2) * v, state

    def _finish(self, gate: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return self.out_proj(gate * torch.addcmul(y, self.D, z).to(gate.dtype))
