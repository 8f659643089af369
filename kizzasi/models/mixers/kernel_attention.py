"""Attention whose kernel is a product of positive features, so that it has a state of fixed size.

Symbols: b batch, t time, d d_model, h heads, n channels of a head, m features of a key or query.

| here | paper | meaning |
|---|---|---|
| features (m, n) | w_i | random directions, one set for all heads; orthogonal within blocks of n |
| spread (m,) | | how wide each feature's Gaussian is ("laplace" alone) |
| memory (b, h, m, n + 1) | S, z | sum of phi(k) v^T; its last column sums phi(k) alone |

Source: FAVOR+: Choromanski et al. 2020, arXiv:2009.14794, sections 2.3 and 2.4 and algorithm 1.
elu + 1: Katharopoulos et al. 2020, arXiv:2006.16236.
Differs: the paper's code divides the features of keys by the largest of all, which later ones would
change; here they are as they are, bounded by exp(|w|^2 / 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kizzasi.models.adaptive import Adaptive
from kizzasi.models.call import Call
from kizzasi.models.cost import Cost, dense, linear
from kizzasi.models.init import linear_, residual_scale
from kizzasi.models.mixer import LayerContext, Mixer, MixerOut, MixerSpec, state_dtype
from kizzasi.models.ops.linear_attention import (
    LINEAR_ATTENTION,
    linear_attention_flops,
    linear_attention_step,
)
from kizzasi.models.ops.precision import full_precision, without_autocast
from kizzasi.strict import join, register, require

TINY = 1e-6  # added to every feature, so that nothing is divided by zero
WIDEST = 100.0  # bound on the spread of a feature, which falls off like a power
MOST = 128  # channels of a head: exp(|w|^2 / 2) of wider ones leaves float32


@register
@dataclass(frozen=True)
class KernelAttentionSpec(MixerSpec):
    """Linear attention of positive features, y = phi(q) S / (phi(q) z).

    Args:
        n_heads: heads.
        head_dim: width of a head; None means d_model / n_heads.
        feature: "favor" stands for exp(q . k), "gaussian" for exp(-|q - k|^2 / 2), "laplace" for
            exp(-|q - k|), q and k divided by head_dim^(1/4); "elu" is elu(x) + 1.
        n_features: random features; more come nearer to their kernel. "elu" has head_dim.
        orthogonal: make the directions orthogonal in blocks of head_dim, for less variance.
        redraw: draw new directions every so many optimiser steps (`model.after_step()`); 0: never.
        qkv_bias, out_bias: biases of q_proj, k_proj, v_proj, and of o_proj.
    """

    kind: ClassVar[str] = "kernel_attention"
    n_heads: int
    head_dim: int | None = None
    feature: Literal["favor", "gaussian", "laplace", "elu"] = "favor"
    n_features: int = 64
    orthogonal: bool = True
    redraw: int = 0
    qkv_bias: bool = False
    out_bias: bool = False

    def check(self, d_model: int, path: str) -> None:
        self.require_positive(path, "n_heads", "n_features")
        rule = f"{self.n_heads} does not divide d_model {d_model}; give a divisor, or head_dim"
        fits = self.head_dim is not None or d_model % self.n_heads == 0
        require(fits, join(path, "n_heads"), rule)
        n = self.width(d_model)
        rule = f"heads of {n} channels leave float32's range; give at most {MOST}, or elu"
        require(1 <= n <= MOST or (self.feature == "elu" and n > 0), join(path, "head_dim"), rule)
        require(self.redraw >= 0, join(path, "redraw"), f"{self.redraw} is negative; give 0")
        rule = "elu draws nothing; leave it out"
        require(self.feature != "elu" or not self.redraw, join(path, "redraw"), rule)

    def width(self, d_model: int) -> int:
        """Channels of a head."""
        return d_model // self.n_heads if self.head_dim is None else self.head_dim

    def size(self, d_model: int) -> int:
        """Features of a query or key."""
        return self.width(d_model) if self.feature == "elu" else self.n_features

    def build(self, layer: LayerContext) -> Mixer:
        return KernelAttention(self, layer)

    def cost(self, layer: LayerContext, seq_len: int, batch: int) -> Cost:
        d, h, tokens = layer.d_model, self.n_heads, batch * seq_len
        n, m = self.width(d), self.size(d)
        total = linear(tokens, h * n, d, bias=self.out_bias)
        for _ in "qkv":
            total += linear(tokens, d, h * n, bias=self.qkv_bias)
        flops = linear_attention_flops(batch, seq_len, h, m, n + 1)
        if self.feature != "elu":
            flops += 2 * (2 * tokens * h * n * m)
        return total + dense(0, flops=flops, state_bytes=4 * batch * h * m * (n + 1))


class KernelAttentionState(NamedTuple):
    """memory: (b, h, m, n + 1), at least float32."""

    memory: Tensor


class KernelAttention(Mixer, Adaptive):
    """S[t] = S[t-1] + phi(k[t]) [v[t], 1]^T;  [y, z] = phi(q[t]) S[t];  out = o_proj(y / z).

    favor      phi_i(x) = exp(w_i . x - |x|^2 / 2)
    gaussian   phi_i(x) = exp(w_i . x - |x|^2)
    laplace    phi_i(x) = exp(r_i w_i . x - r_i^2 |x|^2),  1 / r_i^2 ~ chi^2 of 1 degree: a mixture
               of Gaussians, exp(-|a|) = E exp(-r^2 |a|^2 / 2)
    """

    ops = (LINEAR_ATTENTION,)
    float32_parameters = ("features", "spread")

    def __init__(self, spec: KernelAttentionSpec, layer: LayerContext) -> None:
        super().__init__()
        d, h = layer.d_model, spec.n_heads
        self.spec, self.n, self.m = spec, spec.width(d), spec.size(d)
        # Saved: a resumed training draws what it would have drawn.
        steps = torch.zeros((), dtype=torch.int64) if spec.redraw else None
        self.register_buffer("steps", steps)
        self.q_proj = nn.Linear(d, h * self.n, bias=spec.qkv_bias)
        self.k_proj = nn.Linear(d, h * self.n, bias=spec.qkv_bias)
        self.v_proj = nn.Linear(d, h * self.n, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(h * self.n, d, bias=spec.out_bias)
        if spec.feature != "elu":
            self.register_buffer("features", torch.empty(self.m, self.n))
            self.register_buffer("spread", torch.empty(self.m))

    steps: Tensor | None
    features: Tensor
    spread: Tensor

    def parallel(self, x: Tensor, state: KernelAttentionState | None, call: Call) -> MixerOut:
        run = LINEAR_ATTENTION.pick(self.engine, x.device)
        q, k, v = self._streams(x)
        before = None if state is None else state.memory
        with without_autocast(x):
            y, memory = run(q, k, v, self._no_decay(q)[None, None], None, before, call.starts)
        return MixerOut(self._leave(x, y), KernelAttentionState(memory))

    def recurrent(self, x: Tensor, state: KernelAttentionState, call: Call) -> MixerOut:
        q, k, v = self._streams(x)
        with without_autocast(x):
            y, memory = linear_attention_step(state.memory, q, k, v, self._no_decay(q))
        return MixerOut(self._leave(x, y), KernelAttentionState(memory))

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> KernelAttentionState:
        shape = batch, self.spec.n_heads, self.m, self.n + 1
        return KernelAttentionState(torch.zeros(shape, device=device, dtype=state_dtype(dtype)))

    def _streams(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """phi(q), phi(k) (..., h, m) and [v, 1] (..., h, n + 1) of x (..., d)."""
        q, k, v = (
            full_precision(project(x)).unflatten(-1, (self.spec.n_heads, -1))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        with without_autocast(x):
            return self._phi(q, True), self._phi(k, False), F.pad(v, (0, 1), value=1.0)

    def _phi(self, x: Tensor, query: bool) -> Tensor:
        """Features of queries, whose own size cancels out, or of keys."""
        if self.spec.feature == "elu":
            return F.elu(x) + 1
        x = x * self.n**-0.25
        directions, half = (
            full_precision(self.features).to(x.dtype),
            x.square().sum(-1, keepdim=True),
        )
        if self.spec.feature == "favor":
            exponent = x @ directions.mT - half / 2
        elif self.spec.feature == "gaussian":
            exponent = x @ directions.mT - half
        else:
            spread = full_precision(self.spread).to(x.dtype)
            exponent = (x @ directions.mT) * spread - half * spread.square()
        if query:
            exponent = exponent - exponent.detach().amax(-1, keepdim=True)
        return (exponent.exp() + TINY) * self.m**-0.5

    def _no_decay(self, like: Tensor) -> Tensor:
        """(h, 1) log of what a head keeps: all."""
        return like.new_zeros(self.spec.n_heads, 1)

    def _leave(self, x: Tensor, y: Tensor) -> Tensor:
        y = y[..., :-1] / y[..., -1:]
        return self.o_proj(y.flatten(-2).to(x.dtype))

    def take(self) -> Tensor | None:
        return torch.zeros(1) if self.spec.redraw and self.training else None

    def after_step(self, counted: Tensor) -> None:
        assert self.steps is not None, "asked"
        self.steps += 1
        done = int(self.steps)
        if done % self.spec.redraw == 0:  # of the steps alone: all processes draw alike
            self._draw(torch.Generator().manual_seed(done))

    @torch.no_grad()
    def _draw(self, generator: torch.Generator | None) -> None:
        """Directions whose lengths are those of Gaussian vectors."""
        m, n = self.m, self.n

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

        rows = normal(m, n)
        if self.spec.orthogonal:
            blocks = [_rotation(normal(n, n)) for _ in range(-(-m // n))]
            rows = torch.cat(blocks)[:m] * rows.norm(dim=1, keepdim=True)
        self.features.copy_(rows)
        self.spread.copy_(normal(m).abs().clamp(min=WIDEST**-0.5).reciprocal())

    @torch.no_grad()
    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        for layer in (self.q_proj, self.k_proj, self.v_proj):
            linear_(layer, generator)
        linear_(self.o_proj, generator, residual_scale(n_layers))
        if self.steps is not None:
            self.steps.zero_()
        if self.spec.feature != "elu":
            self._draw(generator)


def _rotation(gaussian: Tensor) -> Tensor:
    """A uniformly random orthogonal matrix: the signs that QR chooses are not."""
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign()
