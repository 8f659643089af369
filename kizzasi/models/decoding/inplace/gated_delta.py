"""Gated DeltaNet with its window and memory written in place.

b rows · h heads · n heads of keys · k d_k · p d_v
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.call import Call
from kizzasi.models.decoding.inplace.base import About, Products, Steps, readable, write_norm
from kizzasi.models.decoding.inplace.conv import ConvSteps, known_conv
from kizzasi.models.mixers.gated_delta import GatedDelta, GatedDeltaState
from kizzasi.models.ops.delta import delta_rule_step_
from kizzasi.models.parts.causal_conv import CausalConv

if TYPE_CHECKING:
    from kizzasi.models.ops.native.steps import Program


class GatedDeltaSteps(Steps):
    """`GatedDelta.recurrent`."""

    def __init__(
        self, mixer: GatedDelta, conv: CausalConv, state: GatedDeltaState, products: Products
    ) -> None:
        self.mixer, self.conv = mixer, ConvSteps(conv, state.conv)
        self.memory = state.memory.clone(memory_format=torch.contiguous_format)
        self.enter = products.of(mixer.in_proj_qkvz, mixer.in_proj_ba)
        self.leave = products.of(mixer.out_proj)

    def __call__(self, x: Tensor, call: Call) -> Tensor:
        mixer, spec = self.mixer, self.mixer.spec
        wide = 2 * (mixer.keys + mixer.values)
        qkvz, ba = self.enter(x).tensor_split([wide], -1)
        qkv, z = (qkvz[:, index] for index in self._order())
        streams = mixer._streams(self.conv(qkv), ba.unflatten(-1, (spec.key_heads, -1)))
        y = mixer.norm(delta_rule_step_(self.memory, *streams)).flatten(-2)
        return self.leave(y.mul_(F.silu(z)))

    def write(self, program: Program, x: Tensor) -> Tensor:
        mixer, spec = self.mixer, self.mixer.spec
        wide = 2 * (mixer.keys + mixer.values)
        qkvz, ba = self.enter.write(program, x, "in").tensor_split([wide], -1)
        rooms = [
            program.room("qkv", 2 * mixer.keys + mixer.values),
            program.room("z", mixer.values),
        ]
        for index, y in zip(self._order(), rooms, strict=True):
            program.pick(qkvz, index, y)
        qkv, z = rooms
        qkv, y = self.conv.write(program, qkv), program.room("read", mixer.values)
        decays: list[Tensor | None] = [None, None]
        if spec.gated:
            decays = [mixer.A_log.detach().exp(), readable(mixer.dt_bias)]
        by = program.number(2.0 if spec.negative_eigenvalues else 1.0)
        sizes = spec.n_heads, spec.key_heads, mixer.d_k, mixer.d_v, qkv.stride(0), ba.stride(0)
        program.add("delta", [qkv, ba, *decays, by, self.memory, y], *sizes)
        write_norm(mixer.norm, program, y, y)
        program.gate("silu", z, y, y)
        return self.leave.write(program, y, "mixed")

    def value(self) -> GatedDeltaState:
        return GatedDeltaState(self.conv.value(), self.memory.clone())

    def _order(self) -> tuple[Tensor, Tensor]:
        """Where all queries, keys and values, and the gates, come out of in_proj_qkvz."""
        mixer = self.mixer
        at = torch.arange(2 * (mixer.keys + mixer.values))
        n, values = mixer.spec.key_heads, mixer.values // mixer.spec.key_heads
        parts = at.unflatten(0, (n, -1)).split([mixer.d_k, mixer.d_k, values, values], -1)
        *qkv, z = (part.flatten() for part in parts)
        return torch.cat(qkv), z


def gated_delta_steps(mixer: GatedDelta, state: GatedDeltaState, about: About) -> Steps | None:
    conv = known_conv(mixer.conv1d, state, about)
    return None if conv is None else GatedDeltaSteps(mixer, conv, state, about.products)
