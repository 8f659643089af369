"""sLSTM: scalar memory cells with exponential gates that see the last output of their head.

Symbols: b batch, t time, d d_model, h heads, n = d / h cells of a head.

| here | paper | meaning |
|---|---|---|
| zo_proj | W_z, W_o, b | cell input and output gate, from x |
| if_proj | W_i, W_f, b | input and forget gate, from conv(x) |
| R (4,h,n,n) | R | from the last outputs of a head to its four gates |
| head_norm | GN | GroupNorm with one group per head |

Source: Beck et al. 2024, arXiv:2405.04517, section 2.2 and figure 10.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from kizzasi.models.call import Call
from kizzasi.models.cost import Cost, dense, linear
from kizzasi.models.init import linear_, uniform_
from kizzasi.models.mixer import NO_DECAY, LayerContext, Mixer, MixerOut, MixerSpec, state_dtype
from kizzasi.models.norm import HeadNorm, WideLinear
from kizzasi.models.ops.conv import CAUSAL_CONV1D
from kizzasi.models.ops.slstm import SLSTM_SCAN, SLSTMMemory, slstm_flops, slstm_step
from kizzasi.models.parts.causal_conv import CausalConv, convolve
from kizzasi.strict import join, register, require


@register
@dataclass(frozen=True)
class SLSTMSpec(MixerSpec):
    """sLSTM mixer. Its tokens cannot be computed side by side: training takes t steps.

    n_heads: divides d_model.
    d_conv: length of the causal convolution before the input and forget gates.
    norm_eps: of the norm of every head's output.
    """

    kind: ClassVar[str] = "slstm"
    n_heads: int
    d_conv: int = 4
    norm_eps: float = 1e-5

    def check(self, d_model: int, path: str) -> None:
        self.require_positive(path, "n_heads", "d_conv", "norm_eps")
        rule = f"{self.n_heads} does not divide d_model {d_model}; give a divisor"
        require(d_model % self.n_heads == 0, join(path, "n_heads"), rule)

    def build(self, layer: LayerContext) -> Mixer:
        return SLSTM(self, layer)

    def cost(self, layer: LayerContext, seq_len: int, batch: int) -> Cost:
        d, h, k, tokens = layer.d_model, self.n_heads, self.d_conv, batch * seq_len
        n = d // h
        kept = dense(
            params=d * (k + 1) + 4 * d * n + d,
            flops=slstm_flops(batch, seq_len, h, n),
            state_bytes=4 * batch * d * (k - 1 + 4),
        )
        gates = linear(tokens, d, 2 * d, bias=True)
        return gates + gates + kept


class SLSTMState(NamedTuple):
    """conv: (b, d, d_conv - 1) last inputs. memory: see `SLSTMMemory`."""

    conv: Tensor
    memory: SLSTMMemory


class SLSTM(Mixer):
    """y = head_norm(slstm(zo_proj(x), if_proj(silu(conv(x))))).

    Differs: W is dense, as in the paper's equations; the authors' code has one block a head. Forget
    gates begin as in their mLSTM.
    """

    ops = (CAUSAL_CONV1D, SLSTM_SCAN)
    float32_parameters = ("R",)
    fan_in = {"R": -2}  # noqa: RUF012 (read-only by contract)
    param_rules = {"R": NO_DECAY}  # noqa: RUF012 (read-only by contract)

    def __init__(self, spec: SLSTMSpec, layer: LayerContext) -> None:
        super().__init__()
        self.spec, self.d = spec, layer.d_model
        d, h = layer.d_model, spec.n_heads
        self.conv1d = CausalConv(d, d, spec.d_conv, groups=d)
        self.zo_proj = WideLinear(d, 2 * d)
        self.if_proj = WideLinear(d, 2 * d)
        self.R = nn.Parameter(torch.empty(4, h, d // h, d // h))
        self.head_norm = HeadNorm(d, spec.norm_eps, bias=False)

    def parallel(self, x: Tensor, state: SLSTMState | None, call: Call) -> MixerOut:
        before, memory = (None, None) if state is None else state
        u, last = self._convolve(x, before, call)
        run = SLSTM_SCAN.pick(self.engine, x.device)
        y, memory = run(self._gates(x, u), self.R, memory, call.starts)
        return MixerOut(self._leave(x, y), SLSTMState(last, memory))

    def recurrent(self, x: Tensor, state: SLSTMState, call: Call) -> MixerOut:
        u, last = self._convolve(x, state.conv, call)
        memory = slstm_step(state.memory, self._gates(x, u), self.R)
        return MixerOut(self._leave(x, memory.y), SLSTMState(last, memory))

    def fused(self) -> Mapping[str, tuple[int, ...]]:
        return {"zo_proj.weight": (self.d,) * 2, "if_proj.weight": (self.d,) * 2}

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> SLSTMState:
        h, d = self.spec.n_heads, self.d
        cells = [
            torch.zeros(batch, h, d // h, device=device, dtype=state_dtype(dtype)) for _ in range(4)
        ]
        conv = torch.zeros(batch, d, self.spec.d_conv - 1, device=device, dtype=dtype)
        return SLSTMState(conv, SLSTMMemory(*cells))

    def _convolve(self, u: Tensor, state: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        k, engine = self.spec.d_conv, self.engine
        return convolve(self.conv1d, k, u, state, call, silu=True, engine=engine)

    def _gates(self, x: Tensor, u: Tensor) -> Tensor:
        """(..., 4, h, n): z, i, f, o before their functions."""
        z, o = self.zo_proj(x).chunk(2, -1)
        i, f = self.if_proj(u).chunk(2, -1)
        return torch.stack([z, i, f, o], -2).unflatten(-1, (self.spec.n_heads, -1))

    def _leave(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head_norm(y).flatten(-2).to(x.dtype)

    @torch.no_grad()
    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        """Source: NX-AI/xlstm: R begins at zero."""
        for parameter in self.conv1d.parameters():
            uniform_(parameter, self.spec.d_conv**-0.5, generator)
        linear_(self.zo_proj, generator)
        linear_(self.if_proj, generator)
        open_ = torch.linspace(3.0, 6.0, self.spec.n_heads).repeat_interleave(self.R.shape[-1])
        self.if_proj.bias[self.d :].copy_(open_)
        nn.init.zeros_(self.R)
        self.head_norm.reset_parameters()
