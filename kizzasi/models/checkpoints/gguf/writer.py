"""Writing the GGUF container: see container.py, whose reader looks at every file before it counts.

Q8_0   w = d q     q = w / d to the nearest integer, d = max |w| / 127 over 32 values, in float16
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kizzasi.errors import CheckpointError
from kizzasi.files import write_file
from kizzasi.models.checkpoints.gguf.blocks import TYPES
from kizzasi.models.checkpoints.gguf.container import ARRAY, MAGIC, NUMBERS, STRING, open_gguf
from kizzasi.models.checkpoints.gguf.levels import Bytes

Kind = Literal["F32", "F16", "Q8_0"]
KINDS: tuple[Kind, ...] = ("F32", "F16", "Q8_0")
VERSION, ALIGNMENT = 3, 32
CODES = {kind.name: code for code, kind in TYPES.items()}
NUMBER_CODES = {str(kind): code for code, kind in NUMBERS.items()}
U32, I32, F32, BOOL = (NUMBER_CODES[name] for name in ("uint32", "int32", "float32", "bool"))
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7}  # `general.file_type`, by what most of it is


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    kind: Kind,
    matrices: Set[str],
) -> None:
    """Write a file, read it back, and give it its name.

    Args:
        metadata: texts, truth values, whole numbers (as u32, or i32 if negative), others (as f32),
            and lists of texts or of whole numbers.
        tensors: of up to four dimensions.
        kind, matrices: as in `gguf.write`: the type of the tensors that are named.

    Raises:
        CheckpointError: it cannot be written, or was not read back as written.
    """
    metadata = {**metadata, "general.file_type": FILE_TYPES[kind]}
    if kind == "Q8_0":
        metadata["general.quantization_version"] = 2
    plain: Kind = "F32"
    kinds: dict[str, Kind] = {
        name: _kind(t, kind if name in matrices else plain) for name, t in tensors.items()
    }
    data = {name: encode(tensors[name], kinds[name]) for name in tensors}

    def make(file: BinaryIO) -> None:
        file.write(_tables(metadata, tensors, kinds, data))
        for values in data.values():
            file.write(values.tobytes())
            file.write(bytes(-values.nbytes % ALIGNMENT))

    def check(partial: Path) -> None:
        read = open_gguf(partial)
        same = read.metadata.keys() == metadata.keys() and read.tensors.keys() == data.keys()
        for name, tensor in read.tensors.items() if same else ():
            same &= tensor.shape == tuple(tensors[name].shape)
            same &= np.array_equal(tensor.data, data[name])
        if not same:
            raise CheckpointError(f"{path}: not read back as written; the disk is faulty")

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, make, check)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot write it: {error}") from error


def encode(tensor: Tensor, kind: Kind) -> Bytes:
    """The bytes of a tensor in a type, flat."""
    values = tensor.detach().float().cpu().contiguous().numpy().reshape(-1)
    if kind == "Q8_0":
        return _q8_0(values.reshape(-1, 32))
    return values.astype(np.float16 if kind == "F16" else np.float32).view(np.uint8)


def _q8_0(values: NDArray[np.float32]) -> Bytes:
    """(n, 32) numbers to n blocks. Halves are rounded away from zero, as ggml does."""
    blocks = np.empty(len(values), TYPES[CODES["Q8_0"]].layout)
    step = np.abs(values).max(1, keepdims=True) / np.float32(127)
    ratio = values * np.divide(1, step, out=np.zeros_like(step), where=step > 0)
    blocks["q"] = np.trunc(ratio + np.copysign(np.float32(0.5), ratio)).astype(np.int8)
    blocks["d"] = step[:, 0].astype(np.float16)
    return blocks.view(np.uint8)


def _kind(tensor: Tensor, kind: Kind) -> Kind:
    return "F16" if kind == "Q8_0" and tensor.shape[-1] % 32 else kind


def _tables(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    kinds: Mapping[str, Kind],
    data: Mapping[str, Bytes],
) -> bytes:
    """All before the data, padded."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        code, content = _value(value)
        parts += [_text(key), struct.pack("<I", code), content]
    offset = 0
    for name, tensor in tensors.items():
        dims = tuple(tensor.shape)[::-1]
        head = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, CODES[kinds[name]], offset)
        parts += [_text(name), head]
        offset += data[name].nbytes + -data[name].nbytes % ALIGNMENT
    whole = b"".join(parts)
    return whole + bytes(-len(whole) % ALIGNMENT)


def _value(value: Any) -> tuple[int, bytes]:
    """A type and what follows it."""
    if isinstance(value, str):
        return STRING, _text(value)
    if isinstance(value, bool):
        return BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        return (I32, struct.pack("<i", value)) if value < 0 else (U32, struct.pack("<I", value))
    if isinstance(value, float):
        return F32, struct.pack("<f", value)
    texts = all(isinstance(item, str) for item in value)
    code = STRING if texts else I32
    pack: Callable[[Any], bytes] = _text if texts else lambda item: struct.pack("<i", item)
    return ARRAY, struct.pack("<IQ", code, len(value)) + b"".join(map(pack, value))


def _text(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content
