"""Tensors in files, by name: shapes first, values on demand, nothing run and nothing trusted.

Read: .safetensors, and zip files of torch.save (.bin, .pth, .pt), each whole or in shards that an
index.json lists. Torch files are memory mapped and unpickled by torch's restricted unpickler, after
a look at their pickle: it may name tensors, storages and dictionaries, and nothing else.
"""

from __future__ import annotations

import json
import math
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kizzasi.errors import CheckpointError
from kizzasi.models.spec import MAX_FILE_BYTES

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
WHOLE = ("model.safetensors", "pytorch_model.bin")
INDEX = tuple(f"{name}.index.json" for name in WHOLE)
ZIP, OLD_TORCH = b"PK\x03\x04", b"\x80\x02\x8a\n"
PICKLED = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    # integers: buffers that are no weights, such as GPT-2's causal mask
    *(f"torch {name}Storage" for name in ("Double", "Float", "Half", "BFloat16")),
    *(f"torch {name}Storage" for name in ("Bool", "Byte", "Int", "Long")),
}
IMPORTS = ("GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4")  # pickle's ways to a name
# what torch and zipfile raise on damaged files
MALFORMED = (
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError),
    *(OSError, EOFError, struct.error, zipfile.BadZipFile, pickle.UnpicklingError),
)


class Stored(NamedTuple):
    """A tensor in a file. dtype is None if it is none of float64, float32, float16, bfloat16."""

    shape: Shape
    dtype: torch.dtype | None
    read: Callable[[], Tensor]


Storage = Mapping[str, Stored]


def open_folder(folder: Path) -> Storage:
    """The tensors of a folder in the layout of transformers; safetensors are preferred.

    Raises:
        CheckpointError: none of the four usual files is there, or one is damaged or hostile.
    """
    for name, index in zip(WHOLE, INDEX, strict=True):
        if (folder / name).is_file():
            return open_file(folder / name)
        if (folder / index).is_file():
            return _open_shards(folder / index)
    raise CheckpointError(f"{folder}: none of {', '.join((*WHOLE, *INDEX))} there")


def open_file(path: Path) -> Storage:
    """The tensors of one file; the format is told by its first bytes, not by its name.

    Raises:
        CheckpointError: missing, damaged, hostile, or of an unknown format.
    """
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read it: {error.strerror}") from error
    if head == OLD_TORCH:
        rule = "a file of torch before 1.6; load it there and save it with a newer one"
        raise CheckpointError(f"{path}: {rule}")
    return _open_torch(path) if head == ZIP else _open_safetensors(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object. Raises CheckpointError."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise CheckpointError(f"{path}: larger than {MAX_FILE_BYTES} bytes; not a config")
        data = json.loads(path.read_text("utf-8"))
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {data!r:.60}")
    return data


def _open_shards(index: Path) -> Storage:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f'{index}: no "weight_map" of tensor names to files')
    files = sorted({str(place) for place in places.values()})
    for file in files:
        if Path(file).name != file or "\\" in file:
            raise CheckpointError(f"{index}: {file!r} is not the plain name of a file beside it")
    stored: dict[str, Stored] = {}
    for file in files:
        shard = open_file(index.parent / file)
        wanted = {name for name, place in places.items() if place == file}
        if wanted != shard.keys():
            odd = sorted(wanted ^ shard.keys())[0]
            raise CheckpointError(f"{index}: {odd} is listed or stored in {file}, but not both")
        stored |= shard
    return stored


def _open_safetensors(path: Path) -> Storage:
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: Stored(
                    tuple(part.get_shape()),
                    DTYPES.get(part.get_dtype()),
                    partial(_read_safetensor, path, name),
                )
                for name, part in slices.items()
            }
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: missing or damaged: {error}") from error


def _read_safetensor(path: Path, name: str) -> Tensor:
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {name}: cannot be read: {error}") from error


def _open_torch(path: Path) -> Storage:
    try:
        fault = _suspicious(path)
        data = fault or torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except MALFORMED as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error
    if fault:
        raise CheckpointError(f"{path}: {fault}")
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a dict of tensors, got {type(data).__name__}")
    for name, tensor in data.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: {name!r:.80} does not name a tensor")
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: {name} has more values than the file stores for it")
    known = set(DTYPES.values())
    return {
        name: Stored(tuple(t.shape), t.dtype if t.dtype in known else None, t.detach)
        for name, t in data.items()
    }


def _suspicious(path: Path) -> str:
    """What speaks against unpickling a file: compressed members, which may be far larger than the
    file, or names beyond PICKLED, of which torch's unpickler allows some that allocate."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            return "compressed, and torch.save never compresses; save it again"
        pickles = [m for m in members if m.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            return "a zip file, but not one of torch.save"
        for code, argument, _ in pickletools.genops(archive.read(pickles[0])):
            if code.name in IMPORTS and argument not in PICKLED:
                name = str(argument).replace(" ", ".")
                return f"its pickle asks for {name}; a dict of tensors needs no such thing"
    return ""


def count_values(shapes: Shapes) -> int:
    """How many numbers are stored."""
    return sum(math.prod(shape) for shape in shapes.values())
