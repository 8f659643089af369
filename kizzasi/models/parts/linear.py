"""The linear layer of models whose engine is not torch's alone."""

from __future__ import annotations

from typing import TypeGuard

from torch import Tensor, nn

from kizzasi.models.ops.linear import LINEAR


class Linear(nn.Linear):
    """`nn.Linear`, in all but what its product runs on: see `kizzasi.models.ops.linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return LINEAR.pick("auto", input.device)(input, self.weight, self.bias)


def is_plain(layer: object) -> TypeGuard[nn.Linear]:
    """Whether it is that layer and nothing in its place, such as an adapter or a quantized one."""
    return type(layer) in (nn.Linear, Linear)
