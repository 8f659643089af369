"""How GGUF packs numbers: blocks of integers that share a scale and, in some types, a minimum.

    w = scale * level + minimum          one scale (and minimum) per group of a block

| type | values | group | levels | bytes |
|---|---|---|---|---|
| Q4_0, Q5_0, Q8_0 | 32 | 32 | 4, 5, 8 bits, signed | 18, 22, 34 |
| Q4_1, Q5_1 | 32 | 32 | 4, 5 bits, from the minimum up | 20, 24 |
| Q4_K | 256 | 32 | 4 bits; 6-bit scales and minima of their own scales | 144 |
| Q6_K | 256 | 16 | 6 bits, signed; 8-bit scales of one scale | 210 |

Source: the format's specification, github.com/ggml-org/ggml, docs/gguf.md and src/ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Callable
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


class BlockType(NamedTuple):
    """A type of tensor in a GGUF file.

    values  numbers in a block; 1 for plain numbers, whose `unpack` is None.
    layout  fields of a block in the file.
    unpack  (n,) blocks to levels.
    """

    name: str
    values: int
    layout: np.dtype
    unpack: Callable[[NDArray], Levels] | None = None


def dequantize(kind: BlockType, data: Bytes) -> NDArray[np.float32]:
    """The values of whole blocks, flat, in float32: one rounding at most per value.

    Bytes that say infinity or "not a number" give such values.
    """
    blocks = data.view(kind.layout)
    if kind.name == "BF16":
        return (blocks.astype(np.uint32) << 16).view(np.float32)
    if kind.unpack is None:
        return blocks.astype(np.float32)
    level, scale, minimum = kind.unpack(blocks)
    with np.errstate(invalid="ignore"):
        values = np.multiply(level, scale, dtype=np.float32)
        if minimum is not None:
            values += minimum
    return values.reshape(-1)


def _nibbles(packed: Bytes) -> NDArray[np.int8]:
    """(..., k) bytes to (..., 2k): the low halves, then the high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1).view(np.int8)


def _groups(level: NDArray[np.int8], scale: NDArray, minimum: NDArray | None = None) -> Levels:
    """Blocks of a single group, their numbers as read."""
    wide = None if minimum is None else minimum.astype(np.float32)[:, None, None]
    return Levels(level[:, None], scale.astype(np.float32)[:, None, None], wide)


def _fifth_bits(blocks: NDArray) -> NDArray[np.int8]:
    """(n, 32) levels of 0 to 31: nibbles, and their highest bits apart."""
    high = np.unpackbits(blocks["high"], axis=-1, bitorder="little")
    return _nibbles(blocks["low"]) | (high << 4).view(np.int8)


def _q4_k(blocks: NDArray) -> Levels:
    """Eight groups of 32; group 2c is the low halves of bytes 32c to 32c + 31, 2c + 1 the high."""
    n, packed = len(blocks), blocks["scales"]
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=-1)
    minimum = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=-1)
    d, d_min = (blocks[name].astype(np.float32)[:, None] for name in ("d", "d_min"))
    with np.errstate(invalid="ignore"):
        scale, minimum = (d * scale)[..., None], -(d_min * minimum)[..., None]
    return Levels(_nibbles(blocks["low"].reshape(n, 4, 32)).reshape(n, 8, 32), scale, minimum)


def _q6_k(blocks: NDArray) -> Levels:
    """Two halves of 128: low halves of 64 bytes, high halves of them, and two more bits of each."""
    n = len(blocks)
    low = blocks["low"].reshape(n, 2, 64)
    shift = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = blocks["high"].reshape(n, 2, 1, 32) >> shift & 3
    level = _nibbles(low) | (high << 4).view(np.int8).reshape(n, 2, 128)
    with np.errstate(invalid="ignore"):
        scale = blocks["d"].astype(np.float32)[:, None] * blocks["scales"]
    return Levels((level - np.int8(32)).reshape(n, 16, 16), scale[..., None])


def _layout(*fields: tuple[str, str] | tuple[str, str, int]) -> np.dtype:
    return np.dtype(list(fields))


D, NIBBLES, HIGH = ("d", "<f2"), ("low", "u1", 16), ("high", "u1", 4)
SUPER = (("scales", "u1", 12), ("low", "u1", 128))
SIX = (("low", "u1", 128), ("high", "u1", 64), ("scales", "i1", 16), D)
TYPES = {
    0: BlockType("F32", 1, np.dtype("<f4")),
    1: BlockType("F16", 1, np.dtype("<f2")),
    2: BlockType(
        "Q4_0", 32, _layout(D, NIBBLES), lambda b: _groups(_nibbles(b["low"]) - 8, b["d"])
    ),
    3: BlockType(
        "Q4_1",
        32,
        _layout(D, ("m", "<f2"), NIBBLES),
        lambda b: _groups(_nibbles(b["low"]), b["d"], b["m"]),
    ),
    6: BlockType(
        "Q5_0", 32, _layout(D, HIGH, NIBBLES), lambda b: _groups(_fifth_bits(b) - 16, b["d"])
    ),
    7: BlockType(
        "Q5_1",
        32,
        _layout(D, ("m", "<f2"), HIGH, NIBBLES),
        lambda b: _groups(_fifth_bits(b), b["d"], b["m"]),
    ),
    8: BlockType("Q8_0", 32, _layout(D, ("q", "i1", 32)), lambda b: _groups(b["q"], b["d"])),
    12: BlockType("Q4_K", 256, _layout(D, ("d_min", "<f2"), *SUPER), _q4_k),
    14: BlockType("Q6_K", 256, _layout(*SIX), _q6_k),
    30: BlockType("BF16", 1, np.dtype("<u2")),
}
