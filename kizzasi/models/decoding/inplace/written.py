"""Layers that are written as one program; what a layer's `write` writes is in its own file.

The rule: a model whose weights are all float32, or all float64, on a CPU, one to four rows, kernels
that are there (`STEPS`), nobody who looks on; of that, every run of neighbouring layers whose parts
all know how to be written and whose engine is "auto" or "native". All else is called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kizzasi.models.call import Call
from kizzasi.models.decoding.inplace.base import Steps, Unfit, readable, write_norm

if TYPE_CHECKING:
    from kizzasi.models.ops.native.steps import Program


class Written(Steps):
    """Layers that follow one another, run in one call.

    x: (b, d), what they work on, in place.
    """

    def __init__(self, blocks: Sequence[Steps], program: Program, x: Tensor) -> None:
        self.blocks, self.program, self.x = blocks, program, x

    def __call__(self, x: Tensor, call: Call) -> Tensor:
        self.x.copy_(x)
        self.program.run()
        offers = {name: y for name, (_, y) in self.program.offers.items()}
        call.shared = {**offers, **call.shared}
        return self.x.clone()

    def value(self) -> tuple[object, ...]:
        return tuple(block.value() for block in self.blocks)

    def to_logits(
        self, table: Tensor, head: Tensor, bias: Tensor | None, norm: nn.Module
    ) -> Callable[[Tensor], Tensor] | None:
        """What makes logits (b, v) of ids (b,), once the ends of the model are written around the
        layers; None if they cannot be."""
        x, program, length = self.x, self.program, len(self.program)
        try:
            y = program.room("read", x.shape[1])
            write_norm(norm, program, x, y)
            weight = readable(head)
            logits = program.room("logits", len(weight))
            program.product(y, weight, None if bias is None else readable(bias), logits)
        except Unfit:
            program.cut(length)
            return None
        table = table.detach()

        def run(ids: Tensor) -> Tensor:
            ids = ids if ids.dtype in (torch.int32, torch.int64) else ids.long()
            torch.index_select(table, 0, ids, out=x)
            program.run()
            return logits.clone()

        return run


def in_programs(
    blocks: Sequence[Steps], d_model: int, begin: Callable[[], Program | None]
) -> list[Steps]:
    """The same layers, neighbours that can be written made one; `begin` gives a new program, or
    None where there are none."""
    parts: list[Steps] = []
    for block in blocks:
        last = parts[-1] if parts and isinstance(parts[-1], Written) else None
        program = begin() if last is None else last.program
        if program is None:
            parts.append(block)
            continue
        x, length = program.room("x", d_model), len(program)
        try:
            block.write(program, x)
        except Unfit:
            program.cut(length)
            parts.append(block)
            continue
        if last is None:
            parts.append(Written([block], program, x))
        else:
            parts[-1] = Written([*last.blocks, block], program, x)
    return parts
