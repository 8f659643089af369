"""S4D: a diagonal, time-invariant state space per channel, computed as a convolution.

    log_dt      log of the step size Delta, one per channel                     (section 4.1)
    log_A_real  log of minus the real part of A: states always decay           (section 4.1)
    A_imag      imaginary part of A; absent for init "real"
    C           readout, complex numbers as pairs of reals; B = 1 is folded in  (section 3.2)
    D           skip from input to output

Source: Gu, Gupta, Goel & Re 2022, arXiv:2206.11893; the layer around it: arXiv:2111.00396.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kizzasi.models import init
from kizzasi.models.call import Call
from kizzasi.models.cost import Cost, dense, linear
from kizzasi.models.mixer import (
    LayerContext,
    Mixer,
    MixerOut,
    MixerSpec,
    ParamRule,
    state_dtype,
)
from kizzasi.models.ops.s4 import (
    S4D_SCAN,
    Discretization,
    S4DInit,
    block_lengths,
    s4d_poles,
    s4d_step,
    s4d_system,
)
from kizzasi.strict import join, register, require


@register
@dataclass(frozen=True)
class S4DSpec(MixerSpec):
    """Diagonal S4.

    Args:
        d_state: real numbers of state per channel: d_state / 2 conjugate pairs, of which one each
            is kept, or d_state real states for init "real".
        init: where A starts; see `s4d_poles`.
        dt_min, dt_max: the step sizes of the channels start log-uniform between them.
        discretization: "zoh" or "bilinear".
    """

    kind: ClassVar[str] = "s4d"
    d_state: int = 64
    init: S4DInit = "lin"
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    discretization: Discretization = "zoh"

    def check(self, d_model: int, path: str) -> None:
        self.require_positive(path, "d_state", "dt_min")
        paired = self.init == "real" or self.d_state % 2 == 0
        rule = f'{self.d_state} is odd and states come in pairs; give an even number or init "real"'
        require(paired, join(path, "d_state"), rule)
        rule = f"{self.dt_max} is less than dt_min {self.dt_min}; exchange them"
        require(self.dt_min <= self.dt_max, join(path, "dt_max"), rule)

    def build(self, layer: LayerContext) -> S4D:
        return S4D(self, layer)

    def cost(self, layer: LayerContext, seq_len: int, batch: int) -> Cost:
        d, n = layer.d_model, self.d_state
        per_row = 2 * d * n * math.prod(block_lengths(seq_len))
        scan = dense(
            d * (2 * n + 2),  # A and C with n numbers each, log_dt and D with one
            flops=(1 + batch) * per_row,  # the kernel, and the last state of every row
            state_bytes=4 * batch * d * n,
        )
        return scan + linear(batch * seq_len, d, 2 * d, bias=True)


class S4DState(NamedTuple):
    """h (b, d, d_state / 2) complex, or (b, d, d_state) real for init "real"."""

    h: Tensor


class S4D(Mixer):
    """One state space of an `S4DSpec` per channel, then a gated linear layer across channels.

    y = SSM(u) + D u;    out = a * sigmoid(g),  [a, g] = W gelu(y) + bias
    """

    ops = (S4D_SCAN,)
    float32_parameters = ("log_dt", "log_A_real", "A_imag", "C", "D")
    param_rules: ClassVar[Mapping[str, ParamRule]] = dict.fromkeys(
        ("log_dt", "log_A_real", "A_imag"), ParamRule(decay=False, lr_max=1e-3)
    )

    def __init__(self, spec: S4DSpec, layer: LayerContext) -> None:
        super().__init__()
        d, real = layer.d_model, spec.init == "real"
        n = spec.d_state if real else spec.d_state // 2
        self.spec, self.shape = spec, (d, n)
        self.log_dt = nn.Parameter(torch.empty(d))
        self.log_A_real = nn.Parameter(torch.empty(d, n))
        self.A_imag = None if real else nn.Parameter(torch.empty(d, n))
        self.C = nn.Parameter(torch.empty((d, n) if real else (d, n, 2)))
        self.D = nn.Parameter(torch.empty(d))
        self.out_proj = nn.Linear(d, 2 * d)

    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        real, imag = s4d_poles(self.spec.init, self.spec.d_state)
        low, high = math.log(self.spec.dt_min), math.log(self.spec.dt_max)
        with torch.no_grad():
            self.log_dt.uniform_(low, high, generator=generator)
            self.log_A_real.copy_((-real).log().expand(self.shape))
            if self.A_imag is not None:
                self.A_imag.copy_(imag.expand(self.shape))
        init.normal_(self.C, 1.0 if self.A_imag is None else math.sqrt(0.5), generator)
        init.normal_(self.D, 1.0, generator)
        init.linear_(self.out_proj, generator, init.residual_scale(n_layers))

    def fused(self) -> Mapping[str, tuple[int, ...]]:
        return {"out_proj.weight": (self.out_proj.in_features,) * 2}

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> S4DState:
        real = state_dtype(dtype)
        kind = real if self.A_imag is None else real.to_complex()
        return S4DState(torch.zeros(batch, *self.shape, device=device, dtype=kind))

    def parallel(self, x: Tensor, state: S4DState | None, call: Call) -> MixerOut:
        h0 = None if state is None else state.h
        scan = S4D_SCAN.pick(self.engine, x.device)
        y, h = scan(x, *self._system(), h0, call.starts)
        return MixerOut(self._readout(x, y), S4DState(h))

    def recurrent(self, x: Tensor, state: S4DState, call: Call) -> MixerOut:
        y, h = s4d_step(x, state.h, *self._system())
        return MixerOut(self._readout(x, y), S4DState(h))

    def _system(self) -> tuple[Tensor, Tensor, Tensor]:
        method = self.spec.discretization
        return s4d_system(self.log_dt, self.log_A_real, self.A_imag, self.C, method)

    def _readout(self, x: Tensor, y: Tensor) -> Tensor:
        y = torch.addcmul(y, self.D, x)
        return F.glu(self.out_proj(F.gelu(y.to(x.dtype))), dim=-1)
