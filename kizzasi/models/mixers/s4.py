"""S4: a diagonal-plus-low-rank, time-invariant state space per channel, computed as a convolution.

    log_dt      log of the step size Delta, one per channel                      (section 2.3)
    log_A_real  log of minus the real part of Lambda: states always decay       (section 3.1)
    A_imag      imaginary part of Lambda
    P           low-rank factor: A = Lambda - P P*                               (section 3.1)
    B, C        input and output maps
    D           skip from input to output

P, B and C are complex numbers as pairs of reals. Of each conjugate pair one is kept.

Source: Gu, Goel & Re 2022, arXiv:2111.00396.
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
from kizzasi.models.ops.dplr import (
    DPLR,
    S4_SCAN,
    S4Init,
    dplr_start,
    s4_flops,
    s4_step,
    s4_system,
)
from kizzasi.strict import join, register, require

SLOWEST = 1e-4  # least decay rate at the start: HiPPO-FouT has none, and its logarithm is needed


@register
@dataclass(frozen=True)
class S4Spec(MixerSpec):
    """S4 with the bilinear rule.

    Args:
        d_state: order of each channel's system: d_state / 2 conjugate pairs, of which one is kept.
        init: where A, P and B start; see `dplr_start`. "lin" has no low-rank part of its own and
            starts with a random one, since at P = 0 the gradient of P vanishes.
        dt_min, dt_max: the step sizes of the channels start log-uniform between them.
    """

    kind: ClassVar[str] = "s4"
    d_state: int = 64
    init: S4Init = "legs"
    dt_min: float = 1e-3
    dt_max: float = 1e-1

    def check(self, d_model: int, path: str) -> None:
        self.require_positive(path, "d_state", "dt_min")
        rule = f"{self.d_state} is odd and states come in pairs; give an even number"
        require(self.d_state % 2 == 0, join(path, "d_state"), rule)
        rule = f"{self.dt_max} is less than dt_min {self.dt_min}; exchange them"
        require(self.dt_min <= self.dt_max, join(path, "dt_max"), rule)

    def build(self, layer: LayerContext) -> S4:
        return S4(self, layer)

    def cost(self, layer: LayerContext, seq_len: int, batch: int) -> Cost:
        d, n = layer.d_model, self.d_state
        scan = dense(
            d * (4 * n + 2),  # A, P, B and C with n numbers each, log_dt and D with one
            flops=s4_flops(batch, seq_len, d, n),
            state_bytes=4 * batch * d * n,
        )
        return scan + linear(batch * seq_len, d, 2 * d, bias=True)


class S4State(NamedTuple):
    """h (b, d, d_state / 2) complex."""

    h: Tensor


class S4(Mixer):
    """One state space of an `S4Spec` per channel, then a gated linear layer across channels.

    y = SSM(u) + D u;    out = a * sigmoid(g),  [a, g] = W gelu(y) + bias
    """

    ops = (S4_SCAN,)
    float32_parameters = ("log_dt", "log_A_real", "A_imag", "P", "B", "C", "D")
    param_rules: ClassVar[Mapping[str, ParamRule]] = dict.fromkeys(
        ("log_dt", "log_A_real", "A_imag", "P", "B"), ParamRule(decay=False, lr_max=1e-3)
    )

    def __init__(self, spec: S4Spec, layer: LayerContext) -> None:
        super().__init__()
        d, n = layer.d_model, spec.d_state // 2
        self.spec, self.shape = spec, (d, n)
        self.log_dt = nn.Parameter(torch.empty(d))
        self.log_A_real = nn.Parameter(torch.empty(d, n))
        self.A_imag = nn.Parameter(torch.empty(d, n))
        self.P = nn.Parameter(torch.empty(d, n, 2))
        self.B = nn.Parameter(torch.empty(d, n, 2))
        self.C = nn.Parameter(torch.empty(d, n, 2))
        self.D = nn.Parameter(torch.empty(d))
        self.out_proj = nn.Linear(d, 2 * d)

    @torch.no_grad()
    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        A, P, B = dplr_start(self.spec.init, self.spec.d_state)
        low, high = math.log(self.spec.dt_min), math.log(self.spec.dt_max)
        self.log_dt.uniform_(low, high, generator=generator)
        self.log_A_real.copy_((-A.real).clamp(min=SLOWEST).log().expand(self.shape))
        self.A_imag.copy_(A.imag.expand(self.shape))
        self.P.copy_(torch.view_as_real(P + 0j))
        self.B.copy_(torch.view_as_real(B + 0j))
        if self.spec.init == "lin":
            init.normal_(self.P, math.sqrt(0.5), generator)
        init.normal_(self.C, math.sqrt(0.5), generator)
        init.normal_(self.D, 1.0, generator)
        init.linear_(self.out_proj, generator, init.residual_scale(n_layers))

    def fused(self) -> Mapping[str, tuple[int, ...]]:
        return {"out_proj.weight": (self.out_proj.in_features,) * 2}

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> S4State:
        kind = state_dtype(dtype).to_complex()
        return S4State(torch.zeros(batch, *self.shape, device=device, dtype=kind))

    def parallel(self, x: Tensor, state: S4State | None, call: Call) -> MixerOut:
        h0 = None if state is None else state.h
        scan = S4_SCAN.pick(self.engine, x.device)
        y, h = scan(x, self._system(), h0, call.starts)
        return MixerOut(self._readout(x, y), S4State(h))

    def recurrent(self, x: Tensor, state: S4State, call: Call) -> MixerOut:
        y, h = s4_step(x, state.h, self._system())
        return MixerOut(self._readout(x, y), S4State(h))

    def _system(self) -> DPLR:
        return s4_system(self.log_dt, self.log_A_real, self.A_imag, self.P, self.B, self.C)

    def _readout(self, x: Tensor, y: Tensor) -> Tensor:
        y = torch.addcmul(y, self.D, x)
        return F.glu(self.out_proj(F.gelu(y.to(x.dtype))), dim=-1)
