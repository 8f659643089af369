"""Mamba-2: a gated block around a state space with one decay per head.

Symbols: b batch, t time, d d_model.

| here | paper | meaning |
|---|---|---|
| d_inner | E D | channels of the state space: h heads of head_dim p |
| d_state, n | N | states per channel |
| n_groups, g | G | groups of heads that share B and C |
| x, z | X, gate | input of the state space (after convolution), gate |
| dt (b,t,h) | Delta | step size per head, softplus(. + dt_bias), held within dt_limit |
| A_log (h) | log(-A) | decay rate per head |

Source: Dao & Gu 2024, arXiv:2405.21060, section 7; parameters are named as in state-spaces/mamba.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kizzasi.models.call import Call
from kizzasi.models.cost import Cost, dense, linear
from kizzasi.models.init import linear_, softplus_inverse, uniform_
from kizzasi.models.mixer import (
    LayerContext,
    Mixer,
    MixerOut,
    MixerSpec,
    state_dtype,
)
from kizzasi.models.norm import GatedNorm
from kizzasi.models.ops.activations import silu_gated
from kizzasi.models.ops.conv import CAUSAL_CONV1D
from kizzasi.models.ops.precision import full_precision
from kizzasi.models.ops.ssd import SSD, ssd_flops, ssd_step
from kizzasi.models.parts.causal_conv import CausalConv, convolve
from kizzasi.strict import join, register, require


@register
@dataclass(frozen=True)
class Mamba2Spec(MixerSpec):
    """Mamba-2 mixer; also the Mamba layer of Zamba2, Bamba, Granite 4 and Nemotron-H.

    d_state: states per channel.
    d_conv: length of the causal convolution over x, B and C.
    expand: d_inner / d_model. Any ratio that gives whole heads, such as 80 * 64 / 2560.
    head_dim: channels of a head; it divides d_inner.
    n_groups: groups of heads that share B and C; it divides the number of heads.
    dt_min, dt_max: range of the initial step sizes, log-uniform. dt_floor: their smallest value.
    dt_limit: bounds on every step size; None in the second place is no bound.
    rms_norm: normalise each group of the output; without it, the output is gated only.
    norm_before_gate: gate after the norm, not before. norm_eps: its epsilon.
    conv_bias, bias: of the convolution; of in_proj and out_proj.
    """

    kind: ClassVar[str] = "mamba2"
    d_state: int = 128
    d_conv: int = 4
    expand: float = 2.0
    head_dim: int = 64
    n_groups: int = 1
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dt_floor: float = 1e-4
    dt_limit: tuple[float | None, float | None] = (0.0, None)
    rms_norm: bool = True
    norm_before_gate: bool = False
    norm_eps: float = 1e-5
    conv_bias: bool = True
    bias: bool = False

    def check(self, d_model: int, path: str) -> None:
        self.require_positive(path, "d_state", "d_conv", "head_dim", "n_groups")
        p, heads = self.head_dim, self.expand * d_model / self.head_dim
        message = (
            f"{self.expand} times d_model {d_model} makes {heads:g} heads of {p} channels; "
            f"a whole number >= 1 is needed, such as expand = {max(1, round(heads)) * p / d_model}"
        )
        whole = heads >= 0.5 and math.isclose(heads, round(heads), rel_tol=1e-9)
        require(whole, join(path, "expand"), message)
        heads = self.n_heads(d_model)
        message = f"{self.n_groups} does not divide the {heads} heads"
        require(heads % self.n_groups == 0, join(path, "n_groups"), message)
        message = f"{self.dt_min} is not in (0, dt_max {self.dt_max}]"
        require(0 < self.dt_min <= self.dt_max, join(path, "dt_min"), message)
        for name in ("dt_floor", "norm_eps"):
            message = f"{getattr(self, name)} is not positive; give a small number such as 1e-5"
            require(getattr(self, name) > 0, join(path, name), message)
        low, high = self.dt_limit if len(self.dt_limit) == 2 else (None, None)
        ordered = low is not None and low >= 0 and (high is None or low < high)
        message = f"{list(self.dt_limit)} is not [low, high] with 0 <= low < high (or high null)"
        require(ordered, join(path, "dt_limit"), message)

    def n_heads(self, d_model: int) -> int:
        return round(self.expand * d_model / self.head_dim)

    def build(self, layer: LayerContext) -> Mixer:
        return Mamba2(self, layer)

    def cost(self, layer: LayerContext, seq_len: int, batch: int) -> Cost:
        d, n, k, g, p = layer.d_model, self.d_state, self.d_conv, self.n_groups, self.head_dim
        heads, tokens = self.n_heads(d), batch * seq_len
        inner, mixed = heads * p, heads * p + 2 * g * n
        return (
            linear(tokens, d, inner + mixed + heads, bias=self.bias)
            + linear(tokens, inner, d, bias=self.bias)
            + dense(
                params=mixed * (k + self.conv_bias) + 3 * heads + self.rms_norm * inner,
                flops=ssd_flops(batch, seq_len, heads, g, p, n),
                state_bytes=4 * batch * (mixed * (k - 1) + inner * n),
            )
        )


class Mamba2State(NamedTuple):
    """What a Mamba-2 layer carries.

    conv  (b, d_inner + 2 g n, d_conv - 1) last inputs of the convolution
    ssm   (b, h, p, n) the memory, at least float32
    """

    conv: Tensor
    ssm: Tensor


class Mamba2(Mixer):
    """z, xBC, dt = in_proj(u);  x, B, C = silu(conv(xBC));  y = out_proj(norm(ssd(...) + D x, z)).

    ssd is given dt x and the log decays -exp(A_log) dt.
    """

    ops = (CAUSAL_CONV1D, SSD)
    float32_parameters = ("A_log", "D", "dt_bias")

    def __init__(self, spec: Mamba2Spec, layer: LayerContext) -> None:
        super().__init__()
        self.spec = spec
        d, g, n, k = layer.d_model, spec.n_groups, spec.d_state, spec.d_conv
        self.n_heads = spec.n_heads(d)
        self.d_inner = inner = self.n_heads * spec.head_dim
        self.d_xBC = mixed = inner + 2 * g * n
        self.in_proj = nn.Linear(d, inner + mixed + self.n_heads, bias=spec.bias)
        self.conv1d = CausalConv(mixed, mixed, k, groups=mixed, bias=spec.conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.D = nn.Parameter(torch.empty(self.n_heads))
        self.norm = (
            GatedNorm(inner, g, spec.norm_eps, spec.norm_before_gate) if spec.rms_norm else None
        )
        self.out_proj = nn.Linear(inner, d, bias=spec.bias)

    def parallel(self, x: Tensor, state: Mamba2State | None, call: Call) -> MixerOut:
        run = SSD.pick(self.engine, x.device)
        conv_state, ssm = (None, None) if state is None else state
        z, xBC, dt = self._project(x)
        xBC, conv_state = self._convolve(xBC, conv_state, call)
        u, dt, log_decay, B, C = self._streams(xBC, dt)
        y, ssm = run(u * dt, log_decay, B, C, ssm, call.starts)
        return MixerOut(self._finish(y, u, z), Mamba2State(conv_state, ssm))

    def recurrent(self, x: Tensor, state: Mamba2State, call: Call) -> MixerOut:
        z, xBC, dt = self._project(x)
        xBC, conv_state = self._convolve(xBC, state.conv, call)
        u, dt, log_decay, B, C = self._streams(xBC, dt)
        y, ssm = ssd_step(state.ssm, u * dt, log_decay, B, C)
        return MixerOut(self._finish(y, u, z), Mamba2State(conv_state, ssm))

    def fused(self) -> Mapping[str, tuple[int, ...]]:
        states = (self.d_xBC - self.d_inner) // 2
        rows = self.d_inner, self.d_inner, states, states, self.n_heads
        return {"in_proj.weight": rows}

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Mamba2State:
        k, memory = self.spec.d_conv, (self.n_heads, self.spec.head_dim, self.spec.d_state)
        return Mamba2State(
            torch.zeros(batch, self.d_xBC, k - 1, device=device, dtype=dtype),
            torch.zeros(batch, *memory, device=device, dtype=state_dtype(dtype)),
        )

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.in_proj(x).split([self.d_inner, self.d_xBC, self.n_heads], -1)

    def _convolve(self, xBC: Tensor, state: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        k, engine = self.spec.d_conv, self.engine
        return convolve(self.conv1d, k, xBC, state, call, silu=True, engine=engine)

    def _streams(self, xBC: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x (..., h, p), dt (..., h, 1), log decay (..., h), B and C (..., g, n) of `ssd`."""
        g, n = self.spec.n_groups, self.spec.d_state
        u, B, C = xBC.split([self.d_inner, g * n, g * n], -1)
        dt = F.softplus(full_precision(dt) + full_precision(self.dt_bias)).clamp(
            *self.spec.dt_limit
        )
        log_decay = -full_precision(self.A_log).exp() * dt
        u = u.unflatten(-1, (self.n_heads, -1))
        return u, dt.unsqueeze(-1), log_decay, B.unflatten(-1, (g, n)), C.unflatten(-1, (g, n))

    def _finish(self, y: Tensor, u: Tensor, z: Tensor) -> Tensor:
        y = torch.addcmul(y, u, self.D.unsqueeze(-1)).flatten(-2)
        if self.norm is not None:
            return self.out_proj(self.norm(y, z))
        return self.out_proj(silu_gated(y, z))

    @torch.no_grad()
    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        """A uniform in [1, 16], dt log-uniform in [dt_min, dt_max], D one.

        Source: `Mamba2` and `_init_weights` of state-spaces/mamba.
        """
        spec = self.spec
        linear_(self.in_proj, generator)
        linear_(self.out_proj, generator, 1 / math.sqrt(n_layers))
        for parameter in self.conv1d.parameters():
            uniform_(parameter, spec.d_conv**-0.5, generator)
        self.dt_bias.uniform_(math.log(spec.dt_min), math.log(spec.dt_max), generator=generator)
        self.dt_bias.copy_(softplus_inverse(self.dt_bias.exp().clamp(min=spec.dt_floor)))
        self.A_log.uniform_(1, 16, generator=generator).log_()
        self.D.fill_(1.0)
        if self.norm is not None:
            self.norm.reset_parameters()
