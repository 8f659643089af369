"""RWKV-4 time mix: token shift, and an average of all values so far that forgets per channel.

Symbols: b batch, t time, d d_model, i d_inner.

| here | paper | meaning |
|---|---|---|
| time_mix_k/v/r (d) | mu_k, mu_v, mu_r | share of the present token in what each projection sees |
| time_decay (i) | log w | the memory fades by exp(-exp(time_decay)) per token |
| time_first (i) | u | bonus of the present token's key |

Source: Peng et al. 2023, arXiv:2305.13048, section 3; parameters are named as in RWKV-LM's v4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

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
from kizzasi.models.ops.precision import full_precision
from kizzasi.models.ops.shift import token_shift
from kizzasi.models.ops.wkv4 import WKV4, WKV4State, wkv4_step
from kizzasi.strict import register


@register
@dataclass(frozen=True)
class RWKV4Spec(MixerSpec):
    """RWKV-4 time mix.

    Args:
        d_inner: channels of the memory; None means d_model.
    """

    kind: ClassVar[str] = "rwkv4"
    d_inner: int | None = None

    def check(self, d_model: int, path: str) -> None:
        if self.d_inner is not None:
            self.require_positive(path, "d_inner")

    def width(self, d_model: int) -> int:
        """Channels of the memory."""
        return d_model if self.d_inner is None else self.d_inner

    def build(self, layer: LayerContext) -> Mixer:
        return RWKV4(self, layer)

    def cost(self, layer: LayerContext, seq_len: int, batch: int) -> Cost:
        d, d_inner, tokens = layer.d_model, self.width(layer.d_model), batch * seq_len
        total = dense(3 * d + 2 * d_inner, state_bytes=4 * batch * (d + 3 * d_inner))
        for _ in range(3):
            total += linear(tokens, d, d_inner)
        return total + linear(tokens, d_inner, d)


class RWKV4State(NamedTuple):
    """shift: (b, d) the last token. wkv: the sums, each (b, i), at least float32."""

    shift: Tensor
    wkv: WKV4State


class RWKV4(Mixer):
    """y = W_output (sigmoid(r) wkv4(k, v)), each of r, k, v a projection of the token and the one
    before it: W (mix x + (1 - mix) before)."""

    ops = (WKV4,)
    float32_parameters = ("time_decay", "time_first")
    param_rules = {  # noqa: RUF012 (read-only by contract)
        "time_decay": ParamRule(decay=False, lr_scale=2.0),
        "time_first": ParamRule(decay=False, lr_scale=3.0),
    }

    def __init__(self, spec: RWKV4Spec, layer: LayerContext) -> None:
        super().__init__()
        self.layer = layer
        d, d_inner = layer.d_model, spec.width(layer.d_model)
        self.time_decay = nn.Parameter(torch.empty(d_inner))
        self.time_first = nn.Parameter(torch.empty(d_inner))
        self.time_mix_k = nn.Parameter(torch.empty(d))
        self.time_mix_v = nn.Parameter(torch.empty(d))
        self.time_mix_r = nn.Parameter(torch.empty(d))
        self.key = nn.Linear(d, d_inner, bias=False)
        self.value = nn.Linear(d, d_inner, bias=False)
        self.receptance = nn.Linear(d, d_inner, bias=False)
        self.output = nn.Linear(d_inner, d, bias=False)

    def parallel(self, x: Tensor, state: RWKV4State | None, call: Call) -> MixerOut:
        before, last = token_shift(x, None if state is None else state.shift, call.starts)
        r, k, v = self._project(x, before)
        run = WKV4.pick(self.engine, x.device)
        memory = None if state is None else state.wkv
        y, memory = run(
            -full_precision(self.time_decay).exp(), self.time_first, k, v, memory, call.starts
        )
        return MixerOut(self._finish(r, y), RWKV4State(last, memory))

    def recurrent(self, x: Tensor, state: RWKV4State, call: Call) -> MixerOut:
        r, k, v = self._project(x, state.shift.to(x.dtype))
        y, memory = wkv4_step(
            state.wkv, -full_precision(self.time_decay).exp(), self.time_first, k, v
        )
        return MixerOut(self._finish(r, y), RWKV4State(x, memory))

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> RWKV4State:
        shift = torch.zeros(batch, self.layer.d_model, device=device, dtype=dtype)
        shape = (3, batch, len(self.time_decay))
        sums = torch.zeros(shape, device=device, dtype=state_dtype(dtype))
        return RWKV4State(shift, WKV4State(*sums.unbind()))

    @torch.no_grad()
    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        """RWKV-LM's initialisation: ramps over the channels that depend on depth, a memory that
        starts as a plain average (key zero), and a zero output.

        Source: BlinkDL/RWKV-LM, RWKV-v4neo/src/model.py, with `generate_init_weight`.
        """
        d, d_inner, index = self.layer.d_model, len(self.time_decay), self.layer.index
        depth, left = index / max(1, n_layers - 1), 1.0 - index / n_layers
        channel = torch.arange(d, dtype=torch.float32) / d
        ramp = torch.linspace(0.0, 1.0, d_inner, dtype=torch.float32)
        self.time_mix_k.copy_(channel**left)
        self.time_mix_v.copy_(channel**left + 0.3 * depth)
        self.time_mix_r.copy_(channel ** (0.5 * left))
        self.time_decay.copy_(-5.0 + 8.0 * ramp ** (0.7 + 1.3 * depth))
        zigzag = (torch.arange(1, d_inner + 1, dtype=torch.float32) % 3 - 1) * 0.5
        self.time_first.copy_(math.log(0.3) + zigzag)
        gain = max(1.0, math.sqrt(d_inner / d))
        nn.init.orthogonal_(self.value.weight, gain, generator)
        for layer in (self.key, self.receptance, self.output):
            layer.weight.zero_()

    def _project(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From (..., d) to r, k, v (..., i)."""
        delta = x - before
        r = self.receptance(torch.addcmul(before, delta, self.time_mix_r)).sigmoid()
        k = self.key(torch.addcmul(before, delta, self.time_mix_k))
        v = self.value(torch.addcmul(before, delta, self.time_mix_v))
        return r, k, v

    def _finish(self, r: Tensor, y: Tensor) -> Tensor:
        return self.output(r * y.to(r.dtype))
