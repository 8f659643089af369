"""Mamba-3: a state space with the trapezoidal rule, rotating keys and no convolution.

Symbols: b batch, t time, d d_model.

| here | paper | meaning |
|---|---|---|
| d_inner | E D | channels of the state space: h heads of head_dim p |
| d_state, n | N | states per channel |
| n_groups, g | G | groups of heads that share B and C up to their biases |
| x, z | x, z | input of the state space, gate |
| dt (b,t,h) | Delta | step size per head, softplus(. + dt_bias) |
| log_decay | Delta A | A per token and head, -a_activation(.) but at most -A_floor |
| share | lambda | weight of a step's right end, sigmoid(.) |
| speed, angle (b,t,h,s) | theta, its sum | turn of a pair of states at a token; in total |
| k, v | B, x | what the last token wrote: its rotated key B, and its x |
| rank, r | R | inputs and outputs of a head: 1 is SISO, more are MIMO |
| mimo_x, mimo_z, mimo_o (h,r,p) | | factors: r inputs of x, r gates of z, y of r outputs |

Source: arXiv:2603.15569, section 3; parameters are named as in state-spaces/mamba.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from kizzasi.models.call import Call
from kizzasi.models.cost import Cost, dense, linear
from kizzasi.models.init import linear_, softplus_inverse
from kizzasi.models.mixer import (
    NO_DECAY,
    LayerContext,
    Mixer,
    MixerOut,
    MixerSpec,
    state_dtype,
)
from kizzasi.models.norm import GatedNorm, Norm
from kizzasi.models.ops.activations import silu_gated
from kizzasi.models.ops.mamba3 import (
    TURN,
    Activation,
    mamba3_steps,
    rotate_halves,
    rotate_pairs,
    summed_angles,
    turns,
)
from kizzasi.models.ops.mimo import MIMO_TRAPEZOID, mimo_flops, mimo_trapezoid_step
from kizzasi.models.ops.precision import full_precision
from kizzasi.models.ops.ssd import (
    TRAPEZOID,
    TrapezoidState,
    ssd_flops,
    trapezoid_step,
)
from kizzasi.strict import added, join, register, require

NORM_EPS = 1e-5


@register
@dataclass(frozen=True)
class Mamba3Spec(MixerSpec):
    """Mamba-3 mixer.

    d_state: states per channel.
    expand: d_inner / d_model. Any ratio that gives whole heads.
    head_dim: channels of a head; it divides d_inner.
    n_groups: groups of heads that share B and C; it divides the number of heads.
    rope_fraction: share of the states that rotate.
    a_activation: what makes a decay rate positive, "softplus" as in the paper, or "heavy_tail",
        1 + x for x >= 0 and 1 / (1 - x) below, as published since June 2026. Weights trained with
        one are wrong with the other.
    A_floor: the smallest decay rate.
    dt_min, dt_max: range of the initial step sizes, log-uniform. dt_floor: their smallest value.
    rank: values that a head writes at a token, and keys that it reads by (MIMO); 1 is SISO. With
        more, states rotate in pairs (i, i + d_state / 2), as in the published kernels.
    out_norm: normalise the output of every head before it is gated. norm_eps: its epsilon.
    """

    kind: ClassVar[str] = "mamba3"
    d_state: int = 128
    expand: float = 2.0
    head_dim: int = 64
    n_groups: int = 1
    rope_fraction: float = 0.5
    a_activation: Activation = "softplus"
    A_floor: float = 1e-4
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dt_floor: float = 1e-4
    rank: int = added(1)
    out_norm: bool = added(False)
    norm_eps: float = added(NORM_EPS)

    def check(self, d_model: int, path: str) -> None:
        self.require_positive(path, "d_state", "head_dim", "n_groups", "rank", "norm_eps")
        p, heads = self.head_dim, self.expand * d_model / self.head_dim
        message = (
            f"{self.expand} times d_model {d_model} makes {heads:g} heads of {p} channels; "
            f"a whole number >= 1 is needed, such as expand = {max(1, round(heads)) * p / d_model}"
        )
        whole = heads >= 0.5 and math.isclose(heads, round(heads), rel_tol=1e-9)
        require(whole, join(path, "expand"), message)
        heads = self.n_heads(d_model)
        message = f"{self.n_groups} does not divide the {heads} heads"
        require(heads % self.n_groups == 0, join(path, "n_groups"), message)
        share = self.rope_fraction
        message = f"{share} of d_state {self.d_state} is not at least one pair, or more than all"
        require(share <= 1 and self.n_angles >= 1, join(path, "rope_fraction"), message)
        message = f"{self.d_state} states do not split into halves; give an even number, or rank 1"
        require(self.rank == 1 or self.d_state % 2 == 0, join(path, "d_state"), message)
        message = f"{self.dt_min} is not in (0, dt_max {self.dt_max}]"
        require(0 < self.dt_min <= self.dt_max, join(path, "dt_min"), message)
        for name in ("A_floor", "dt_floor"):
            message = f"{getattr(self, name)} is not positive; give a small number such as 1e-4"
            require(getattr(self, name) > 0, join(path, name), message)

    def n_heads(self, d_model: int) -> int:
        return round(self.expand * d_model / self.head_dim)

    @property
    def n_angles(self) -> int:
        """How many pairs of states rotate."""
        return int(self.d_state * self.rope_fraction) // 2

    def build(self, layer: LayerContext) -> Mixer:
        return Mamba3(self, layer)

    def cost(self, layer: LayerContext, seq_len: int, batch: int) -> Cost:
        d, n, p, tokens = layer.d_model, self.d_state, self.head_dim, batch * seq_len
        heads, angles = self.n_heads(d), self.n_angles
        inner, r = heads * p, self.rank
        flops = ssd_flops(batch, seq_len, heads, heads, p, n)
        if r > 1:
            flops = mimo_flops(batch, seq_len, heads, r, p, n)
        return (
            linear(tokens, d, 2 * inner + 2 * self.n_groups * r * n + 3 * heads + angles)
            + linear(tokens, inner, d)
            + dense(
                params=2 * heads + 2 * heads * r * n + 2 * n + inner * self.out_norm,
                flops=flops,
                state_bytes=4 * batch * heads * (angles + p * n + r * n + p),
            )
            + dense(3 * r * inner if r > 1 else 0)
        )


class Mamba3State(NamedTuple):
    """What a Mamba-3 layer carries, all in at least float32.

    angle  (b, h, s) in [0, 2 pi)
    ssm    (b, h, p, n) the memory
    k, v   (b, h, n) and (b, h, p), key and value that the last token wrote; with a rank, its r keys
           (b, h, r, n), and its x, of which mimo_x makes the values
    """

    angle: Tensor
    ssm: Tensor
    k: Tensor
    v: Tensor


class Mamba3(Mixer):
    """z, x, B, C, dt, A, trap, angles = in_proj(u);  y = out_proj((trapezoid(...) + D x) silu(z)).

    B and C are normalised, biased per head, and rotated by the angles summed so far. With a rank,
    x[r] = mimo_x[r] x and z[r] = mimo_z[r] z are as many inputs and gates, and y is the sum of the
    gated outputs mimo_o[r] y[r].
    """

    ops = (TRAPEZOID, MIMO_TRAPEZOID)
    float32_parameters = ("D", "dt_bias", "B_bias", "C_bias")
    param_rules = dict.fromkeys(("B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o"), NO_DECAY)

    def __init__(self, spec: Mamba3Spec, layer: LayerContext) -> None:
        super().__init__()
        self.spec = spec
        d, g, n, r = layer.d_model, spec.n_groups, spec.d_state, spec.rank
        self.n_heads = h = spec.n_heads(d)
        inner = h * spec.head_dim
        self.widths = [inner, inner, r * g * n, r * g * n, h, h, h, spec.n_angles]
        self.in_proj = nn.Linear(d, sum(self.widths), bias=False)
        self.dt_bias = nn.Parameter(torch.empty(h))
        self.B_bias = nn.Parameter(torch.empty(h, r, n))
        self.C_bias = nn.Parameter(torch.empty(h, r, n))
        self.B_norm = Norm("rms", n, NORM_EPS)
        self.C_norm = Norm("rms", n, NORM_EPS)
        if r > 1:
            self.mimo_x, self.mimo_z, self.mimo_o = (
                nn.Parameter(torch.empty(h, r, spec.head_dim)) for _ in range(3)
            )
        self.D = nn.Parameter(torch.empty(h))
        self.norm = GatedNorm(inner, h, spec.norm_eps, True) if spec.out_norm else None
        self.out_proj = nn.Linear(inner, d, bias=False)

    def parallel(self, x: Tensor, state: Mamba3State | None, call: Call) -> MixerOut:
        many = self.spec.rank > 1
        run = (MIMO_TRAPEZOID if many else TRAPEZOID).pick(self.engine, x.device)
        before = self.init_state(len(x), x.device, x.dtype) if state is None else state
        z, u, dt, log_decay, share, B, C, speed = self._streams(x)
        angles = summed_angles(speed, before.angle, call.starts)
        turn, inputs = turns(angles), self._inputs(u)
        B, C = self._rotate(B, turn), self._rotate(C, turn)
        memory = TrapezoidState(before.ssm, before.k, self._inputs(before.v))
        y, after = run(inputs, dt, log_decay, share, B, C, memory, call.starts)
        y = self._finish(y, inputs, z)
        last = u[:, -1].to(before.v.dtype, copy=True) if many else after.x
        return MixerOut(y, Mamba3State(angles[:, -1].clone(), after.h, after.B, last))

    def recurrent(self, x: Tensor, state: Mamba3State, call: Call) -> MixerOut:
        step = mimo_trapezoid_step if self.spec.rank > 1 else trapezoid_step
        z, u, dt, log_decay, share, B, C, speed = self._streams(x)
        angle = (state.angle + speed).remainder(TURN)
        turn, inputs = turns(angle), self._inputs(u)
        B, C = self._rotate(B, turn), self._rotate(C, turn)
        before = TrapezoidState(state.ssm, state.k, self._inputs(state.v))
        y, after = step(before, inputs, dt, log_decay, share, B, C)
        last = u.to(state.v.dtype)
        return MixerOut(self._finish(y, inputs, z), Mamba3State(angle, after.h, after.B, last))

    def fused(self) -> Mapping[str, tuple[int, ...]]:
        return {"in_proj.weight": tuple(width for width in self.widths if width)}

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Mamba3State:
        s, p, n, r = self.spec.n_angles, self.spec.head_dim, self.spec.d_state, self.spec.rank
        keys = (r, n) if r > 1 else (n,)
        return Mamba3State(
            *(
                torch.zeros(batch, self.n_heads, *shape, device=device, dtype=state_dtype(dtype))
                for shape in ((s,), (p, n), keys, (p,))
            )
        )

    def _streams(self, x: Tensor) -> tuple[Tensor, ...]:
        """z (..., d_inner); x (..., h, p); dt, log_decay, share (..., h); B, C (..., h, n), or with
        a rank (..., h, r, n), before rotation; speed (..., h, s)."""
        z, *rest = self.in_proj(x).split(self.widths, -1)
        u, B, C, dt, A, share, turn = rest
        rules = self.spec.a_activation, self.spec.A_floor
        dt, log_decay, share, speed = mamba3_steps(dt, A, share, turn, self.dt_bias, *rules)
        B = self._key(B, self.B_norm, self.B_bias)
        C = self._key(C, self.C_norm, self.C_bias)
        u = u.unflatten(-1, (self.n_heads, -1))
        return z, u, dt, log_decay, share, B, C, speed

    def _key(self, v: Tensor, norm: Norm, bias: Tensor) -> Tensor:
        """Normalise (..., r g n) per rank and group and add the bias of every head: (..., h, n), or
        with a rank (..., h, r, n)."""
        g, n, r = self.spec.n_groups, self.spec.d_state, self.spec.rank
        v = full_precision(v)
        if r == 1:
            v = norm(v.unflatten(-1, (g, n))).unsqueeze(-2)
            return (v + bias.view(g, -1, n)).flatten(-3, -2)
        v = norm(v.unflatten(-1, (r, g, n))).transpose(-3, -2).unsqueeze(-3)
        return (v + bias.view(g, -1, r, n)).flatten(-4, -3)

    def _rotate(self, v: Tensor, turn: Tensor) -> Tensor:
        """Keys turned by `turns` of the angles (..., h, s)."""
        if self.spec.rank == 1:
            return rotate_pairs(v, turn)
        return rotate_halves(v, turn.unsqueeze(-2))

    def _inputs(self, u: Tensor) -> Tensor:
        """x (..., h, p), or with a rank the inputs (..., h, r, p) that it makes."""
        return u if self.spec.rank == 1 else u.unsqueeze(-2) * full_precision(self.mimo_x)

    def _finish(self, y: Tensor, u: Tensor, z: Tensor) -> Tensor:
        """Outputs and inputs (..., h, p), or with a rank (..., h, r, p), to the layer's own."""
        if self.spec.rank == 1:
            y = torch.addcmul(y, u, self.D.unsqueeze(-1)).flatten(-2)
            return self.out_proj(self._gate(y, z).to(z.dtype))
        y = torch.addcmul(y, u, self.D[:, None, None])
        z_heads = full_precision(z).unflatten(-1, (self.n_heads, 1, -1))
        gates = z_heads * full_precision(self.mimo_z)
        y, gates = (part.transpose(-3, -2).flatten(-2) for part in (y, gates))  # (..., r, d_inner)
        outputs = full_precision(self.mimo_o).transpose(0, 1).flatten(-2)
        return self.out_proj((self._gate(y, gates) * outputs).sum(-2).to(z.dtype))

    def _gate(self, y: Tensor, z: Tensor) -> Tensor:
        """(..., d_inner) of both."""
        return silu_gated(y, z) if self.norm is None else self.norm(y, full_precision(z))

    @torch.no_grad()
    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        """Biases of B and C one, dt log-uniform in [dt_min, dt_max], D one; the factors of inputs
        and outputs 1 / rank, those of gates one.

        Source: `Mamba3` and `_init_weights` of state-spaces/mamba.
        """
        spec = self.spec
        linear_(self.in_proj, generator)
        linear_(self.out_proj, generator, 1 / math.sqrt(n_layers))
        self.dt_bias.uniform_(math.log(spec.dt_min), math.log(spec.dt_max), generator=generator)
        self.dt_bias.copy_(softplus_inverse(self.dt_bias.exp().clamp(min=spec.dt_floor)))
        for ones in (self.B_bias, self.C_bias, self.D):
            ones.fill_(1.0)
        if spec.rank > 1:
            self.mimo_x.fill_(1 / spec.rank)
            self.mimo_z.fill_(1.0)
            self.mimo_o.fill_(1 / spec.rank)
        for norm in (self.B_norm, self.C_norm, self.norm):
            if norm is not None:
                norm.reset_parameters()
