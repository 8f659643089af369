"""Channels that remember nothing, by fewer calls."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.channels.mlp import MLP
from kizzasi.models.channels.moe import MoE, PackedExperts
from kizzasi.models.channels.moe_routers import TopK
from kizzasi.models.channels.swiglu import SwiGLU
from kizzasi.models.decoding.inplace.base import About, Stateless, Steps
from kizzasi.models.ops.activations import ACTIVATIONS
from kizzasi.models.ops.routing import TINY


def mlp_steps(channel: MLP, state: tuple[()], about: About) -> Steps:
    up, down = about.products.of(channel.up_proj), about.products.of(channel.down_proj)
    activation = ACTIVATIONS[channel.spec.activation]
    return Stateless(lambda x: down(activation(up(x))))


def swiglu_steps(channel: SwiGLU, state: tuple[()], about: About) -> Steps:
    enter, leave = (
        about.products.of(channel.gate_proj, channel.up_proj),
        about.products.of(channel.down_proj),
    )

    def run(x: Tensor) -> Tensor:
        return leave(channel.mix(*enter(x).chunk(2, -1)))

    return Stateless(run)


def moe_steps(channel: MoE, state: tuple[()], about: About) -> Steps | None:
    """One token on a CPU goes to its top_k packed experts and to nobody else."""
    spec, router, experts = channel.spec, channel.gate, channel.experts
    how, alone = spec.router, about.rows == 1 and router.weight.is_cpu
    if not isinstance(how, TopK) or how != TopK(scale=how.scale) or not alone:
        return None
    if not isinstance(experts, PackedExperts) or router.choice.n_experts != len(experts):
        return None
    enters = about.products.experts(experts.gate_up_proj)
    leaves = about.products.experts(experts.down_proj)
    top_k, normalize, scale = router.choice.top_k, router.choice.normalize, how.scale
    weight, shared, shared_gate = router.weight, channel.shared_expert, channel.shared_expert_gate

    def run(x: Tensor) -> Tensor:
        best, ids = F.linear(x, weight).softmax(-1).topk(top_k, dim=-1)
        if normalize == "topk":
            best = best / (best.sum(-1, keepdim=True) + TINY)
        y = None
        for i, share in zip(ids[0].tolist(), best[0].tolist(), strict=True):
            gate, up = enters[i](x).chunk(2, -1)
            part = leaves[i](F.silu(gate).mul_(up))
            y = part.mul_(share * scale) if y is None else y.add_(part, alpha=share * scale)
        assert y is not None, "top_k is at least 1"
        if shared is not None:
            extra = shared(x[:, None]).y[:, 0]
            y = y + (extra if shared_gate is None else extra * shared_gate(x).sigmoid())
        return y

    return Stateless(run)
