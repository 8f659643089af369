"""RWKV-5.2 (Eagle) time mix: token shift, and a matrix memory that forgets at learned fixed rates.

Symbols: b batch, t time, d d_model, h heads, n head_dim.

| here | paper | meaning |
|---|---|---|
| time_mix_k/v/r/g (d) | 1 - mu | share of the present token in what each projection sees |
| time_decay (h,n) | omega | decay: log w = -exp(time_decay) |
| time_faaaa (h,n) | u | weight of the present token, which is read before it is written |
| gate, ln_x | W_g, LayerNorm | output gate, silu(W_g x_g); norm of every head's output |

Source: Peng et al. 2024, arXiv:2404.05892, section 4.1; parameters are named as in RWKV-LM's x052.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kizzasi.models.call import Call
from kizzasi.models.cost import Cost, dense, linear
from kizzasi.models.mixer import (
    NO_DECAY,
    LayerContext,
    Mixer,
    MixerOut,
    MixerSpec,
    ParamRule,
    state_dtype,
)
from kizzasi.models.norm import HeadNorm
from kizzasi.models.ops.linear_attention import (
    LINEAR_ATTENTION,
    linear_attention_flops,
    linear_attention_step,
)
from kizzasi.models.ops.precision import full_precision
from kizzasi.models.ops.shift import token_shift
from kizzasi.strict import join, register, require


@register
@dataclass(frozen=True)
class RWKV5Spec(MixerSpec):
    """RWKV-5.2 time mix.

    Args:
        head_dim: channels of a head; d_model is a multiple of it.
    """

    kind: ClassVar[str] = "rwkv5"
    head_dim: int = 64

    def check(self, d_model: int, path: str) -> None:
        n = self.head_dim
        rule = f"{n} is no divisor of d_model {d_model} that is at least 2; give one"
        require(n >= 2 and d_model % n == 0, join(path, "head_dim"), rule)

    def build(self, layer: LayerContext) -> Mixer:
        return RWKV5(self, layer)

    def cost(self, layer: LayerContext, seq_len: int, batch: int) -> Cost:
        d, n, tokens = layer.d_model, self.head_dim, batch * seq_len
        total = dense(
            params=8 * d,
            flops=linear_attention_flops(batch, seq_len, d // n, n, n),
            state_bytes=4 * batch * (d + d * n),
        )
        for _ in range(5):
            total += linear(tokens, d, d)
        return total


class RWKV5State(NamedTuple):
    """shift: (b, d) the last token. wkv: (b, h, n, n) the memory, at least float32."""

    shift: Tensor
    wkv: Tensor


class RWKV5(Mixer):
    """y = W_output (silu(g) HeadNorm(wkv(r, k, v))), each of r, k, v, g a projection of the token
    and the one before it: W (mix x + (1 - mix) before)."""

    ops = (LINEAR_ATTENTION,)
    float32_parameters = ("time_decay", "time_faaaa")
    param_rules = {  # noqa: RUF012 (read-only by contract)
        "time_decay": ParamRule(decay=False, lr_scale=2.0),
        "time_faaaa": NO_DECAY,
    }

    def __init__(self, spec: RWKV5Spec, layer: LayerContext) -> None:
        super().__init__()
        self.layer = layer
        d, n = layer.d_model, spec.head_dim
        self.time_mix_k = nn.Parameter(torch.empty(d))
        self.time_mix_v = nn.Parameter(torch.empty(d))
        self.time_mix_r = nn.Parameter(torch.empty(d))
        self.time_mix_g = nn.Parameter(torch.empty(d))
        self.time_decay = nn.Parameter(torch.empty(d // n, n))
        self.time_faaaa = nn.Parameter(torch.empty(d // n, n))
        self.receptance = nn.Linear(d, d, bias=False)
        self.key = nn.Linear(d, d, bias=False)
        self.value = nn.Linear(d, d, bias=False)
        self.gate = nn.Linear(d, d, bias=False)
        self.output = nn.Linear(d, d, bias=False)
        self.ln_x = HeadNorm(d)

    def parallel(self, x: Tensor, state: RWKV5State | None, call: Call) -> MixerOut:
        shift, wkv = (None, None) if state is None else state
        before, last = token_shift(x, shift, call.starts)
        streams, gate = self._project(x, before)
        run = LINEAR_ATTENTION.pick(self.engine, x.device)
        decay = -full_precision(self.time_decay).exp()[None, None]
        y, wkv = run(*streams, decay, self.time_faaaa, wkv, call.starts)
        return MixerOut(self._finish(y, gate), RWKV5State(last, wkv))

    def recurrent(self, x: Tensor, state: RWKV5State, call: Call) -> MixerOut:
        streams, gate = self._project(x, state.shift.to(x.dtype))
        decay = -full_precision(self.time_decay).exp()
        y, wkv = linear_attention_step(state.wkv, *streams, decay, self.time_faaaa)
        return MixerOut(self._finish(y, gate), RWKV5State(x, wkv))

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> RWKV5State:
        h, n = self.time_faaaa.shape
        return RWKV5State(
            torch.zeros(batch, h * n, device=device, dtype=dtype),
            torch.zeros(batch, h, n, n, device=device, dtype=state_dtype(dtype)),
        )

    def _project(self, x: Tensor, before: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """From (..., d) to r, k, v (..., h, n) and the gate (..., d)."""
        delta, heads = x - before, self.time_faaaa.shape
        r, k, v = (
            project(torch.addcmul(before, delta, mix)).unflatten(-1, heads)
            for project, mix in (
                (self.receptance, self.time_mix_r),
                (self.key, self.time_mix_k),
                (self.value, self.time_mix_v),
            )
        )
        return (r, k, v), F.silu(self.gate(torch.addcmul(before, delta, self.time_mix_g)))

    def _finish(self, y: Tensor, gate: Tensor) -> Tensor:
        return self.output(self.ln_x(y).flatten(-2).to(gate.dtype) * gate)

    @torch.no_grad()
    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        """RWKV-LM's initialisation: ramps over the channels that depend on depth, orthogonal
        matrices, and a zero output.

        Source: BlinkDL/RWKV-LM, RWKV-v5/src/model.py, with `generate_init_weight`.
        """
        d, index, heads = self.layer.d_model, self.layer.index, self.time_faaaa.shape
        depth, left = index / max(1, n_layers - 1), 1.0 - index / n_layers
        channel = torch.arange(d, dtype=torch.float32) / d
        ramp = torch.linspace(0.0, 1.0, d, dtype=torch.float32)
        self.time_mix_k.copy_(channel**left)
        self.time_mix_v.copy_(channel**left + 0.3 * depth)
        self.time_mix_r.copy_(channel ** (0.5 * left))
        self.time_mix_g.copy_(channel ** (0.5 * left))
        self.time_decay.copy_((-6.0 + 5.0 * ramp ** (0.7 + 1.3 * depth)).view(heads))
        zigzag = 0.1 * ((torch.arange(d, dtype=torch.float32) + 1) % 3 - 1)
        self.time_faaaa.copy_((depth * (1.0 - ramp) + zigzag).view(heads))
        for layer, gain in (
            (self.receptance, 1.0),
            (self.key, 0.1),
            (self.value, 1.0),
            (self.gate, 0.1),
        ):
            nn.init.orthogonal_(layer.weight, gain, generator)
        self.output.weight.zero_()
        self.ln_x.reset_parameters(((1 + index) / n_layers) ** 0.7)
