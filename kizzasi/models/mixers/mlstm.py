"""mLSTM, the layer of xLSTM-7B: a matrix memory with exponential input gates.

Symbols: b batch, t time, d d_model, h heads, n channels of a key, p channels of a value.

| here | paper | meaning |
|---|---|---|
| q_proj, k_proj, v_proj | W_q, W_k, W_v | queries (read with n^-0.5), keys, values |
| i_gate, f_gate | w_i, w_f | input and forget gates of every head, before exp and sigmoid |
| o_gate | W_o | output gate |
| cap | 15 | gates are cap tanh(. / cap) |

Source: Beck et al. 2024, arXiv:2405.04517, section 2.3; Beck et al. 2025, arXiv:2503.13427,
section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kizzasi.models.call import Call
from kizzasi.models.cost import Cost, dense, linear
from kizzasi.models.init import linear_, residual_scale
from kizzasi.models.mixer import LayerContext, Mixer, MixerOut, MixerSpec, state_dtype
from kizzasi.models.norm import HeadNorm, WideLinear
from kizzasi.models.ops.mlstm import MLSTM_SCAN, MLSTMMemory, mlstm_flops, mlstm_step
from kizzasi.strict import join, register, require


@register
@dataclass(frozen=True)
class MLSTMSpec(MixerSpec):
    """mLSTM mixer.

    n_heads: divides the widths of all keys and of all values.
    expand_k, expand_v: width of all keys and of all values / d_model.
    gate_cap: soft limit of the two gates before exp and sigmoid.
    norm_eps: of the LayerNorm of every head's output.
    """

    kind: ClassVar[str] = "mlstm"
    n_heads: int
    expand_k: float = 0.5
    expand_v: float = 1.0
    gate_cap: float = 15.0
    norm_eps: float = 1e-6

    def check(self, d_model: int, path: str) -> None:
        self.require_positive(path, "n_heads", "gate_cap", "norm_eps")
        for name in ("expand_k", "expand_v"):
            width = getattr(self, name) * d_model / self.n_heads
            rule = f"{getattr(self, name)} times d_model {d_model} over {self.n_heads} heads is "
            rule += f"{width:g}, not a whole number >= 1"
            require(width >= 1 and width == round(width), join(path, name), rule)

    def head_widths(self, d_model: int) -> tuple[int, int]:
        """Channels of a key and of a value."""
        h = self.n_heads
        return round(self.expand_k * d_model / h), round(self.expand_v * d_model / h)

    def build(self, layer: LayerContext) -> Mixer:
        return MLSTM(self, layer)

    def cost(self, layer: LayerContext, seq_len: int, batch: int) -> Cost:
        d, h, tokens = layer.d_model, self.n_heads, batch * seq_len
        n, p = self.head_widths(d)
        total = dense(
            params=h * p,
            flops=mlstm_flops(batch, seq_len, h, n, p),
            state_bytes=4 * batch * h * (n * p + n + 1),
        )
        for _ in range(2):
            total += linear(tokens, d, h * n) + linear(tokens, d, h * p)
            total += linear(tokens, d, h, bias=True)
        return total + linear(tokens, h * p, d)


class MLSTM(Mixer):
    """y = out_proj(sigmoid(o_gate(x)) * norm(mlstm(q, k, v, i, logsigmoid(f)))).

    q, k, v = q_proj(x) / sqrt(n), k_proj(x), v_proj(x);  i = cap tanh(i_gate(x) / cap), f likewise.
    The state is `MLSTMMemory`.
    """

    ops = (MLSTM_SCAN,)

    def __init__(self, spec: MLSTMSpec, layer: LayerContext) -> None:
        super().__init__()
        self.spec = spec
        d, h = layer.d_model, spec.n_heads
        self.n, self.p = spec.head_widths(d)
        self.q_proj = nn.Linear(d, h * self.n, bias=False)
        self.k_proj = nn.Linear(d, h * self.n, bias=False)
        self.v_proj = nn.Linear(d, h * self.p, bias=False)
        self.o_gate = nn.Linear(d, h * self.p, bias=False)
        self.i_gate = WideLinear(d, h)
        self.f_gate = WideLinear(d, h)
        self.head_norm = HeadNorm(h * self.p, spec.norm_eps, bias=False)
        self.out_proj = nn.Linear(h * self.p, d, bias=False)

    def parallel(self, x: Tensor, state: MLSTMMemory | None, call: Call) -> MixerOut:
        run = MLSTM_SCAN.pick(self.engine, x.device)
        y, state = run(*self._streams(x), state, call.starts)
        return MixerOut(self._leave(x, y), state)

    def recurrent(self, x: Tensor, state: MLSTMMemory, call: Call) -> MixerOut:
        y, state = mlstm_step(state, *self._streams(x))
        return MixerOut(self._leave(x, y), state)

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> MLSTMMemory:
        h, dtype = self.spec.n_heads, state_dtype(dtype)
        shapes = (batch, h, self.n, self.p), (batch, h, self.n), (batch, h)
        return MLSTMMemory(*(torch.zeros(s, device=device, dtype=dtype) for s in shapes))

    def _streams(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k (..., h, n), v (..., h, p), log_i and log_f (..., h) of x (..., d)."""
        h, cap = self.spec.n_heads, self.spec.gate_cap
        q, k, v = (f(x).unflatten(-1, (h, -1)) for f in (self.q_proj, self.k_proj, self.v_proj))
        i, f = (cap * torch.tanh(gate(x) / cap) for gate in (self.i_gate, self.f_gate))
        return q * self.n**-0.5, k, v, i, F.logsigmoid(f)

    def _leave(self, x: Tensor, y: Tensor) -> Tensor:
        gate = self.o_gate(x).sigmoid()
        return self.out_proj(gate * self.head_norm(y).flatten(-2).to(gate.dtype))

    @torch.no_grad()
    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        """Source: Beck et al. 2025, appendix: input gates begin closed, forget gates open."""
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.o_gate):
            linear_(layer, generator)
        linear_(self.out_proj, generator, residual_scale(n_layers))
        nn.init.zeros_(self.i_gate.weight)
        nn.init.constant_(self.i_gate.bias, -10.0)
        nn.init.zeros_(self.f_gate.weight)
        self.f_gate.bias.copy_(torch.linspace(3.0, 6.0, self.spec.n_heads))
        self.head_norm.reset_parameters()
