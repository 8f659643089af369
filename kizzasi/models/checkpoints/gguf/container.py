"""The GGUF container: metadata by key, tensors by name, in one memory-mapped file.

Why a reader of our own: files come from strangers, and the package `gguf` trusts their counts and
offsets. Here every length is held against what is left of the file before anything is made of it,
so a file can cost at most a few times its own size, and whatever is wrong is a CheckpointError.
Its dequantisation is our tests' oracle.

Versions 2 and 3, little-endian:

    "GGUF" | version u32 | n_tensors u64 | n_keys u64 | keys | tensor table | padding | data
    key     string, type u32, value          string  length u64, UTF-8
    array   type u32, length u64, values     tensor  string, n_dims u32, dims u64, type u32, offset

The first dimension is the fastest. Source: github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kizzasi.errors import CheckpointError
from kizzasi.models.checkpoints.gguf.blocks import TYPES, BlockType
from kizzasi.models.checkpoints.gguf.levels import Bytes

MAGIC = b"GGUF"
# Of a key's value; 8 is a string and 9 an array.
NUMBERS = {
    i: np.dtype(name)
    for i, name in enumerate("u1 i1 <u2 <i2 <u4 <i4 <f4 ? . . <u8 <i8 <f8".split())  # noqa: SIM905
    if name != "."
}
STRING, ARRAY = 8, 9
LEAST_KEY = 8 + 4 + 1  # bytes of an empty name, a type and the shortest value
LEAST_TENSOR = 8 + 4 + 4 + 8
MAX_DIMS = 4


class GGUFTensor(NamedTuple):
    """A tensor of the file: its type, its shape with the fastest dimension last, its bytes."""

    kind: BlockType
    shape: tuple[int, ...]
    data: Bytes


class GGUF(NamedTuple):
    """An open file. Arrays of numbers among the metadata are read-only views of it."""

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def open_gguf(path: Path) -> GGUF:
    """Read the tables of a file; the tensors' bytes stay on disk until they are used.

    Raises:
        CheckpointError: unreadable, not GGUF of version 2 or 3, damaged, or of unknown types.
    """
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: empty
        raise CheckpointError(f"{path}: cannot read it: {error}") from error
    return _Reader(path, np.frombuffer(mapped, np.uint8)).read()


class _Reader:
    """A cursor that never leaves the file."""

    def __init__(self, path: Path, data: Bytes) -> None:
        self.path, self.data, self.at = path, data, 0

    def read(self) -> GGUF:
        if self._take(4, "the magic").tobytes() != MAGIC:
            self._refuse("not a GGUF file: it does not start with GGUF")
        version = self._number("<u4", "the version")
        if version not in (2, 3):
            swapped = version in (2 << 24, 3 << 24)
            what = "big-endian" if swapped else f"of version {version}"
            self._refuse(f"{what}; only little-endian files of version 2 and 3 can be read")
        n_tensors = self._count("tensors", LEAST_TENSOR)
        n_keys = self._count("keys", LEAST_KEY)
        metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self._string("the name of a key")
            if key in metadata:
                self._refuse(f"{key!r:.80} is there twice")
            metadata[key] = self._value(self._number("<u4", f"{key:.80}: type"), f"{key:.80}")
        self._fits(n_tensors, LEAST_TENSOR, "tensors")
        heads = [self._head() for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not (isinstance(alignment, int) and 0 < alignment <= 2**20 and alignment % 8 == 0):
            self._refuse(f"general.alignment: {alignment!r:.80} is not a small multiple of 8")
        return GGUF(metadata, self._tensors(heads, alignment))

    def _tensors(
        self, heads: list[tuple[str, BlockType, tuple[int, ...], int]], alignment: int
    ) -> dict[str, GGUFTensor]:
        """Cut the data part; no two tensors may share a byte."""
        start = -(-self.at // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        end, before = start, "the tensor table"
        for name, kind, shape, offset in sorted(heads, key=lambda head: head[3]):
            size = math.prod(shape) // kind.values * kind.layout.itemsize
            begin = start + offset
            if name in tensors:
                self._refuse(f"{name!r:.80} is there twice")
            if begin % alignment or begin < end:
                self._refuse(f"{name:.80}: offset {offset} is misaligned or overlaps {before:.80}")
            if begin + size > len(self.data):
                self._short(f"{name:.80}: {size} bytes at {begin}")
            tensors[name] = GGUFTensor(kind, shape, self.data[begin : begin + size])
            end, before = begin + size, name
        return tensors

    def _head(self) -> tuple[str, BlockType, tuple[int, ...], int]:
        """One row of the tensor table: name, type, shape, offset."""
        name = self._string("the name of a tensor")
        n_dims = self._number("<u4", f"{name:.80}: dimensions")
        if not 1 <= n_dims <= MAX_DIMS:
            self._refuse(f"{name:.80}: {n_dims} dimensions; 1 to {MAX_DIMS} are possible")
        dims = self._take(8 * n_dims, f"{name:.80}: shape").view("<u8").tolist()
        code = self._number("<u4", f"{name:.80}: type")
        if code not in TYPES:
            known = ", ".join(kind.name for kind in TYPES.values())
            self._refuse(f"{name:.80}: type {code} is not supported; convert to one of {known}")
        kind = TYPES[code]
        if min(dims) < 1 or dims[0] % kind.values:
            self._refuse(f"{name:.80}: shape {dims} does not make blocks of {kind.values} values")
        return name, kind, tuple(reversed(dims)), self._number("<u8", f"{name:.80}: offset")

    def _value(self, code: int, key: str) -> Any:
        if code in NUMBERS:
            value = self._number(NUMBERS[code], key)
            # The shortest decimal of a float32, so that 1e-5 is read as it was meant.
            return float(str(np.float32(value))) if NUMBERS[code] == np.float32 else value
        if code == STRING:
            return self._string(key)
        if code != ARRAY:
            self._refuse(f"{key}: unknown type {code}")
        code, length = self._number("<u4", key), self._number("<u8", key)
        if code in NUMBERS:
            kind = NUMBERS[code]
            self._fits(length, kind.itemsize, key)
            return self._take(length * kind.itemsize, key).view(kind)
        if code != STRING:
            self._refuse(f"{key}: an array of type {code}; only numbers and strings are possible")
        self._fits(length, 8, key)
        return [self._string(key) for _ in range(length)]

    def _string(self, what: str) -> str:
        size = self._number("<u8", what)
        try:
            return self._take(size, what).tobytes().decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: {what}: not UTF-8: {error}") from error

    def _count(self, what: str, least: int) -> int:
        count = self._number("<u8", what)
        self._fits(count, least, what)
        return count

    def _number(self, kind: Any, what: str) -> Any:
        kind = np.dtype(kind)
        return self._take(kind.itemsize, what).view(kind)[0].item()

    def _take(self, size: int, what: str) -> Bytes:
        self._fits(size, 1, what)
        self.at += size
        return self.data[self.at - size : self.at]

    def _fits(self, count: int, size: int, what: str) -> None:
        if count * size > len(self.data) - self.at:
            self._short(f"{what}: {count} of at least {size} bytes")

    def _short(self, what: str) -> Any:
        self._refuse(
            f"{what}, but the file has {len(self.data)}; truncated or damaged, get it anew"
        )

    def _refuse(self, reason: str) -> Any:
        raise CheckpointError(f"{self.path}: {reason}")
