"""RWKV-7 time mix: token shift, low-rank data-dependent decays and rates, and a delta-rule memory.

Symbols: b batch, t time, d d_model, h heads, n head_dim.

| here | paper | meaning |
|---|---|---|
| x_r ... x_g (d) | mu_r ... mu_g | share of the token before in what each projection sees |
| w0 w1 w2 | lambda_w, A_w, B_w | decay: log w = -exp(-0.5) sigmoid(w0 + tanh(x_w w1) w2) |
| a0 a1 a2 | lambda_a, A_a, B_a | in-context learning rate: sigmoid(a0 + x_a a1 a2) |
| v0 v1 v2 | lambda_v, A_v, B_v | share of the first layer's value: sigmoid(v0 + x_v v1 v2) |
| g1 g2 | A_g, B_g | output gate: sigmoid(x_g g1) g2 |
| k_k, k_a (d) | xi, alpha | removal key = normalised k k_k; written key = k (1 + (a - 1) k_a) |
| r_k (h,n) | rho | weight of the bonus (r . k) v for the present token |

Source: Peng et al. 2025, arXiv:2503.14456, section 4; parameters are named as in RWKV-LM's x070.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
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
from kizzasi.models.ops.precision import full_precision
from kizzasi.models.ops.shift import token_shift
from kizzasi.models.ops.wkv7 import WKV7, wkv7_flops, wkv7_step
from kizzasi.models.ops.wkv7_streams import Streams, mixed_value, wkv7_streams
from kizzasi.strict import added, join, register, require


@register
@dataclass(frozen=True)
class RWKV7Spec(MixerSpec):
    """RWKV-7 time mix.

    Args:
        head_dim: channels of a head; d_model is a multiple of it.
        decay_rank, a_rank, v_rank, gate_rank: inner widths of the low-rank maps. None means
            RWKV-LM's rule: 2.5, 2.5, 1.7 and 5 times sqrt(d_model), to the nearest multiple of 32,
            at least 32.
        value_residual: mix the value of the model's first RWKV-7 into this one's. None means
            RWKV-LM's rule: every RWKV-7 but the first does.
        bias: of the output.
    """

    kind: ClassVar[str] = "rwkv7"
    head_dim: int = 64
    decay_rank: int | None = None
    a_rank: int | None = None
    v_rank: int | None = None
    gate_rank: int | None = None
    value_residual: bool | None = added(None)
    bias: bool = added(False)

    def check(self, d_model: int, path: str) -> None:
        n, where = self.head_dim, f"{path}.head_dim"
        require(n >= 2, where, f"{n} is too small; give at least 2")
        near = max(1, round(d_model / n)) * n
        remedy = f"set d_model to {near}, or head_dim to a divisor of {d_model}"
        require(d_model % n == 0, where, f"{n} does not divide d_model {d_model}; {remedy}")
        for name in ("decay_rank", "a_rank", "v_rank", "gate_rank"):
            if getattr(self, name) is not None:
                self.require_positive(path, name)

    def ranks(self, d_model: int) -> dict[str, int]:
        """Inner width of the low-rank maps w, a, v and g."""
        rules = {
            "w": (self.decay_rank, 2.5),
            "a": (self.a_rank, 2.5),
            "v": (self.v_rank, 1.7),
            "g": (self.gate_rank, 5.0),
        }
        root = math.sqrt(d_model)
        return {
            name: max(32, round(factor * root / 32) * 32) if given is None else given
            for name, (given, factor) in rules.items()
        }

    def settle(self, offered: bool, path: str = "") -> tuple[MixerSpec, bool]:
        takes = offered if self.value_residual is None else self.value_residual
        rule = "no RWKV-7 before it offers a value to mix in; leave it out, or set it to false"
        require(offered or not takes, join(path, "value_residual"), rule)
        return replace(self, value_residual=takes), True

    def build(self, layer: LayerContext) -> Mixer:
        return RWKV7(self, layer)

    def cost(self, layer: LayerContext, seq_len: int, batch: int) -> Cost:
        d, n, tokens = layer.d_model, self.head_dim, batch * seq_len
        ranks = self.ranks(d)
        if not self.value_residual:
            del ranks["v"]
        total = dense(
            params=(13 + ("v" in ranks) + self.bias) * d,
            flops=wkv7_flops(batch, seq_len, d // n, n),
            state_bytes=4 * batch * (d + d * n),
        )
        for rank in ranks.values():
            total += linear(tokens, d, rank) + linear(tokens, rank, d)
        for _ in range(4):
            total += linear(tokens, d, d)
        return total


class RWKV7State(NamedTuple):
    """shift: (b, d) the last token. wkv: (b, h, n, n) the memory, at least float32."""

    shift: Tensor
    wkv: Tensor


class RWKV7(Mixer):
    """y = W_output (gate (HeadNorm(wkv7(...)) + bonus)).

    The first RWKV-7 layer of a model offers its value as shared["v_first"]. Those with a value
    residual have v0, v1, v2, and mix it into their own.
    """

    ops = (WKV7,)
    float32_parameters = ("w0", "a0", "k_k", "k_a", "r_k")
    matrices = ("w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2")
    fan_in = dict.fromkeys(matrices, -2)
    param_rules = {  # noqa: RUF012 (read-only by contract)
        "w0": ParamRule(decay=False, lr_scale=2.0),
        **dict.fromkeys(("w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2", "r_k"), NO_DECAY),
    }

    def __init__(self, spec: RWKV7Spec, layer: LayerContext) -> None:
        super().__init__()
        self.spec, self.layer = spec, layer
        d, n, ranks = layer.d_model, spec.head_dim, spec.ranks(layer.d_model)

        def free(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape))

        self.x_r, self.x_w, self.x_k = free(d), free(d), free(d)
        self.x_v, self.x_a, self.x_g = free(d), free(d), free(d)
        self.w0, self.w1, self.w2 = free(d), free(d, ranks["w"]), free(ranks["w"], d)
        self.a0, self.a1, self.a2 = free(d), free(d, ranks["a"]), free(ranks["a"], d)
        if spec.value_residual:
            self.v0, self.v1, self.v2 = free(d), free(d, ranks["v"]), free(ranks["v"], d)
        self.g1, self.g2 = free(d, ranks["g"]), free(ranks["g"], d)
        self.k_k, self.k_a, self.r_k = free(d), free(d), free(d // n, n)
        self.receptance = nn.Linear(d, d, bias=False)
        self.key = nn.Linear(d, d, bias=False)
        self.value = nn.Linear(d, d, bias=False)
        self.output = nn.Linear(d, d, bias=spec.bias)
        self.ln_x = HeadNorm(d)

    def parallel(self, x: Tensor, state: RWKV7State | None, call: Call) -> MixerOut:
        before, last = token_shift(x, None if state is None else state.shift, call.starts)
        streams, gate, offer = self._project(x, before, call.shared)
        run = WKV7.pick(self.engine, x.device)
        y, s = run(*streams, None if state is None else state.wkv, call.starts)
        return MixerOut(self._finish(y, streams, gate), RWKV7State(last, s), shared=offer)

    def recurrent(self, x: Tensor, state: RWKV7State, call: Call) -> MixerOut:
        streams, gate, offer = self._project(x, state.shift.to(x.dtype), call.shared)
        y, s = wkv7_step(state.wkv, *streams)
        return MixerOut(self._finish(y, streams, gate), RWKV7State(x, s), shared=offer)

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> RWKV7State:
        d, n = self.layer.d_model, self.spec.head_dim
        return RWKV7State(
            torch.zeros(batch, d, device=device, dtype=dtype),
            torch.zeros(batch, d // n, n, n, device=device, dtype=state_dtype(dtype)),
        )

    def _project(
        self, x: Tensor, before: Tensor, shared: Mapping[str, Tensor]
    ) -> tuple[Streams, Tensor, dict[str, Tensor]]:
        """From (..., d) to the inputs (..., h, n) of `wkv7`, the gate (..., d), what to share."""
        delta = before - x
        r = self.receptance(torch.addcmul(x, delta, self.x_r))
        k = self.key(torch.addcmul(x, delta, self.x_k))
        x_v = torch.addcmul(x, delta, self.x_v)
        v = full_precision(self.value(x_v))  # as later layers take it
        offer = {} if "v_first" in shared else {"v_first": v}
        if self.spec.value_residual:
            v = mixed_value(v, shared["v_first"], self.v0, x_v @ self.v1 @ self.v2)
        w = (torch.addcmul(x, delta, self.x_w) @ self.w1).tanh() @ self.w2
        rate = torch.addcmul(x, delta, self.x_a) @ self.a1 @ self.a2
        gate = (torch.addcmul(x, delta, self.x_g) @ self.g1).sigmoid() @ self.g2
        told = (self.w0, self.a0, self.k_k, self.k_a)
        return wkv7_streams(r, w, k, v, rate, *told, self.spec.head_dim), gate, offer

    def _finish(self, y: Tensor, streams: Streams, gate: Tensor) -> Tensor:
        r, _, k, v, _, _ = streams
        bonus = (r * k * self.r_k).sum(-1, keepdim=True)
        y = torch.addcmul(self.ln_x(y), bonus, v).flatten(-2)
        return self.output(y.to(gate.dtype) * gate)

    @torch.no_grad()
    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        """RWKV-LM's initialisation: ramps over the channels that depend on depth, orthogonal
        matrices, and a zero output.

        Source: BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/model.py, with `generate_init_weight`.
        """
        d, n, index = self.layer.d_model, self.spec.head_dim, self.layer.index
        depth, left = index / max(1, n_layers - 1), 1.0 - index / n_layers
        channel = torch.arange(d, dtype=torch.float32) / d
        ramp = torch.linspace(-0.5, 0.5, d, dtype=torch.float32)
        zigzag = torch.linspace(-1.0, 1.0, n, dtype=torch.float32).repeat(d // n)
        zigzag = zigzag * zigzag.abs()
        for mix, power in zip("rwkvag", (0.2, 0.9, 0.7, 0.7, 0.9, 0.2), strict=True):
            self.get_parameter(f"x_{mix}").copy_(1.0 - channel ** (power * left))
        self.w0.copy_(-5.5 + 6.0 * (ramp + 0.5) ** (1.0 + depth**0.3) + 2.5 * zigzag)
        self.a0.copy_(-0.19 + 0.3 * zigzag + 0.4 * ramp)
        low_rank = [(self.w1, self.w2), (self.a1, self.a2), (self.g1, self.g2)]
        if self.spec.value_residual:
            self.v0.copy_(0.73 - 0.4 * ramp)
            low_rank.append((self.v1, self.v2))
        for enter, leave in low_rank:
            enter.zero_()
            gain = 0.1 * max(1.0, math.sqrt(leave.shape[0] / d))
            nn.init.orthogonal_(leave, gain, generator)
        self.k_k.copy_(0.71 - 0.1 * ramp)
        self.k_a.fill_(1.02)
        self.r_k.fill_(-0.04)
        for layer, gain in ((self.receptance, 1.0), (self.key, 0.1), (self.value, 1.0)):
            nn.init.orthogonal_(layer.weight, gain, generator)
        for parameter in self.output.parameters():
            parameter.zero_()
        self.ln_x.reset_parameters(((1 + index) / n_layers) ** 0.7)
