"""Short convolutions with windows written in place, and the mixer that is one between two gates.

b rows · c channels · k filter length
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.call import Call
from kizzasi.models.decoding.inplace.base import About, Products, Steps, readable
from kizzasi.models.mixers.short_conv import ShortConv, ShortConvState
from kizzasi.models.parts.causal_conv import CausalConv

if TYPE_CHECKING:
    from kizzasi.models.ops.native.steps import Program

LENGTH = 64  # tokens that a tape holds before its end is copied to its start


class ConvSteps:
    """A short convolution whose last inputs lie one behind the other on a tape (LENGTH, b, c).

    silu: whether that of its outputs is taken.
    """

    def __init__(self, conv: CausalConv, state: Tensor, *, silu: bool = True) -> None:
        self.k, self.silu = conv.weight.shape[2], silu
        self.taps, self.bias = conv.weight[:, 0].detach().t().contiguous().unsqueeze(1), conv.bias
        b, c = state.shape[:2]
        self.tape = state.new_empty(LENGTH + self.k, b, c)
        self.tape[: self.k - 1] = state.permute(2, 0, 1)
        self.end = self.k - 1

    def __call__(self, x: Tensor) -> Tensor:
        """x (b, c) to conv(x), or silu of it."""
        if self.end == len(self.tape):
            self.tape[: self.k - 1] = self.tape[self.end - self.k + 1 :].clone()
            self.end = self.k - 1
        self.tape[self.end] = x
        self.end = end = self.end + 1
        y = (self.tape[end - self.k : end] * self.taps).sum(0)
        y = y if self.bias is None else y.add_(self.bias)
        return F.silu(y, inplace=True) if self.silu else y

    def write(self, program: Program, x: Tensor) -> Tensor:
        """As instructions, which move a tape of length k on by one token."""
        self.tape, self.end = self.tape[self.end - self.k + 1 : self.end], self.k
        self.tape = F.pad(self.tape, (0, 0, 0, 0, 1, 0))
        bias, y = (
            None if self.bias is None else readable(self.bias),
            program.room("conv", x.shape[1]),
        )
        tensors = [x, self.taps, bias, self.tape, y]
        program.add("conv", tensors, x.shape[1], self.k, x.stride(0), int(self.silu))
        return y

    def value(self) -> Tensor:
        return self.tape[self.end - self.k + 1 : self.end].permute(1, 2, 0).contiguous()


class ShortConvSteps(Steps):
    """`ShortConv.recurrent`."""

    def __init__(
        self, mixer: ShortConv, conv: CausalConv, state: ShortConvState, products: Products
    ) -> None:
        self.conv = ConvSteps(conv, state.conv, silu=False)
        self.enter, self.leave = products.of(mixer.in_proj), products.of(mixer.out_proj)

    def __call__(self, x: Tensor, call: Call) -> Tensor:
        B, C, x = self.enter(x).chunk(3, -1)
        return self.leave(self.conv(B * x).mul_(C))

    def write(self, program: Program, x: Tensor) -> Tensor:
        B, C, u = self.enter.write(program, x, "in").chunk(3, -1)
        program.gate("", B, u, u)
        y = self.conv.write(program, u)
        program.gate("", C, y, y)
        return self.leave.write(program, y, "mixed")

    def value(self) -> ShortConvState:
        return ShortConvState(self.conv.value())


def short_conv_steps(mixer: ShortConv, state: ShortConvState, about: About) -> Steps | None:
    conv = known_conv(mixer.conv, state, about)
    return None if conv is None else ShortConvSteps(mixer, conv, state, about.products)


def known_conv(conv: Any, state: Iterable[Tensor], about: About) -> CausalConv | None:
    """The convolution, unless something stands in its place or the state is of another dtype."""
    fits = type(conv) is CausalConv and {part.dtype for part in state} == {about.dtype}
    return conv if fits else None
