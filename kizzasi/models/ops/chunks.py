"""Sequences cut into chunks, and joined again.

Symbols: b batch, t time, h heads, n channels of a head, c steps in a chunk, z number of chunks.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def chunk_size(t: int, most: int) -> int:
    """The least power of two that holds t tokens; at most `most`, which is one."""
    return min(most, 1 << (t - 1).bit_length())


def chunks(x: Tensor, c: int, fill: float = 0.0) -> Tensor:
    """(b, t, ...) to (b, z, c, ...). `fill` ends the last chunk: what neither writes nor decays."""
    missing = -x.shape[1] % c
    if missing:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing), value=fill)
    return x.unflatten(1, (-1, c))


def by_head(x: Tensor, c: int) -> Tensor:
    """(b, t, h, n) to (z b h, c, n): all chunks of all heads in one batch, those of one time
    together."""
    return rearrange(chunks(x, c), "b z c h n -> (z b h) c n")


def joined(x: Tensor, b: int, t: int, h: int) -> Tensor:
    """Undo `by_head`: (z b h, c, n) to (b, t, h, n)."""
    return rearrange(x, "(z b h) c n -> b (z c) h n", b=b, h=h)[:, :t]
