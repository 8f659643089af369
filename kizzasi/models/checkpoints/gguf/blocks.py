"""How GGUF packs numbers: blocks of integers that share a scale and, in some types, a minimum.

    w = scale * level + minimum          one scale (and minimum) per group of a block

| type | values | group | levels | bytes |
|---|---|---|---|---|
| Q4_0, Q5_0, Q8_0 | 32 | 32 | 4, 5, 8 bits, signed | 18, 22, 34 |
| Q4_1, Q5_1 | 32 | 32 | 4, 5 bits, from the minimum up | 20, 24 |
| Q2_K | 256 | 16 | 2 bits; 4-bit scales and minima of their own scales | 84 |
| Q3_K | 256 | 16 | 3 bits, signed; 6-bit scales of one scale | 110 |
| Q4_K, Q5_K | 256 | 32 | 4, 5 bits; 6-bit scales and minima of their own scales | 144, 176 |
| Q6_K | 256 | 16 | 6 bits, signed; 8-bit scales of one scale | 210 |
| TQ1_0, TQ2_0 | 256 | 256 | -1, 0, 1: five to a byte, or four | 54, 66 |

Those whose levels come from tables are in grids.py.

Source: the format's specification, github.com/ggml-org/ggml, docs/gguf.md and src/ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kizzasi.models.checkpoints.gguf import grids
from kizzasi.models.checkpoints.gguf.levels import Bytes, Levels, nibbles


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
    with np.errstate(all="ignore"):
        level, scale, minimum = kind.unpack(blocks)
        values = np.multiply(level, scale, dtype=np.float32)
        if minimum is not None:
            values += minimum
    return values.reshape(-1)


def _groups(level: NDArray[np.int8], scale: NDArray, minimum: NDArray | None = None) -> Levels:
    """Blocks of a single group, their numbers as read."""
    wide = None if minimum is None else minimum.astype(np.float32)[:, None, None]
    return Levels(level[:, None], scale.astype(np.float32)[:, None, None], wide)


def _fifth_bits(blocks: NDArray) -> NDArray[np.int8]:
    """(n, 32) levels of 0 to 31: nibbles, and their highest bits apart."""
    high = np.unpackbits(blocks["high"], axis=-1, bitorder="little")
    return nibbles(blocks["low"]) | (high << 4).view(np.int8)


def _shifted(packed: Bytes, width: int, count: int) -> Bytes:
    """(n, g, k) bytes to (n, g, count, k): the parts of so many bits, the lowest first."""
    shift = np.arange(0, width * count, width, dtype=np.uint8)[:, None]
    return packed[:, :, None] >> shift & np.uint8((1 << width) - 1)


def _scaled(blocks: NDArray, scale: NDArray, minimum: NDArray) -> tuple[NDArray, NDArray]:
    """Both in units of the block's own d and d_min."""
    d, d_min = (blocks[name].astype(np.float32)[:, None] for name in ("d", "d_min"))
    return (d * scale)[..., None], -(d_min * minimum)[..., None]


def _q2_k(blocks: NDArray) -> Levels:
    """Two halves of 128, four groups of 32 in the pairs of bits of 32 bytes, cut in two."""
    n, packed = len(blocks), blocks["scales"]
    level = _shifted(blocks["low"].reshape(n, 2, 32), 2, 4).view(np.int8)
    return Levels(level.reshape(n, 16, 16), *_scaled(blocks, packed & 15, packed >> 4))


def _q3_k(blocks: NDArray) -> Levels:
    """As Q2_K, with a third bit that says "do not subtract 4"."""
    n, packed = len(blocks), blocks["scales"]
    low = _shifted(blocks["low"].reshape(n, 2, 32), 2, 4).view(np.int8).reshape(n, 256)
    high = _shifted(blocks["high"].reshape(n, 1, 32), 1, 8).view(np.int8).reshape(n, 256)
    lower = _shifted(packed[:, None, :8], 4, 2).reshape(n, 16)
    upper = _shifted(packed[:, None, 8:], 2, 4).reshape(n, 16)
    scale = (lower | upper << 4).astype(np.float32) - 32
    scale = blocks["d"].astype(np.float32)[:, None] * scale
    return Levels((low + 4 * high - 4).reshape(n, 16, 16), scale[..., None])


def _six_bits(packed: Bytes) -> tuple[NDArray, NDArray]:
    """(n, 12) bytes to eight scales and eight minima."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=-1)
    return scale, np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=-1)


def _q4_k(blocks: NDArray) -> Levels:
    """Eight groups of 32; group 2c is the low halves of bytes 32c to 32c + 31, 2c + 1 the high."""
    level = nibbles(blocks["low"].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return Levels(level, *_scaled(blocks, *_six_bits(blocks["scales"])))


def _q5_k(blocks: NDArray) -> Levels:
    """As Q4_K, the fifth bits of the groups in the bits of 32 bytes."""
    n = len(blocks)
    low = nibbles(blocks["low"].reshape(n, 4, 32)).reshape(n, 8, 32)
    high = _shifted(blocks["high"].reshape(n, 1, 32), 1, 8).view(np.int8).reshape(n, 8, 32)
    return Levels(low | high << 4, *_scaled(blocks, *_six_bits(blocks["scales"])))


def _tq1_0(blocks: NDArray) -> Levels:
    """Five digits to base 3 in the upper part of a byte's range: the first is 3 b / 256."""
    n, packed = len(blocks), (blocks["first"], blocks["second"], blocks["third"])
    powers = np.array([1, 3, 9, 27, 81], np.uint8)[:, None]
    digits = [
        (part[:, None] * powers[:count]).reshape(n, -1)
        for part, count in zip(packed, (5, 5, 4), strict=True)
    ]
    level = (np.concatenate(digits, axis=-1).astype(np.uint16) * 3 >> 8).astype(np.int8) - 1
    return _groups(level, blocks["d"])


def _tq2_0(blocks: NDArray) -> Levels:
    level = _shifted(blocks["low"].reshape(-1, 2, 32), 2, 4).view(np.int8).reshape(-1, 256)
    return _groups(level - np.int8(1), blocks["d"])


def _q6_k(blocks: NDArray) -> Levels:
    """Two halves of 128: low halves of 64 bytes, high halves of them, and two more bits of each."""
    n = len(blocks)
    low = blocks["low"].reshape(n, 2, 64)
    shift = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = blocks["high"].reshape(n, 2, 1, 32) >> shift & 3
    level = nibbles(low) | (high << 4).view(np.int8).reshape(n, 2, 128)
    scale = blocks["d"].astype(np.float32)[:, None] * blocks["scales"]
    return Levels((level - np.int8(32)).reshape(n, 16, 16), scale[..., None])


def _layout(*fields: tuple[str, str] | tuple[str, str, int]) -> np.dtype:
    return np.dtype(list(fields))


D, NIBBLES, HIGH = ("d", "<f2"), ("low", "u1", 16), ("high", "u1", 4)
SUPER = (D, ("d_min", "<f2"), ("scales", "u1", 12))
TWO = (("scales", "u1", 16), ("low", "u1", 64), D, ("d_min", "<f2"))
THREE = (("high", "u1", 32), ("low", "u1", 64), ("scales", "u1", 12), D)
TERNARY = (("first", "u1", 32), ("second", "u1", 16), ("third", "u1", 4))
SIX = (("low", "u1", 128), ("high", "u1", 64), ("scales", "i1", 16), D)
TYPES = {
    0: BlockType("F32", 1, np.dtype("<f4")),
    1: BlockType("F16", 1, np.dtype("<f2")),
    2: BlockType("Q4_0", 32, _layout(D, NIBBLES), lambda b: _groups(nibbles(b["low"]) - 8, b["d"])),
    3: BlockType(
        "Q4_1",
        32,
        _layout(D, ("m", "<f2"), NIBBLES),
        lambda b: _groups(nibbles(b["low"]), b["d"], b["m"]),
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
    10: BlockType("Q2_K", 256, _layout(*TWO), _q2_k),
    11: BlockType("Q3_K", 256, _layout(*THREE), _q3_k),
    12: BlockType("Q4_K", 256, _layout(*SUPER, ("low", "u1", 128)), _q4_k),
    13: BlockType("Q5_K", 256, _layout(*SUPER, ("high", "u1", 32), ("low", "u1", 128)), _q5_k),
    14: BlockType("Q6_K", 256, _layout(*SIX), _q6_k),
    28: BlockType("F64", 1, np.dtype("<f8")),
    34: BlockType("TQ1_0", 256, _layout(*TERNARY, D), _tq1_0),
    35: BlockType("TQ2_0", 256, _layout(("low", "u1", 64), D), _tq2_0),
    **{
        code: BlockType(name, size, np.dtype(grids.LAYOUTS[name]), unpack)
        for code, name, size, unpack in (
            (16, "IQ2_XXS", 256, grids.iq2_xxs),
            (17, "IQ2_XS", 256, grids.iq2_xs),
            (18, "IQ3_XXS", 256, grids.iq3_xxs),
            (19, "IQ1_S", 256, grids.iq1_s),
            (20, "IQ4_NL", 32, grids.iq4_nl),
            (21, "IQ3_S", 256, grids.iq3_s),
            (22, "IQ2_S", 256, grids.iq2_s),
            (23, "IQ4_XS", 256, grids.iq4_xs),
            (29, "IQ1_M", 256, grids.iq1_m),
            (39, "MXFP4", 32, grids.mxfp4),
            (40, "NVFP4", 64, grids.nvfp4),
        )
    },
    30: BlockType("BF16", 1, np.dtype("<u2")),
}
