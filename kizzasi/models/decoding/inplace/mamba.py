"""Mamba and Mamba-2 with windows and memories written in place.

b rows · c channels · k filter length · i d_inner · n d_state · h heads · p head_dim · g groups
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.call import Call
from kizzasi.models.decoding.inplace.base import (
    About,
    Products,
    Steps,
    readable,
    write_gated,
    write_norm,
)
from kizzasi.models.decoding.inplace.conv import ConvSteps, known_conv
from kizzasi.models.mixers.mamba import Mamba, MambaState
from kizzasi.models.mixers.mamba2 import Mamba2, Mamba2State
from kizzasi.models.norm import WideLinear
from kizzasi.models.ops.selective_scan import selective_scan_step_
from kizzasi.models.ops.ssd import ssd_step_
from kizzasi.models.parts.causal_conv import CausalConv

if TYPE_CHECKING:
    from kizzasi.models.ops.native.steps import Program


class MambaSteps(Steps):
    """`Mamba.recurrent`."""

    def __init__(
        self, mixer: Mamba, conv: CausalConv, state: MambaState, products: Products
    ) -> None:
        self.mixer, self.conv = mixer, ConvSteps(conv, state.conv)
        self.h = state.ssm.clone(memory_format=torch.contiguous_format)
        self.enter, self.select = products.of(mixer.in_proj), products.of(mixer.x_proj)
        self.leave = products.of(mixer.out_proj)
        self.widen = mixer.dt_proj.weight.detach().t().contiguous()
        self.bias = mixer.dt_proj.bias
        self.A, self.D = -mixer.A_log.detach().exp(), mixer.D
        self.parts = mixer.rank, mixer.spec.d_state, mixer.spec.d_state

    def __call__(self, x: Tensor, call: Call) -> Tensor:
        u, z = self.enter(x).chunk(2, -1)
        u = self.conv(u)
        dt, B, C = self.select(u).split_with_sizes(self.parts, -1)
        mixer = self.mixer
        if mixer.spec.inner_norm is not None:
            dt, B, C = mixer.dt_layernorm(dt), mixer.b_layernorm(B), mixer.c_layernorm(C)
        dt = F.softplus(torch.addmm(self.bias, dt, self.widen))
        y = selective_scan_step_(u, dt, self.A, B, C, self.D, self.h)
        return self.leave(y.mul_(F.silu(z)))

    def write(self, program: Program, x: Tensor) -> Tensor:
        mixer = self.mixer
        u, z = self.enter.write(program, x, "in").chunk(2, -1)
        u = self.conv.write(program, u)
        chosen = self.select.write(program, u, "chosen")
        dt, B, C = chosen.split_with_sizes(self.parts, -1)
        if mixer.spec.inner_norm is not None:
            norms = mixer.dt_layernorm, mixer.b_layernorm, mixer.c_layernorm
            for norm, part in zip(norms, (dt, B, C), strict=True):
                write_norm(norm, program, part, part)
        steps, y = (program.room(name, mixer.d_inner) for name in ("steps", "scanned"))
        program.product(dt, readable(mixer.dt_proj.weight), readable(mixer.dt_proj.bias), steps)
        tensors = [u, steps, self.A, B, C, readable(self.D), z, self.h, y]
        program.add("scan", tensors, mixer.d_inner, mixer.spec.d_state, B.stride(0), z.stride(0))
        return self.leave.write(program, y, "mixed")

    def value(self) -> MambaState:
        return MambaState(self.conv.value(), self.h.clone())


class Mamba2Steps(Steps):
    """`Mamba2.recurrent`."""

    def __init__(
        self, mixer: Mamba2, conv: CausalConv, state: Mamba2State, products: Products
    ) -> None:
        self.mixer, self.conv = mixer, ConvSteps(conv, state.conv)
        self.h = state.ssm.clone(memory_format=torch.contiguous_format)
        self.enter, self.leave = products.of(mixer.in_proj), products.of(mixer.out_proj)
        spec = mixer.spec
        self.A, self.D, self.bias = (
            -mixer.A_log.detach().exp(),
            mixer.D.unsqueeze(-1),
            mixer.dt_bias,
        )
        self.heads, self.groups = (mixer.n_heads, spec.head_dim), (2 * spec.n_groups, spec.d_state)
        self.parts = mixer.d_inner, mixer.d_xBC, mixer.n_heads
        self.split = mixer.d_inner, mixer.d_xBC - mixer.d_inner
        low, high = spec.dt_limit
        free = low in (None, 0.0) and high in (None, float("inf"))  # dt is positive
        self.limit = None if free else (low, high)

    def __call__(self, x: Tensor, call: Call) -> Tensor:
        b = len(x)
        z, xBC, dt = self.enter(x).split_with_sizes(self.parts, -1)
        u, BC = self.conv(xBC).split_with_sizes(self.split, -1)
        dt = F.softplus(dt + self.bias)
        dt = dt if self.limit is None else dt.clamp_(*self.limit)
        u = u.view(b, *self.heads)
        B, C = BC.view(b, *self.groups).chunk(2, 1)
        y = ssd_step_(self.h, u * dt.unsqueeze(-1), self.A * dt, B, C)
        y = y.addcmul_(u, self.D).view(b, -1)
        norm = self.mixer.norm
        return self.leave(y.mul_(F.silu(z)) if norm is None else norm.forward(y, z))

    def write(self, program: Program, x: Tensor) -> Tensor:
        mixer, spec = self.mixer, self.mixer.spec
        z, xBC, dt = self.enter.write(program, x, "in").split_with_sizes(self.parts, -1)
        u, BC = self.conv.write(program, xBC).split_with_sizes(self.split, -1)
        B, C = BC.chunk(2, -1)
        (heads, p), y = self.heads, program.room("read", mixer.d_inner)
        low, high = self.limit or (None, None)
        limits = program.number(low or 0.0, float("inf") if high is None else high)
        weights = [readable(self.bias), self.A, readable(mixer.D)]
        sizes = heads, p, spec.n_groups, spec.d_state, u.stride(0), B.stride(0), dt.stride(0)
        program.add("ssd", [u, dt, *weights, B, C, limits, self.h, y], *sizes)
        write_gated(mixer.norm, program, y, z)
        return self.leave.write(program, y, "mixed")

    def value(self) -> Mamba2State:
        return Mamba2State(self.conv.value(), self.h.clone())


def mamba_steps(mixer: Mamba, state: MambaState, about: About) -> Steps | None:
    conv = known_conv(mixer.conv1d, state, about)
    conv = conv if type(mixer.dt_proj) is WideLinear else None
    return None if conv is None else MambaSteps(mixer, conv, state, about.products)


def mamba2_steps(mixer: Mamba2, state: Mamba2State, about: About) -> Steps | None:
    conv = known_conv(mixer.conv1d, state, about)
    return None if conv is None else Mamba2Steps(mixer, conv, state, about.products)
