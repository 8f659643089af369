"""Mamba-1: a gated block around a selective state space.

Symbols: b batch, t time, d d_model.

| here | paper | meaning |
|---|---|---|
| d_inner | E D | channels of the state space, expand times d_model |
| d_state, n | N | states per channel |
| dt_rank | R | inner width of the map to step sizes |
| u, z | x, z | input of the state space (after convolution), gate |
| dt | Delta | step size per channel, softplus(dt_proj(.)) |
| A_log (d_inner, n) | log(-A) | decay rates |

Source: Gu & Dao 2023, arXiv:2312.00752, section 3; parameters are named as in state-spaces/mamba.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kizzasi.models.call import Call
from kizzasi.models.cost import Cost, dense, linear
from kizzasi.models.init import linear_, softplus_inverse, uniform_
from kizzasi.models.mixer import (
    NO_DECAY,
    LayerContext,
    Mixer,
    MixerOut,
    MixerSpec,
    state_dtype,
)
from kizzasi.models.norm import Norm, WideLinear
from kizzasi.models.ops.conv import CAUSAL_CONV1D
from kizzasi.models.ops.precision import full_precision
from kizzasi.models.ops.selective_scan import SELECTIVE_SCAN, selective_scan_step
from kizzasi.models.parts.causal_conv import CausalConv, convolve
from kizzasi.strict import join, register, require


@register
@dataclass(frozen=True)
class MambaSpec(MixerSpec):
    """Mamba-1 mixer.

    d_state: states per channel.
    d_conv: length of the causal convolution.
    expand: d_inner / d_model; their product is a whole number.
    dt_rank: inner width of the step size map; None means d_model / 16, rounded up.
    dt_min, dt_max: range of the initial step sizes, log-uniform. dt_floor: their smallest value.
    conv_bias, bias: of the convolution; of in_proj and out_proj.
    inner_norm: RMS norm of dt (before dt_proj), B and C: "rms" with weights (Jamba), "weightless"
        without (FalconMamba), or None. inner_norm_eps: its epsilon.
    """

    kind: ClassVar[str] = "mamba"
    d_state: int = 16
    d_conv: int = 4
    expand: float = 2.0
    dt_rank: int | None = None
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dt_floor: float = 1e-4
    conv_bias: bool = True
    bias: bool = False
    inner_norm: Literal["rms", "weightless"] | None = None
    inner_norm_eps: float = 1e-6

    def check(self, d_model: int, path: str) -> None:
        self.require_positive(path, "d_state", "d_conv")
        if self.dt_rank is not None:
            self.require_positive(path, "dt_rank")
        width = self.expand * d_model
        whole = width >= 1 and math.isclose(width, round(width), rel_tol=1e-9)
        message = f"{self.expand} times d_model {d_model} is {width:g}, not a whole number >= 1"
        require(whole, join(path, "expand"), message)
        message = f"{self.dt_min} is not in (0, dt_max {self.dt_max}]"
        require(0 < self.dt_min <= self.dt_max, join(path, "dt_min"), message)
        message = f"{self.dt_floor} is not positive; give a small step such as 1e-4"
        require(self.dt_floor > 0, join(path, "dt_floor"), message)
        message = f"{self.inner_norm_eps} is not positive; give a small number such as 1e-6"
        require(self.inner_norm_eps > 0, join(path, "inner_norm_eps"), message)

    def d_inner(self, d_model: int) -> int:
        return round(self.expand * d_model)

    def rank(self, d_model: int) -> int:
        return math.ceil(d_model / 16) if self.dt_rank is None else self.dt_rank

    def build(self, layer: LayerContext) -> Mixer:
        return Mamba(self, layer)

    def cost(self, layer: LayerContext, seq_len: int, batch: int) -> Cost:
        d, n, k, tokens = layer.d_model, self.d_state, self.d_conv, batch * seq_len
        inner, rank = self.d_inner(d), self.rank(d)
        norms = rank + 2 * n if self.inner_norm == "rms" else 0
        return (
            linear(tokens, d, 2 * inner, bias=self.bias)
            + linear(tokens, inner, rank + 2 * n)
            + linear(tokens, rank, inner, bias=True)
            + linear(tokens, inner, d, bias=self.bias)
            + dense(
                params=inner * (k + self.conv_bias) + inner * n + inner + norms,
                flops=2 * tokens * inner * n,  # outputs from states
                state_bytes=4 * batch * inner * (k - 1 + n),
            )
        )


class MambaState(NamedTuple):
    """conv: (b, d_inner, d_conv - 1) last inputs. ssm: (b, d_inner, n) states, at least float32."""

    conv: Tensor
    ssm: Tensor


class Mamba(Mixer):
    """u, z = in_proj(x);  u = silu(conv(u));  y = out_proj(selective_scan(u, ...) * silu(z))."""

    ops = (CAUSAL_CONV1D, SELECTIVE_SCAN)
    float32_parameters = ("A_log", "D", "dt_proj.weight", "dt_proj.bias")
    param_rules = {"A_log": NO_DECAY, "D": NO_DECAY, "dt_proj.bias": NO_DECAY}  # noqa: RUF012

    def __init__(self, spec: MambaSpec, layer: LayerContext) -> None:
        super().__init__()
        self.spec = spec
        d, n, k = layer.d_model, spec.d_state, spec.d_conv
        self.d_inner, self.rank = inner, rank = spec.d_inner(d), spec.rank(d)
        self.in_proj = nn.Linear(d, 2 * inner, bias=spec.bias)
        self.conv1d = CausalConv(inner, inner, k, groups=inner, bias=spec.conv_bias)
        self.x_proj = nn.Linear(inner, rank + 2 * n, bias=False)
        self.dt_proj = WideLinear(rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, n))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, d, bias=spec.bias)
        if spec.inner_norm is not None:
            self.dt_layernorm = self._norm(rank)
            self.b_layernorm = self._norm(n)
            self.c_layernorm = self._norm(n)

    def parallel(self, x: Tensor, state: MambaState | None, call: Call) -> MixerOut:
        scan = SELECTIVE_SCAN.pick(self.engine, x.device)
        conv_state, ssm = (None, None) if state is None else state
        u, z = self.in_proj(x).chunk(2, -1)
        u, conv_state = self._convolve(u, conv_state, call)
        selected = self._select(u)
        y, ssm = scan(u, *selected, self.D, ssm, call.starts, gate=z, softplus=True)
        return MixerOut(self.out_proj(y), MambaState(conv_state, ssm))

    def recurrent(self, x: Tensor, state: MambaState, call: Call) -> MixerOut:
        u, z = self.in_proj(x).chunk(2, -1)
        u, conv_state = self._convolve(u, state.conv, call)
        dt, A, B, C = self._select(u)
        y, ssm = selective_scan_step(u, F.softplus(dt), A, B, C, self.D, state.ssm)
        return MixerOut(self.out_proj(y * F.silu(z)), MambaState(conv_state, ssm))

    def fused(self) -> Mapping[str, tuple[int, ...]]:
        inner, n = self.d_inner, self.spec.d_state
        return {"in_proj.weight": (inner, inner), "x_proj.weight": (self.rank, n, n)}

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> MambaState:
        inner, k, n = self.d_inner, self.spec.d_conv, self.spec.d_state
        return MambaState(
            torch.zeros(batch, inner, k - 1, device=device, dtype=dtype),
            torch.zeros(batch, inner, n, device=device, dtype=state_dtype(dtype)),
        )

    def _norm(self, d: int) -> Norm | nn.RMSNorm:
        eps = self.spec.inner_norm_eps
        if self.spec.inner_norm == "rms":
            return Norm("rms", d, eps)
        return nn.RMSNorm(d, eps, elementwise_affine=False)

    def _convolve(self, u: Tensor, state: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        k, engine = self.spec.d_conv, self.engine
        return convolve(self.conv1d, k, u, state, call, silu=True, engine=engine)

    def _select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dt before its softplus, A, B and C of the scan. dt is computed in at least float32."""
        n = self.spec.d_state
        dt, B, C = self.x_proj(u).split([self.rank, n, n], -1)
        if self.spec.inner_norm is not None:
            dt, B, C = self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)
        return self.dt_proj(dt), -full_precision(self.A_log).exp(), B, C

    @torch.no_grad()
    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        """Source: Gu & Dao 2023, section 3.6, and `_init_weights` of state-spaces/mamba."""
        spec = self.spec
        linear_(self.in_proj, generator)
        linear_(self.x_proj, generator)
        linear_(self.out_proj, generator, 1 / math.sqrt(n_layers))
        for parameter in self.conv1d.parameters():
            uniform_(parameter, spec.d_conv**-0.5, generator)
        uniform_(self.dt_proj.weight, self.rank**-0.5, generator)
        self.dt_proj.bias.uniform_(
            math.log(spec.dt_min), math.log(spec.dt_max), generator=generator
        )
        dt = self.dt_proj.bias.exp().clamp(min=spec.dt_floor)
        self.dt_proj.bias.copy_(softplus_inverse(dt))
        rates = torch.arange(1, spec.d_state + 1, dtype=torch.float32)
        self.A_log.copy_(rates.log().expand_as(self.A_log))
        self.D.fill_(1.0)
        if spec.inner_norm is not None:
            for norm in (self.dt_layernorm, self.b_layernorm, self.c_layernorm):
                norm.reset_parameters()
