"""What every reader of files gives: tensors by name, shapes first and values on demand."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kizzasi.errors import CheckpointError

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
# In the order in which safetensors writes them: the widest last.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Stored(NamedTuple):
    """A tensor in a file. dtype is None if it is none of DTYPES; `read` gives one of its own."""

    shape: Shape
    dtype: torch.dtype | None
    read: Callable[[], Tensor]


Storage = Mapping[str, Stored]


class Place(NamedTuple):
    """A stretch of bytes in a file, and what the file looked like when its tables were read."""

    path: Path
    start: int
    size: int
    stamp: tuple[int, int, int]

    def read(self) -> Tensor:
        """The bytes, (size,) uint8. Raises CheckpointError."""
        data = torch.empty(self.size, dtype=torch.uint8)
        try:
            with self.path.open("rb", buffering=0) as file:
                same = stamp(file.fileno()) == self.stamp
                file.seek(self.start)
                view = data.numpy().data
                while same and view and (n := file.readinto(view)):
                    view = view[n:]
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot read it: {error}") from error
        if len(view) or not same:
            raise CheckpointError(f"{self.path}: changed while it was read; try again")
        return data


def stamp(file: Path | int) -> tuple[int, int, int]:
    """Tells a file from another one, and from itself after a change."""
    info = os.stat(file)
    return info.st_ino, info.st_size, info.st_mtime_ns


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor on the CPU, (nbytes,) uint8."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.as_strided((len(flat),), (1,)).view(torch.uint8)  # one value may have any stride


def count_values(shapes: Shapes) -> int:
    """How many numbers are stored."""
    return sum(math.prod(shape) for shape in shapes.values())
