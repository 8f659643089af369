"""RG-LRU with its window and memory written in place.

b rows · i d_rnn · g heads · n channels of a head
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.call import Call
from kizzasi.models.decoding.inplace.base import About, Products, Steps, readable
from kizzasi.models.decoding.inplace.conv import ConvSteps, known_conv
from kizzasi.models.mixers.rg_lru import RGLRU, BlockLinear, C, RGLRUState
from kizzasi.models.parts.causal_conv import CausalConv

if TYPE_CHECKING:
    from kizzasi.models.ops.native.steps import Program


class RGLRUSteps(Steps):
    """`RGLRU.recurrent`."""

    def __init__(
        self, mixer: RGLRU, conv: CausalConv, state: RGLRUState, products: Products
    ) -> None:
        self.mixer, self.conv = mixer, ConvSteps(conv, state.conv, silu=False)
        self.h, self.begun = state.h.clone(), state.begun.clone()
        self.enter = products.of(mixer.linear_x, mixer.linear_y)
        self.leave = products.of(mixer.linear_out)

    def __call__(self, x: Tensor, call: Call) -> Tensor:
        u, gate = self.enter(x).chunk(2, -1)
        log_a, u = self.mixer._gate(self.conv(u), self.begun == 0)
        self.h.mul_(log_a.exp()).add_(u)
        self.begun.fill_(1)
        return self.leave(F.gelu(gate, approximate="tanh").mul_(self.h))

    def write(self, program: Program, x: Tensor) -> Tensor:
        mixer = self.mixer
        u, gate = self.enter.write(program, x, "in").chunk(2, -1)
        u = self.conv.write(program, u)
        gates = mixer.input_gate, mixer.recurrent_gate
        weights = [readable(part) for each in gates for part in (each.weight, each.bias)]
        leak = C * F.softplus(mixer.Lambda.detach())
        heads, n, _ = mixer.input_gate.weight.shape
        program.add("rglru", [u, *weights, leak, self.h, self.begun], heads, n)
        y = program.room("read", mixer.i)
        program.gate("gelu_tanh", gate, self.h, y)
        return self.leave.write(program, y, "mixed")

    def value(self) -> RGLRUState:
        return RGLRUState(self.conv.value(), self.h.clone(), self.begun.clone())


def rg_lru_steps(mixer: RGLRU, state: RGLRUState, about: About) -> Steps | None:
    conv = known_conv(mixer.conv_1d, state[:2], about)
    gates = mixer.input_gate, mixer.recurrent_gate
    if conv is None or any(type(gate) is not BlockLinear for gate in gates):
        return None
    return RGLRUSteps(mixer, conv, state, about.products)
