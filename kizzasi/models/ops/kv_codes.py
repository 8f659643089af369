"""Numbers of few bits for keys and values: one scale for a group of a token's entries.

    codes  uint8: a byte an entry, or two entries a byte (nf4), the first in its low half
    scale  of a group: nf4's largest magnitude, int8's and fp8's by which a code is multiplied
    group  up to GROUP entries of one head of one token

Every token is coded by itself and once, so that a sequence read at once and token by token has the
same codes. Keys may instead be coded channel by channel, some tokens together, once they are there:
what is large is so in a few channels, and there for all tokens.

    least  entry of a channel in a group of tokens, from which codes count in even
    steps  of which there are 15 (nf4) or 255 (int8) up to its largest

Keys have a few large entries, beside which the others of their group would be lost; a Hadamard
rotation of heads shares them out, and leaves q . k as it is if queries are turned too.

Source: rotation: Ashkboos et al. 2024 (QuaRot), arXiv:2404.00456, section 4. NF4: Dettmers et al.
2023, arXiv:2305.14314, appendix E. FP8: E4M3 of Micikevicius et al. 2022, arXiv:2209.05433.
Channels: Liu et al. 2024 (KIVI), arXiv:2402.02750, section 3.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.ops.precision import full_precision

KVQuant = Literal["none", "int8", "fp8", "nf4"]

GROUP = 64
LARGEST = {"int8": 127.0, "fp8": 448.0, "nf4": 1.0}
STEPS = {"int8": 255, "nf4": 15}
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def groups_of(width: int) -> tuple[int, int]:
    """How many groups the entries of a head make, and how many each has, an even number."""
    n = -(-width // GROUP)
    size = -(-width // n)
    return n, size + size % 2


def code_bytes(width: int, kind: KVQuant) -> int:
    """Bytes of the codes of a head."""
    n, size = groups_of(width)
    return n * size // (2 if kind == "nf4" else 1)


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """Two bytes hold a scale; exact models have exact ones."""
    return torch.float64 if dtype == torch.float64 else torch.bfloat16


def encode(x: Tensor, kind: KVQuant) -> tuple[Tensor, Tensor]:
    """Code keys or values. No gradient passes.

    Args:
        x: (..., width).

    Returns:
        codes (..., code_bytes) and scale (..., groups). A group of zeros has the scale zero.
    """
    n, size = groups_of(x.shape[-1])
    wide = full_precision(x.detach())
    parts = F.pad(wide, (0, n * size - x.shape[-1])).unflatten(-1, (n, size))
    scale = _unit(parts.abs().amax(-1), kind, x.dtype)
    return _nearest(_over(parts, scale[..., None]), kind).flatten(-2), scale


def encode_channels(x: Tensor, kind: KVQuant) -> tuple[Tensor, Tensor, Tensor]:
    """Code keys of a group of tokens, every channel by itself. No gradient passes.

    Args:
        x: (..., tokens, width).

    Returns:
        codes (..., tokens, code_bytes), step and least (..., width). A channel that does not change
        has the step zero.
    """
    wide, n = full_precision(x.detach()), STEPS[kind]
    low, high = wide.aminmax(dim=-2)
    made = scale_dtype(x.dtype)
    least = low.to(made)
    step = ((high - least.to(wide.dtype)) / n * (1 + 2**-8)).clamp(min=0).to(made)
    parts = _over(wide - least.to(wide.dtype).unsqueeze(-2), step.unsqueeze(-2))
    groups, size = groups_of(x.shape[-1])
    codes = F.pad(parts.round().clamp(0, n), (0, groups * size - x.shape[-1])).to(torch.uint8)
    if kind == "nf4":  # a half of the head in the low halves of bytes: they are read in one piece
        first, second = codes.chunk(2, -1)
        codes = first | (second << 4)
    return codes, step, least


def decode_channels(
    codes: Tensor, step: Tensor, least: Tensor, kind: KVQuant, dtype: torch.dtype
) -> Tensor:
    """(..., width) of codes (..., code_bytes), in a dtype; step and least (..., width) of each
    code, or broadcastable. No gradient passes."""
    wide = torch.promote_types(dtype, torch.float32)
    n = codes.shape[-1]
    if kind == "nf4":
        parts = codes.new_empty(*codes.shape[:-1], 2 * n, dtype=wide)
        parts[..., :n], parts[..., n:] = codes & 15, codes >> 4
    else:
        parts = codes.to(wide)
    parts = parts[..., : step.shape[-1]]
    return parts.mul_(step.detach().to(wide)).add_(least.detach().to(wide)).to(dtype)


def _unit(most: Tensor, kind: KVQuant, dtype: torch.dtype) -> Tensor:
    """The scale of a group whose largest entry is `most`."""
    if kind != "nf4":  # a hair more than needed, so that rounding the scale cuts nothing off
        most = most / LARGEST[kind] * (1 + 2**-8)
    return most.to(scale_dtype(dtype))


def _over(parts: Tensor, scale: Tensor) -> Tensor:
    by = scale.to(parts.dtype)
    return parts / torch.where(by == 0, 1.0, by)


def _nearest(parts: Tensor, kind: KVQuant) -> Tensor:
    """(..., bytes) codes of entries over their scale (..., an even number)."""
    if kind == "int8":
        codes = parts.round().clamp(-127, 127).to(torch.int16) + 128
        return codes.to(torch.uint8)
    if kind == "fp8":
        limit = LARGEST["fp8"]
        coded = parts.clamp(-limit, limit).float().to(torch.float8_e4m3fn)
        return coded.view(torch.uint8)
    levels = torch.tensor(LEVELS, device=parts.device, dtype=parts.dtype)
    between = (levels[1:] + levels[:-1]) / 2
    return _packed(torch.bucketize(parts.contiguous(), between).to(torch.uint8))


def _packed(codes: Tensor) -> Tensor:
    """Two entries a byte."""
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def decode(codes: Tensor, scale: Tensor, kind: KVQuant, width: int, dtype: torch.dtype) -> Tensor:
    """(..., width) of `encode`'s results, in a dtype. No gradient passes."""
    wide = torch.promote_types(dtype, torch.float32)
    by = scale.detach().to(wide)[..., None]
    parts = _read(codes, kind, wide)
    parts = parts.unflatten(-1, (scale.shape[-1], -1)).mul_(by)
    return parts.flatten(-2)[..., :width].to(dtype)


def _read(codes: Tensor, kind: KVQuant, dtype: torch.dtype) -> Tensor:
    """What codes stand for, over their scale."""
    if kind == "int8":
        return codes.to(dtype).sub_(128)
    if kind == "fp8":
        return codes.view(torch.float8_e4m3fn).to(dtype)
    table = pairs(codes.device, dtype)
    return F.embedding(codes.int(), table).flatten(-2)  # five times as fast as by index


def pairs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """(256, 2) the two levels of nf4 in every byte."""
    levels = torch.tensor(LEVELS, device=device, dtype=dtype)
    byte = torch.arange(256, device=device)
    return torch.stack([levels[byte & 15], levels[byte >> 4]], 1)


@functools.cache
def _signs(n: int) -> tuple[tuple[float, ...], ...]:
    """Sylvester's matrix of n rows, a power of two, orthonormal; it is its own inverse."""
    size = n**-0.5
    return tuple(
        tuple(-size if (i & j).bit_count() % 2 else size for j in range(n)) for i in range(n)
    )


def turned_together(width: int) -> int:
    """How many entries of a head are turned together: its largest factor that is a power of two."""
    return width & -width


def hadamard(width: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(n, n) the rotation of heads of this width, n = turned_together(width)."""
    return torch.tensor(_signs(turned_together(width)), device=device, dtype=dtype)


def turn(x: Tensor, by: Tensor) -> Tensor:
    """Rotate the entries of heads (..., width); twice is not at all."""
    n = len(by)
    return (x.unflatten(-1, (-1, n)) @ by.to(x.dtype)).flatten(-2)


def straight_through(x: Tensor, shown: Tensor) -> Tensor:
    """The value of `shown` with the gradient of x."""
    return shown + (x - x.detach())
