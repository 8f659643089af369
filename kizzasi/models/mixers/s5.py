"""S5: one diagonal state space that reads all channels and writes all channels.

    log_dt      log of the step size Delta, one per state                        (section 4.3)
    log_A_real  log of minus the real part of Lambda: states always decay
    A_imag      imaginary part of Lambda
    B, C        input and output maps in the eigenbasis, complex as pairs of reals (section 3.1)
    D           skip, one per channel
    n           d_state / 2 (P / 2 in the paper): of each conjugate pair one is kept

Source: Smith, Warrington & Linderman 2023, arXiv:2208.04933.
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
from kizzasi.models.ops.s4 import legs_modes
from kizzasi.models.ops.s5 import DIAGONAL_SCAN, s5_enter, s5_leave
from kizzasi.strict import join, register, require


@register
@dataclass(frozen=True)
class S5Spec(MixerSpec):
    """S5.

    Args:
        d_state: real numbers of state: d_state / 2 conjugate pairs, of which one is kept.
        n_blocks: A starts as so many HiPPO-N matrices along the diagonal.
        dt_min, dt_max: the step sizes of the states start log-uniform between them.
    """

    kind: ClassVar[str] = "s5"
    d_state: int = 64
    n_blocks: int = 4
    dt_min: float = 1e-3
    dt_max: float = 1e-1

    def check(self, d_model: int, path: str) -> None:
        self.require_positive(path, "d_state", "n_blocks", "dt_min")
        near = max(1, round(self.d_state / (2 * self.n_blocks))) * 2 * self.n_blocks
        rule = f"{self.d_state} is not n_blocks {self.n_blocks} times an even number; give {near}"
        require(self.d_state % (2 * self.n_blocks) == 0, join(path, "d_state"), rule)
        rule = f"{self.dt_max} is less than dt_min {self.dt_min}; exchange them"
        require(self.dt_min <= self.dt_max, join(path, "dt_max"), rule)

    def build(self, layer: LayerContext) -> S5:
        return S5(self, layer)

    def cost(self, layer: LayerContext, seq_len: int, batch: int) -> Cost:
        d, n, tokens = layer.d_model, self.d_state, batch * seq_len
        return (
            linear(tokens, d, n)
            + linear(tokens, n, d)
            + linear(tokens, d, d, bias=True)
            + dense(n + n // 2 + d, state_bytes=4 * batch * n)
        )


class S5State(NamedTuple):
    """h (b, d_state / 2) complex."""

    h: Tensor


class S5(Mixer):
    """y = 2 Re C h + D u;    out = g * sigmoid(W g + bias),  g = gelu(y)

    Differs: the real parts of Lambda are negative whatever is learnt, by their logarithm.
    """

    ops = (DIAGONAL_SCAN,)
    float32_parameters = ("log_dt", "log_A_real", "A_imag", "B", "C", "D")
    fan_in = {"B": 1}  # noqa: RUF012 (read-only by contract)
    param_rules: ClassVar[Mapping[str, ParamRule]] = dict.fromkeys(
        ("log_dt", "log_A_real", "A_imag", "B"), ParamRule(decay=False, lr_max=1e-3)
    )

    def __init__(self, spec: S5Spec, layer: LayerContext) -> None:
        super().__init__()
        d, n = layer.d_model, spec.d_state // 2
        self.spec, self.n = spec, n
        self.log_dt = nn.Parameter(torch.empty(n))
        self.log_A_real = nn.Parameter(torch.empty(n))
        self.A_imag = nn.Parameter(torch.empty(n))
        self.B = nn.Parameter(torch.empty(n, d, 2))
        self.C = nn.Parameter(torch.empty(d, n, 2))
        self.D = nn.Parameter(torch.empty(d))
        self.out_proj = nn.Linear(d, d)

    @torch.no_grad()
    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        """Real maps drawn for a real system of HiPPO-N blocks, moved to its eigenbasis.

        B = V* B_real,    C = C_real V,    entries N(0, 1 / fan in)              (section 4.1)
        """
        j, d = self.spec.n_blocks, self.D.shape[0]
        w, V = legs_modes(self.spec.d_state // j)
        V = V.to(self.D.dtype.to_complex())
        self.log_dt.uniform_(
            math.log(self.spec.dt_min), math.log(self.spec.dt_max), generator=generator
        )
        self.log_A_real.fill_(math.log(0.5))
        self.A_imag.copy_(w.repeat(j))
        real = torch.empty(j, V.shape[0], d, dtype=self.D.dtype)
        init.normal_(real, 1 / math.sqrt(d), generator)
        self.B.copy_(torch.view_as_real((V.mH @ real.to(V.dtype)).flatten(0, 1)))
        init.normal_(real, 1 / math.sqrt(self.spec.d_state), generator)
        self.C.copy_(torch.view_as_real((real.mT.to(V.dtype) @ V).transpose(0, 1).flatten(1)))
        init.normal_(self.D, 1.0, generator)
        init.linear_(self.out_proj, generator)

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> S5State:
        kind = state_dtype(dtype).to_complex()
        return S5State(torch.zeros(batch, self.n, device=device, dtype=kind))

    def parallel(self, x: Tensor, state: S5State | None, call: Call) -> MixerOut:
        h0 = None if state is None else state.h
        scan = DIAGONAL_SCAN.pick(self.engine, x.device)
        h = scan(*self._enter(x), h0, call.starts)
        return MixerOut(self._leave(x, h), S5State(h[:, -1].clone()))

    def recurrent(self, x: Tensor, state: S5State, call: Call) -> MixerOut:
        v, a = self._enter(x)
        h = a * state.h + v
        return MixerOut(self._leave(x, h), S5State(h))

    def _enter(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the states take in, and their decays."""
        return s5_enter(x, self.log_dt, self.log_A_real, self.A_imag, self.B)

    def _leave(self, x: Tensor, h: Tensor) -> Tensor:
        g = F.gelu(s5_leave(x, h, self.C, self.D).to(x.dtype))
        return g * self.out_proj(g).sigmoid()
