"""RWKV-7's mixer, with the token before and the memory in place.

b rows · d d_model · h heads · n channels of a head
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kizzasi.models.call import Call
from kizzasi.models.decoding.inplace.base import (
    CALLED,
    About,
    Products,
    Steps,
    Unfit,
    readable,
)
from kizzasi.models.decoding.inplace.rwkv4 import Mixed
from kizzasi.models.mixers.rwkv7 import RWKV7, RWKV7State
from kizzasi.models.ops.wkv7 import wkv7_step_

if TYPE_CHECKING:
    from kizzasi.models.ops.native.steps import Program

FIRST = "v_first"  # the value of the first layer, as the mixer shares it


class RWKV7Steps(Steps):
    """`RWKV7.recurrent`.

    Args:
        alone: nobody before this layer has offered a first value; None where that is not known.
    """

    def __init__(
        self, mixer: RWKV7, state: RWKV7State, products: Products, alone: bool | None
    ) -> None:
        self.mixer, self.alone = mixer, alone
        shares = [mixer.get_parameter(f"x_{name}") for name in "rwkvag"]
        self.mix = Mixed(shares, state.shift, False)
        self.s = state.wkv.clone(memory_format=torch.contiguous_format)
        self.r, self.k = products.of(mixer.receptance), products.of(mixer.key)
        self.v, self.leave = products.of(mixer.value), products.of(mixer.output)

    def __call__(self, x: Tensor, call: Call) -> Tensor:
        mixer = self.mixer
        before, self.mix.last = self.mix.last, x
        streams, gate, offer = mixer._project(x, before, call.shared)
        call.shared = {**call.shared, **offer}
        return mixer._finish(wkv7_step_(self.s, *streams), streams, gate)

    def write(self, program: Program, x: Tensor) -> Tensor:
        mixer, d = self.mixer, x.shape[1]
        first = program.offers.get(FIRST)
        if self.alone is None or (mixer.spec.value_residual and first is None):
            raise Unfit
        x_r, x_w, x_k, x_v, x_a, x_g = self.mix.write(program, x)
        r, k = self.r.write(program, x_r, "r"), self.k.write(program, x_k, "k")
        v = self.v.write(program, x_v, FIRST if self.alone else "v")
        if first is not None and mixer.spec.value_residual:
            share = self._low_rank(program, x_v, "v")
            program.join(share, mixer.v0.detach().expand(len(x), -1).contiguous())
            program.gate("sigmoid", share, None, share)
            gap = program.room("gap", d)
            program.gate("", first[1], None, gap)
            program.join(gap, v, 1.0, -1.0)
            program.gate("", share, gap, gap)
            program.join(v, gap)
        rate, w = self._low_rank(program, x_a, "a"), self._low_rank(program, x_w, "w", "tanh")
        gate = self._low_rank(program, x_g, "g", "sigmoid")
        y, bonus = program.room("read", d), program.room("bonus", d)
        streams = [r, w, k, v, rate]
        told = [mixer.w0, mixer.a0, mixer.k_k, mixer.k_a, mixer.r_k]
        rooms = [self.s, program.room("streams", 4 * d), y, bonus]
        n = mixer.spec.head_dim
        program.add("wkv7", [*streams, *map(readable, told), *rooms], d // n, n)
        norm = mixer.ln_x
        bias = None if norm.bias is None else readable(norm.bias)
        program.norm(y, y, n, readable(norm.weight), bias, norm.eps, centred=True, each=True)
        program.join(y, bonus)
        program.gate("", gate, y, y)
        if self.alone:
            program.offer(FIRST, v)
        return self.leave.write(program, y, "mixed")

    def _low_rank(self, program: Program, x: Tensor, name: str, between: str = "") -> Tensor:
        """x @ name1 @ name2, as instructions."""
        enter, leave = (
            self.mixer.get_parameter(f"{name}{i}").detach().t().contiguous() for i in (1, 2)
        )
        hidden, y = program.room("rank", len(enter)), program.room(f"of {name}", len(leave))
        program.product(x, enter, None, hidden)
        if between:
            program.gate(between, hidden, None, hidden)
        program.product(hidden, leave, None, y)
        return y

    def value(self) -> RWKV7State:
        return RWKV7State(self.mix.last.clone(), self.s.clone())


def rwkv7_steps(mixer: RWKV7, state: RWKV7State, about: About) -> Steps | None:
    if {part.dtype for part in state} != {about.dtype}:
        return None
    first = about.shared.setdefault(FIRST, mixer) is mixer
    alone = None if first and CALLED in about.shared else first
    return RWKV7Steps(mixer, state, about.products, alone)
