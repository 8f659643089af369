"""Griffin's recurrent block: a leaky memory per channel whose leak is gated by the input (RG-LRU).

Symbols: b batch, t time, d d_model, i d_rnn, g n_heads.

| here | paper | meaning |
|---|---|---|
| linear_x, linear_y, linear_out | | the two branches and the way out |
| input_gate, recurrent_gate | W_x b_x, W_a b_a | maps to i_t and r_t, one block a head |
| Lambda (i,) | Lambda | softplus of it is the leak of an open gate, times c |
| c = 8 | c | |
| h (b,i) | h_t | memory |

Source: De et al. 2024, arXiv:2402.19427, sections 2.3 and 2.4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kizzasi.models.call import Call
from kizzasi.models.cost import Cost, dense, linear
from kizzasi.models.init import linear_, residual_scale, uniform_
from kizzasi.models.mixer import NO_DECAY, LayerContext, Mixer, MixerOut, MixerSpec, state_dtype
from kizzasi.models.norm import KeepFloat32
from kizzasi.models.ops.conv import CAUSAL_CONV1D
from kizzasi.models.ops.decay_scan import DECAY_SCAN, decay_scan_step
from kizzasi.models.ops.precision import full_precision, without_autocast
from kizzasi.models.parts.causal_conv import CausalConv, convolve
from kizzasi.strict import join, register, require

C = 8.0


@register
@dataclass(frozen=True)
class RGLRUSpec(MixerSpec):
    """Griffin's recurrent block.

    n_heads: blocks of the two gates' maps, a divisor of d_rnn.
    expand: d_rnn / d_model; their product is a whole number.
    d_conv: length of the causal convolution.
    a_min, a_max: range of the initial decay of an open gate.
    """

    kind: ClassVar[str] = "rg_lru"
    n_heads: int
    expand: float = 1.0
    d_conv: int = 4
    a_min: float = 0.9
    a_max: float = 0.999

    def check(self, d_model: int, path: str) -> None:
        self.require_positive(path, "n_heads", "d_conv")
        width = self.expand * d_model
        whole = width >= 1 and math.isclose(width, round(width), rel_tol=1e-9)
        rule = f"{self.expand} times d_model {d_model} is {width:g}, not a whole number >= 1"
        require(whole, join(path, "expand"), rule)
        rule = f"{self.n_heads} does not divide d_rnn {width:g}; give a divisor"
        require(round(width) % self.n_heads == 0, join(path, "n_heads"), rule)
        rule = f"{self.a_min} and a_max {self.a_max} must rise within (0, 1)"
        require(0 < self.a_min < self.a_max < 1, join(path, "a_min"), rule)

    def d_rnn(self, d_model: int) -> int:
        return round(self.expand * d_model)

    def build(self, layer: LayerContext) -> Mixer:
        return RGLRU(self, layer)

    def cost(self, layer: LayerContext, seq_len: int, batch: int) -> Cost:
        d, i, k, tokens = layer.d_model, self.d_rnn(layer.d_model), self.d_conv, batch * seq_len
        block = i // self.n_heads
        gates = dense(params=2 * i * (block + 1), flops=4 * tokens * i * block)
        kept = dense(params=i * (k + 2), flops=0, state_bytes=batch * (4 * i * k + 8))
        branches = linear(tokens, d, i, bias=True) + linear(tokens, d, i, bias=True)
        return branches + linear(tokens, i, d, bias=True) + gates + kept


class RGLRUState(NamedTuple):
    """conv: (b, d_rnn, d_conv - 1) last inputs. h: (b, d_rnn) memory, at least float32. begun: (b,)
    int64, 1 once a token of the open document has been seen."""

    conv: Tensor
    h: Tensor
    begun: Tensor


class BlockLinear(KeepFloat32):
    """One linear map per head, in at least float32: (..., g n) to (..., g n)."""

    float32_parameters = ("weight", "bias")

    def __init__(self, n_heads: int, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_heads, n, n))  # [head, in, out]
        self.bias = nn.Parameter(torch.empty(n_heads, n))

    def forward(self, x: Tensor) -> Tensor:
        heads = full_precision(x).unflatten(-1, (len(self.weight), -1))
        with without_autocast(x):
            y = torch.einsum("...gi,gij->...gj", heads, full_precision(self.weight))
        return (y + full_precision(self.bias)).flatten(-2)


class RGLRU(Mixer):
    """y = linear_out(gelu(linear_y(x)) * h),  h the memory of u = conv(linear_x(x)):

    h[t] = a[t] h[t-1] + sqrt(1 - a[t]^2) (sigmoid(input_gate(u[t])) u[t])
    log a[t] = -c softplus(Lambda) sigmoid(recurrent_gate(u[t]))

    A document's first token is written whole, without the square root, as in the published models.

    Differs: where a decay is exactly 1 its gradient is 0; the authors bound it.
    """

    ops = (CAUSAL_CONV1D, DECAY_SCAN)
    float32_parameters = ("Lambda",)
    matrices = ("input_gate.weight", "recurrent_gate.weight")
    param_rules = {"Lambda": NO_DECAY}  # noqa: RUF012 (read-only by contract)

    def __init__(self, spec: RGLRUSpec, layer: LayerContext) -> None:
        super().__init__()
        self.spec = spec
        d, i = layer.d_model, spec.d_rnn(layer.d_model)
        self.i = i
        self.linear_x = nn.Linear(d, i)
        self.linear_y = nn.Linear(d, i)
        self.conv_1d = CausalConv(i, i, spec.d_conv, groups=i)
        self.input_gate = BlockLinear(spec.n_heads, i // spec.n_heads)
        self.recurrent_gate = BlockLinear(spec.n_heads, i // spec.n_heads)
        self.Lambda = nn.Parameter(torch.empty(i))
        self.linear_out = nn.Linear(i, d)

    def parallel(self, x: Tensor, state: RGLRUState | None, call: Call) -> MixerOut:
        scan = DECAY_SCAN.pick(self.engine, x.device)
        state = self.init_state(len(x), x.device, x.dtype) if state is None else state
        first = (state.begun == 0)[:, None] & (torch.arange(x.shape[1], device=x.device) == 0)
        first = first if call.starts is None else first | call.starts
        u, last = self._convolve(self.linear_x(x), state.conv, call)
        log_a, u = self._gate(u, first)
        h, after = scan(log_a, u, state.h, call.starts)
        return MixerOut(self._leave(x, h), RGLRUState(last, after, torch.ones_like(state.begun)))

    def recurrent(self, x: Tensor, state: RGLRUState, call: Call) -> MixerOut:
        u, last = self._convolve(self.linear_x(x), state.conv, call)
        log_a, u = self._gate(u, state.begun == 0)
        h = decay_scan_step(state.h, log_a.exp(), u)
        return MixerOut(self._leave(x, h), RGLRUState(last, h, torch.ones_like(state.begun)))

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> RGLRUState:
        return RGLRUState(
            torch.zeros(batch, self.i, self.spec.d_conv - 1, device=device, dtype=dtype),
            torch.zeros(batch, self.i, device=device, dtype=state_dtype(dtype)),
            torch.zeros(batch, device=device, dtype=torch.int64),
        )

    def _convolve(self, u: Tensor, state: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        k, engine = self.spec.d_conv, self.engine
        return convolve(self.conv_1d, k, u, state, call, engine=engine)

    def _gate(self, u: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """log a (..., i), and what is written; first (...) says where a document begins."""
        leak = F.softplus(full_precision(self.Lambda))
        log_a = -C * leak * self.recurrent_gate(u).sigmoid()
        room = -torch.expm1(2 * log_a)
        some = room > 0
        size = torch.where(some, torch.where(some, room, 1.0).sqrt(), 0.0)
        size = size.masked_fill(first.unsqueeze(-1), 1.0)
        return log_a, size * self.input_gate(u).sigmoid() * full_precision(u)

    def _leave(self, x: Tensor, h: Tensor) -> Tensor:
        gate = F.gelu(self.linear_y(x), approximate="tanh")
        return self.linear_out(h.to(gate.dtype) * gate)

    @torch.no_grad()
    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        """Source: De et al. 2024, section 2.4: a = exp(-c softplus(Lambda)) with a^2 uniform."""
        spec = self.spec
        linear_(self.linear_x, generator)
        linear_(self.linear_y, generator)
        linear_(self.linear_out, generator, residual_scale(n_layers))
        for parameter in self.conv_1d.parameters():
            uniform_(parameter, spec.d_conv**-0.5, generator)
        for gate in (self.input_gate, self.recurrent_gate):
            uniform_(gate.weight, gate.weight.shape[1] ** -0.5, generator)
            nn.init.zeros_(gate.bias)
        self.Lambda.uniform_(spec.a_min**2, spec.a_max**2, generator=generator)
        self.Lambda.log_().mul_(-0.5 / C)  # softplus of what it shall be
        self.Lambda.copy_(torch.log(torch.expm1(self.Lambda)))
