"""RWKV-4's mixer, and the channels of all RWKV, with the token before and the sums in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kizzasi.models.call import Call
from kizzasi.models.channels.rwkv_channel import SHARES, RWKVChannel, RWKVChannelState
from kizzasi.models.decoding.inplace.base import About, Products, Steps
from kizzasi.models.mixers.rwkv4 import RWKV4, RWKV4State
from kizzasi.models.ops.wkv4 import WKV4Sums

if TYPE_CHECKING:
    from kizzasi.models.ops.native.steps import Program


class Mixed:
    """Shares of each token and of the one before it, start + (end - start) share."""

    def __init__(self, shares: Sequence[Tensor], last: Tensor, from_before: bool) -> None:
        self.shares = torch.stack([share.detach() for share in shares]).unsqueeze(1)
        self.last, self.from_before = last.clone(), from_before

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        before, self.last = self.last, x
        start, end = (before, x) if self.from_before else (x, before)
        return torch.addcmul(start, end - start, self.shares).unbind()

    def write(self, program: Program, x: Tensor) -> tuple[Tensor, ...]:
        """As an instruction."""
        (k, _, d), b = self.shares.shape, len(x)
        y = program.room("shares", k * d).view(k, b, d)
        sizes = d, k, int(self.from_before)
        program.add("mix", [x, self.last, self.shares, y], *sizes)
        return y.unbind()


class RWKV4Steps(Steps):
    """`RWKV4.recurrent`."""

    def __init__(self, mixer: RWKV4, state: RWKV4State, products: Products) -> None:
        shares = [mixer.time_mix_r, mixer.time_mix_k, mixer.time_mix_v]
        self.mix = Mixed(shares, state.shift, True)
        self.sums = WKV4Sums(state.wkv, -mixer.time_decay.exp(), mixer.time_first)
        self.r, self.k = products.of(mixer.receptance), products.of(mixer.key)
        self.v, self.leave = products.of(mixer.value), products.of(mixer.output)

    def __call__(self, x: Tensor, call: Call) -> Tensor:
        r, k, v = self.mix(x)
        y = self.sums.step_(self.k(k), self.v(v))
        return self.leave(y.mul_(self.r(r).sigmoid_()))

    def write(self, program: Program, x: Tensor) -> Tensor:
        r, k, v = self.mix.write(program, x)
        r, k, v = (
            product.write(program, part, name)
            for product, part, name in ((self.r, r, "r"), (self.k, k, "k"), (self.v, v, "v"))
        )
        sums, y = self.sums, program.room("average", k.shape[1])
        tensors = [k, v, r, sums.decay[1], sums.bonus[0], sums.sums, sums.top, y]
        program.add("wkv4", tensors, k.shape[1])
        return self.leave.write(program, y, "mixed")

    def value(self) -> RWKV4State:
        return RWKV4State(self.mix.last.clone(), self.sums.value())


class RWKVChannelSteps(Steps):
    """`RWKVChannel.recurrent`."""

    def __init__(self, channel: RWKVChannel, state: RWKVChannelState, products: Products) -> None:
        version = channel.spec.version
        shares = [channel.get_parameter(name) for name in SHARES[version]]
        self.mix = Mixed(shares, state.shift, version == 4)
        self.k, self.v = products.of(channel.key), products.of(channel.value)
        self.r = None if channel.receptance is None else products.of(channel.receptance)

    def __call__(self, x: Tensor, call: Call) -> Tensor:
        k, *r = self.mix(x)
        y = self.v(self.k(k).relu_().square_())
        return y if self.r is None else y.mul_(self.r(r[0]).sigmoid_())

    def write(self, program: Program, x: Tensor) -> Tensor:
        k, *r = self.mix.write(program, x)
        hidden = self.k.write(program, k, "hidden")
        program.gate("relu2", hidden, None, hidden)
        y = self.v.write(program, hidden, "wide")
        if self.r is not None:
            program.gate("sigmoid", self.r.write(program, r[0], "r"), y, y)
        return y

    def value(self) -> RWKVChannelState:
        return RWKVChannelState(self.mix.last.clone())


def rwkv4_steps(mixer: RWKV4, state: RWKV4State, about: About) -> Steps | None:
    fits = {part.dtype for part in (state.shift, *state.wkv)} == {about.dtype}
    return RWKV4Steps(mixer, state, about.products) if fits else None


def rwkv_channel_steps(channel: RWKVChannel, state: RWKVChannelState, about: About) -> Steps | None:
    return (
        RWKVChannelSteps(channel, state, about.products)
        if state.shift.dtype == about.dtype
        else None
    )
