"""RWKV-6 (Finch) time mix: token shift and decays that the data decide, and a matrix memory.

Symbols: b batch, t time, d d_model, h heads, n head_dim.

| here | paper | meaning |
|---|---|---|
| time_maa_x (d) | mu_x | share of the token before in what decides the other shares |
| time_maa_w/k/v/r/g (d) | lambda | share of the token before in what each projection sees ... |
| time_maa_w1, time_maa_w2 | A, B | ... and what the data add to it: tanh(x_x w1) w2, five at once |
| time_decay (d), _w1, _w2 | lambda_d, A_d, B_d | log w = -exp(time_decay + tanh(x_w w1) w2) |
| time_faaaa (h,n) | u | weight of the present token, which is read before it is written |
| gate, ln_x | W_g, LayerNorm | output gate, silu(W_g x_g); norm of every head's output |

Source: Peng et al. 2024, arXiv:2404.05892, section 4.2; parameters are named as in RWKV-LM's x060.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kizzasi.models.call import Call
from kizzasi.models.cost import Cost, dense, linear
from kizzasi.models.init import uniform_
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
class RWKV6Spec(MixerSpec):
    """RWKV-6 time mix.

    Args:
        head_dim: channels of a head; d_model is a multiple of it.
        mix_rank, decay_rank: inner widths of the low-rank maps to shares and to decays. None means
            RWKV-LM's rule: 32 and 64, twice that from d_model 4096 on.
    """

    kind: ClassVar[str] = "rwkv6"
    head_dim: int = 64
    mix_rank: int | None = None
    decay_rank: int | None = None

    def check(self, d_model: int, path: str) -> None:
        n = self.head_dim
        rule = f"{n} is no divisor of d_model {d_model} that is at least 2; give one"
        require(n >= 2 and d_model % n == 0, join(path, "head_dim"), rule)
        for name in ("mix_rank", "decay_rank"):
            if getattr(self, name) is not None:
                self.require_positive(path, name)

    def ranks(self, d_model: int) -> tuple[int, int]:
        """Inner width of the maps to shares and to decays."""
        twice = 1 + (d_model >= 4096)
        mix, decay = self.mix_rank, self.decay_rank
        return 32 * twice if mix is None else mix, 64 * twice if decay is None else decay

    def build(self, layer: LayerContext) -> Mixer:
        return RWKV6(self, layer)

    def cost(self, layer: LayerContext, seq_len: int, batch: int) -> Cost:
        d, n, tokens = layer.d_model, self.head_dim, batch * seq_len
        mix_rank, decay_rank = self.ranks(d)
        total = dense(
            params=10 * d,
            flops=linear_attention_flops(batch, seq_len, d // n, n, n),
            state_bytes=4 * batch * (d + d * n),
        )
        total += linear(tokens, d, 5 * mix_rank)
        total += linear(tokens, d, decay_rank) + linear(tokens, decay_rank, d)
        for _ in range(5):
            total += linear(tokens, mix_rank, d) + linear(tokens, d, d)
        return total


class RWKV6State(NamedTuple):
    """shift: (b, d) the last token. wkv: (b, h, n, n) the memory, at least float32."""

    shift: Tensor
    wkv: Tensor


class RWKV6(Mixer):
    """y = W_output (silu(g) HeadNorm(wkv(r, k, v))), each of r, k, v, g a projection of the token
    and the one before it: W (x + share (before - x))."""

    ops = (LINEAR_ATTENTION,)
    float32_parameters = ("time_decay", "time_faaaa")
    matrices = ("time_maa_w1", "time_maa_w2", "time_decay_w1", "time_decay_w2")
    fan_in = dict.fromkeys(matrices, -2)
    param_rules = {  # noqa: RUF012 (read-only by contract)
        "time_decay": ParamRule(decay=False, lr_scale=2.0),
        **dict.fromkeys(
            ("time_faaaa", "time_maa_w1", "time_maa_w2", "time_decay_w1", "time_decay_w2"), NO_DECAY
        ),
    }

    def __init__(self, spec: RWKV6Spec, layer: LayerContext) -> None:
        super().__init__()
        self.layer = layer
        d, n = layer.d_model, spec.head_dim
        mix_rank, decay_rank = spec.ranks(d)

        def free(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape))

        self.time_maa_x, self.time_maa_w, self.time_maa_k = free(d), free(d), free(d)
        self.time_maa_v, self.time_maa_r, self.time_maa_g = free(d), free(d), free(d)
        self.time_maa_w1, self.time_maa_w2 = free(d, 5 * mix_rank), free(5, mix_rank, d)
        self.time_decay = free(d)
        self.time_decay_w1, self.time_decay_w2 = free(d, decay_rank), free(decay_rank, d)
        self.time_faaaa = free(d // n, n)
        self.receptance = nn.Linear(d, d, bias=False)
        self.key = nn.Linear(d, d, bias=False)
        self.value = nn.Linear(d, d, bias=False)
        self.gate = nn.Linear(d, d, bias=False)
        self.output = nn.Linear(d, d, bias=False)
        self.ln_x = HeadNorm(d)

    def parallel(self, x: Tensor, state: RWKV6State | None, call: Call) -> MixerOut:
        shift, wkv = (None, None) if state is None else state
        before, last = token_shift(x, shift, call.starts)
        streams, gate = self._project(x, before)
        run = LINEAR_ATTENTION.pick(self.engine, x.device)
        y, wkv = run(*streams, self.time_faaaa, wkv, call.starts)
        return MixerOut(self._finish(y, gate), RWKV6State(last, wkv))

    def recurrent(self, x: Tensor, state: RWKV6State, call: Call) -> MixerOut:
        streams, gate = self._project(x, state.shift.to(x.dtype))
        y, wkv = linear_attention_step(state.wkv, *streams, self.time_faaaa)
        return MixerOut(self._finish(y, gate), RWKV6State(x, wkv))

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> RWKV6State:
        h, n = self.time_faaaa.shape
        return RWKV6State(
            torch.zeros(batch, h * n, device=device, dtype=dtype),
            torch.zeros(batch, h, n, n, device=device, dtype=state_dtype(dtype)),
        )

    def _project(
        self, x: Tensor, before: Tensor
    ) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """From (..., d) to r, k, v and the log decay (..., h, n), and the gate (..., d)."""
        delta, heads = before - x, self.time_faaaa.shape
        inner = (torch.addcmul(x, delta, self.time_maa_x) @ self.time_maa_w1).tanh()
        shares = torch.einsum(
            "...fr,frd->f...d", inner.unflatten(-1, (5, -1)), self.time_maa_w2
        ).unbind()
        learned = (
            self.time_maa_w,
            self.time_maa_k,
            self.time_maa_v,
            self.time_maa_r,
            self.time_maa_g,
        )
        x_w, x_k, x_v, x_r, x_g = (
            torch.addcmul(x, delta, mix + share) for mix, share in zip(learned, shares, strict=True)
        )
        decay = (x_w @ self.time_decay_w1).tanh() @ self.time_decay_w2
        decay = -(full_precision(self.time_decay) + full_precision(decay)).exp()
        r, k, v = self.receptance(x_r), self.key(x_k), self.value(x_v)
        r, k, v, decay = (s.unflatten(-1, heads) for s in (r, k, v, decay))
        return (r, k, v, decay), F.silu(self.gate(x_g))

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
        for mix in "xwk":
            self.get_parameter(f"time_maa_{mix}").copy_(1.0 - channel**left)
        self.time_maa_v.copy_(1.0 - channel**left - 0.3 * depth)
        self.time_maa_r.copy_(1.0 - channel ** (0.5 * left))
        self.time_maa_g.copy_(1.0 - channel ** (0.5 * left))
        self.time_decay.copy_(-6.0 + 5.0 * ramp ** (0.7 + 1.3 * depth))
        for enter, leave in (
            (self.time_maa_w1, self.time_maa_w2),
            (self.time_decay_w1, self.time_decay_w2),
        ):
            enter.zero_()
            uniform_(leave, 0.01, generator)
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
