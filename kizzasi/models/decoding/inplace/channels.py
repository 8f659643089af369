"""Channels that remember nothing, by fewer calls."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.call import Call
from kizzasi.models.channels.mlp import MLP
from kizzasi.models.channels.moe import MoE, PackedExperts
from kizzasi.models.channels.moe_routers import TopK
from kizzasi.models.channels.swiglu import SwiGLU
from kizzasi.models.decoding.inplace.base import (
    About,
    Products,
    Run,
    Stateless,
    Steps,
    Unfit,
    readable,
)
from kizzasi.models.ops.activations import ACTIVATIONS
from kizzasi.models.ops.routing import TINY
from kizzasi.models.parts.router import Router

if TYPE_CHECKING:
    from kizzasi.models.ops.native.steps import Program

MOST_CHOSEN = 64  # experts of a token, in step.c


class MLPSteps(Stateless):
    def __init__(self, channel: MLP, products: Products) -> None:
        self.up, self.down = products.of(channel.up_proj), products.of(channel.down_proj)
        self.kind = channel.spec.activation
        self.activation = ACTIVATIONS[self.kind]

    def __call__(self, x: Tensor, call: Call) -> Tensor:
        return self.down(self.activation(self.up(x)))

    def write(self, program: Program, x: Tensor) -> Tensor:
        hidden = self.up.write(program, x, "hidden")
        program.gate(self.kind, hidden, None, hidden)
        return self.down.write(program, hidden, "wide")


class SwiGLUSteps(Stateless):
    def __init__(self, channel: SwiGLU, products: Products) -> None:
        self.enter = products.of(channel.gate_proj, channel.up_proj)
        self.leave, self.channel = products.of(channel.down_proj), channel

    def __call__(self, x: Tensor, call: Call) -> Tensor:
        return self.leave(self.channel.mix(*self.enter(x).chunk(2, -1)))

    def write(self, program: Program, x: Tensor) -> Tensor:
        spec = self.channel.spec
        if spec.limit is not None or spec.up_offset:
            raise Unfit
        gate, up = self.enter.write(program, x, "gate and up").chunk(2, -1)
        program.gate(spec.activation, gate, up, gate)
        return self.leave.write(program, gate, "wide")


class MoESteps(Stateless):
    """One token on a CPU goes to its top_k packed experts and to nobody else."""

    def __init__(self, channel: MoE, experts: PackedExperts, how: TopK, about: About) -> None:
        self.channel, self.router, self.scale = channel, channel.gate, how.scale
        self.packed, self.products = experts, about.products

    @cached_property
    def runs(self) -> tuple[list[Run], list[Run]]:
        """Of every expert, what enters its gate, and what leaves it."""
        packed, runs = self.packed, self.products.experts
        return runs(packed.gate_up_proj), runs(packed.down_proj)

    def __call__(self, x: Tensor, call: Call) -> Tensor:
        router, scale, y = self.router, self.scale, None
        top_k, normalize = router.choice.top_k, router.choice.normalize
        best, ids = F.linear(x, router.weight).softmax(-1).topk(top_k, dim=-1)
        if normalize == "topk":
            best = best / (best.sum(-1, keepdim=True) + TINY)
        enters, leaves = self.runs
        for i, share in zip(ids[0].tolist(), best[0].tolist(), strict=True):
            gate, up = enters[i](x).chunk(2, -1)
            part = leaves[i](F.silu(gate).mul_(up))
            y = part.mul_(share * scale) if y is None else y.add_(part, alpha=share * scale)
        assert y is not None, "top_k is at least 1"
        shared, shared_gate = self.channel.shared_expert, self.channel.shared_expert_gate
        if shared is not None:
            extra = shared(x[:, None]).y[:, 0]
            y = y + (extra if shared_gate is None else extra * shared_gate(x).sigmoid())
        return y

    def write(self, program: Program, x: Tensor) -> Tensor:
        up, down = self.packed.gate_up_proj, self.packed.down_proj
        (e, d, h), choice = down.shape, self.router.choice
        whole = up.is_contiguous() and down.is_contiguous() and x.stride(0) == d
        if self.channel.shared_expert is not None or not whole or choice.top_k > MOST_CHOSEN:
            raise Unfit
        logits, y = program.room("router", e), program.room("wide", d)
        program.product(x, readable(self.router.weight), None, logits)
        hidden = program.room("hidden of an expert", 2 * h + d)
        scale = program.number(self.scale)
        tensors = [x, logits, up.detach(), down.detach(), scale, hidden, y]
        program.add("experts", tensors, d, e, h, choice.top_k, int(choice.normalize == "topk"))
        return y


def mlp_steps(channel: MLP, state: tuple[()], about: About) -> Steps:
    return MLPSteps(channel, about.products)


def swiglu_steps(channel: SwiGLU, state: tuple[()], about: About) -> Steps:
    return SwiGLUSteps(channel, about.products)


def moe_steps(channel: MoE, state: tuple[()], about: About) -> Steps | None:
    """None for other routers, experts that are not packed, several rows, and on CUDA."""
    router, experts, how = channel.gate, channel.experts, channel.spec.router
    if type(router) is not Router or about.rows > 1 or not router.weight.is_cpu:
        return None
    if not isinstance(how, TopK) or how != TopK(scale=how.scale):
        return None
    if not isinstance(experts, PackedExperts) or router.choice.n_experts != len(experts):
        return None
    return MoESteps(channel, experts, how, about)
