"""What the layers of a decoder run on, for one token of a few rows.

reference, torch  call by call
native            as one program for all layers that know how to be written as instructions
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kizzasi.models.ops.engines import Engines

if TYPE_CHECKING:
    from kizzasi.models.ops.native.steps import Program


def no_program(dtype: torch.dtype, rows: int) -> Program | None:
    """A program to write, for so many rows of this dtype; None where calls are as good."""
    return None


STEPS = Engines(
    "steps",
    reference=no_program,
    torch=no_program,
    native="kizzasi.models.ops.native.steps:program",
)
