"""Mamba-3 with its angles, memory, key and value written in place.

b rows · h heads · p head_dim · n d_state · g groups · s pairs of states that turn
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
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
from kizzasi.models.mixers.mamba3 import Mamba3, Mamba3State

if TYPE_CHECKING:
    from kizzasi.models.ops.native.steps import Program

MOST_TURNS = 1024  # that the instruction has room for


class Mamba3Steps(Steps):
    """`Mamba3.recurrent` of rank 1."""

    def __init__(self, mixer: Mamba3, state: Mamba3State, products: Products) -> None:
        self.mixer = mixer
        copied = (part.clone(memory_format=torch.contiguous_format) for part in state)
        self.state = Mamba3State(*copied)
        self.enter, self.leave = products.of(mixer.in_proj), products.of(mixer.out_proj)

    def __call__(self, x: Tensor, call: Call) -> Tensor:
        out = self.mixer.recurrent(x, self.state, call)
        self.state = out.state
        return out.y

    def write(self, program: Program, x: Tensor) -> Tensor:
        mixer, spec, (angle, h, k, v) = self.mixer, self.mixer.spec, self.state
        parts = self.enter.write(program, x, "in").split_with_sizes(mixer.widths, -1)
        z, u, B, C, dt, A, share, turn = parts
        keys = spec.n_groups * spec.d_state
        B, C = (
            write_norm(norm, program, part, program.room(name, keys))
            for norm, part, name in ((mixer.B_norm, B, "B"), (mixer.C_norm, C, "C"))
        )
        y, turned = (
            program.room(name, mixer.n_heads * width)
            for name, width in (("read", spec.head_dim), ("turned", 2 * spec.d_state))
        )
        weights = mixer.dt_bias, mixer.B_bias, mixer.C_bias, mixer.D
        program.add(
            "trapezoid",
            [
                *(u, dt, A, share, turn, B, C),
                *map(readable, weights),
                program.number(spec.A_floor),
                *(angle, h, k, v),
                *(turned, y),
            ],
            *(mixer.n_heads, spec.head_dim, spec.n_groups, spec.d_state, spec.n_angles),
            *(u.stride(0), int(spec.a_activation == "heavy_tail")),
        )
        write_gated(mixer.norm, program, y, z)
        return self.leave.write(program, y, "mixed")

    def value(self) -> Mamba3State:
        return Mamba3State(*(part.clone() for part in self.state))


def mamba3_steps(mixer: Mamba3, state: Mamba3State, about: About) -> Steps | None:
    fits = mixer.spec.rank == 1 and mixer.spec.n_angles <= MOST_TURNS
    fits = fits and {part.dtype for part in state} == {about.dtype}
    return Mamba3Steps(mixer, state, about.products) if fits else None
