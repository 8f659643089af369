"""What unpacking a block of GGUF gives."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


class Levels(NamedTuple):
    """Unpacked blocks: w = scale * level + minimum.

    level    (n, groups, size) int8.
    scale    (n, groups, 1) float32.
    minimum  the same, or None for zero.
    """

    level: NDArray[np.int8]
    scale: NDArray[np.float32]
    minimum: NDArray[np.float32] | None = None


def nibbles(packed: Bytes) -> NDArray[np.int8]:
    """(..., k) bytes to (..., 2k): the low halves, then the high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1).view(np.int8)
