"""Tensors in files, by name: shapes first, values on demand, nothing run and nothing trusted.

Read: .safetensors, and zip files of torch.save (.bin, .pth, .pt; torch_file.py), each whole or in
shards that an index.json lists. A value is read from its place in the file into memory of its own;
no file stays open or mapped, so a model costs what its tensors cost and later changes of the file
touch nothing. Written: .safetensors, whole or in shards, and read back before they get their names.
"""

from __future__ import annotations

import contextlib
import json
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kizzasi.errors import CheckpointError
from kizzasi.files import Make, write_file
from kizzasi.models.checkpoints.storage.stored import (
    DTYPES,
    Place,
    Storage,
    Stored,
    as_bytes,
    stamp,
)
from kizzasi.models.checkpoints.storage.torch_file import open_torch
from kizzasi.models.spec import MAX_FILE_BYTES

WHOLE = ("model.safetensors", "pytorch_model.bin")
INDEX = tuple(f"{name}.index.json" for name in WHOLE)
MAX_SMALL_BYTES = 128 * 2**20
ZIP, OLD_TORCH = b"PK\x03\x04", b"\x80\x02\x8a\n"
# What wrappers put before every name (DataParallel, torch.compile, DeepSpeed), or inside it.
WRAPPERS = re.compile(r"^(?:(?:_orig_mod|module|_forward_module)\.)+")
INNER = re.compile(r"(?<=\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def open_folder(folder: Path) -> Storage:
    """The tensors of a folder in the layout of transformers; safetensors are preferred.

    Raises:
        CheckpointError: none of the four usual files is there, or one is damaged or hostile.
    """
    for name, index in zip(WHOLE, INDEX, strict=True):
        if (folder / name).is_file():
            return open_file(folder / name)
        if (folder / index).is_file():
            return _open_shards(folder / index, _open_file)
    raise CheckpointError(f"{folder}: none of {', '.join((*WHOLE, *INDEX))} there")


def open_safetensors(folder: Path) -> tuple[Path, Storage]:
    """The same of safetensors alone, and the file that says which tensors there are."""
    index = folder / INDEX[0]
    if index.is_file() and not (folder / WHOLE[0]).is_file():
        return index, _open_shards(index, _open_safetensors)
    return folder / WHOLE[0], _unwrapped(_open_safetensors(folder / WHOLE[0]), folder / WHOLE[0])


def open_file(path: Path) -> Storage:
    """The tensors of one file; the format is told by its first bytes, not by its name.

    Wrappers' prefixes, such as "module." or "_orig_mod.", are taken from the names.

    Raises:
        CheckpointError: missing, damaged, hostile, or of an unknown format.
    """
    return _unwrapped(_open_file(path), path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object. Raises CheckpointError."""
    try:
        info = path.stat()
        if info.st_size > MAX_FILE_BYTES or not stat.S_ISREG(info.st_mode):
            raise CheckpointError(f"{path}: larger than {MAX_FILE_BYTES} bytes; not a config")
        data = json.loads(path.read_text("utf-8"))
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {data!r:.60}")
    return data


def _open_file(path: Path) -> Storage:
    _require_regular(path)
    with path.open("rb") as file:
        head = file.read(4)
    if head == OLD_TORCH:
        rule = "a file of torch before 1.6; load it there and save it with a newer one"
        raise CheckpointError(f"{path}: {rule}")
    return open_torch(path) if head == ZIP else _open_safetensors(path)


def _unwrapped(storage: Storage, path: Path) -> Storage:
    """Without what wrappers add; a prefix must be before all names."""
    if not all(WRAPPERS.match(name) for name in storage):
        names = {name: INNER.sub("", name) for name in storage}
    else:
        names = {name: INNER.sub("", WRAPPERS.sub("", name)) for name in storage}
    if len(set(names.values())) < len(names):
        raise CheckpointError(f"{path}: two tensors have one name but for a wrapper's prefix")
    return {names[name]: stored for name, stored in storage.items()}


def _open_shards(index: Path, opened: Callable[[Path], Storage]) -> Storage:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f'{index}: no "weight_map" of tensor names to files')
    files = sorted({str(place) for place in places.values()})
    for file in files:
        if Path(file).name != file or "\\" in file or "\0" in file:
            raise CheckpointError(f"{index}: {file!r} is not the plain name of a file beside it")
    stored: dict[str, Stored] = {}
    for file in files:
        shard = opened(index.parent / file)
        wanted = {name for name, place in places.items() if place == file}
        if wanted != shard.keys():
            odd = sorted(wanted ^ shard.keys())[0]
            raise CheckpointError(f"{index}: {odd} is listed or stored in {file}, but not both")
        stored |= shard
    return _unwrapped(stored, index)


def _require_regular(path: Path) -> None:
    """A device or a pipe may have no end."""
    try:
        kind = path.stat().st_mode
        with path.open("rb") if stat.S_ISREG(kind) else contextlib.nullcontext():
            pass
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: missing or damaged: cannot read it: {error}") from error
    if not stat.S_ISREG(kind):
        raise CheckpointError(f"{path}: cannot read it: not a regular file")


def _open_safetensors(path: Path) -> Storage:
    _require_regular(path)
    try:
        with path.open("rb") as file:
            with safe_open(_name(path, file), "pt"):  # refuses headers that do not add up
                seen = stamp(path)
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        return {name: _safetensor(path, entry, 8 + size, seen) for name, entry in header.items()}
    except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{path}: missing or damaged: {error}") from error


def _name(path: Path, file: BinaryIO) -> str | Path:
    """A file's name; safetensors takes none that is no text, and then the open file has another."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return f"/dev/fd/{file.fileno()}"
    return path


def _safetensor(
    path: Path, entry: Mapping[str, Any], start: int, seen: tuple[int, int, int]
) -> Stored:
    shape, dtype = tuple(entry["shape"]), DTYPES.get(entry["dtype"])
    first, last = entry["data_offsets"]
    place = Place(path, start + first, last - first, seen)
    kind = dtype or torch.uint8
    return Stored(shape, dtype, lambda: place.read().view(kind).view(shape))


def safetensors(tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> Make:
    """What writes these tensors into a file, one at a time, in the order of safetensors.

    about: what else the header's metadata says.

    Raises CheckpointError for a dtype that the format lacks.
    """
    codes = {dtype: code for code, dtype in DTYPES.items()}
    ranks = list(DTYPES.values())
    for name, tensor in tensors.items():
        if tensor.dtype not in codes:
            raise CheckpointError(f"{name}: {tensor.dtype} has no place in safetensors; convert it")
    order = sorted(tensors, key=lambda name: (-ranks.index(tensors[name].dtype), name))
    header, end = dict[str, Any](__metadata__={"format": "pt", **(about or {})}), 0
    for name in order:
        t, begin, end = tensors[name], end, end + tensors[name].nbytes
        entry = {"dtype": codes[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
        header[name] = entry
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def make(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(as_bytes(tensors[name]).numpy().data)

    return make


def shards(tensors: Mapping[str, Tensor], most: int) -> list[dict[str, Tensor]]:
    """Tensors in their order, in parts of at most so many bytes, but for a single larger one."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if parts[-1] and size + tensor.nbytes > most:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += tensor.nbytes
    return parts


def small_file(path: Path) -> bytes:
    """A tokenizer's file and the like, whole. Raises CheckpointError."""
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode) or info.st_size > MAX_SMALL_BYTES:
            raise CheckpointError(f"{path}: not a regular file of at most {MAX_SMALL_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read it: {error}") from error


def require_equal(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless a file holds these tensors, bit for bit."""
    stored = open_file(path)
    if stored.keys() != tensors.keys():
        raise CheckpointError(f"{path}: not read back as written: {len(stored)} tensors")
    for name, tensor in tensors.items():
        found, same = stored[name], tuple(tensor.shape)
        if found.shape != same or found.dtype != tensor.dtype:
            raise CheckpointError(f"{path}: {name}: not read back as written; the disk is faulty")
        if not torch.equal(as_bytes(found.read()), as_bytes(tensor)):
            raise CheckpointError(f"{path}: {name}: not read back as written; the disk is faulty")


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None
) -> None:
    """One file, in place of an earlier one, read back first. Raises CheckpointError."""
    try:
        write_file(
            path, safetensors(tensors, about), lambda partial: require_equal(partial, tensors)
        )
    except OSError as error:
        raise CheckpointError(f"{path}: cannot write it: {error}") from error


def weight_files(
    folder: Path, tensors: Mapping[str, Tensor], most: int
) -> tuple[dict[Path, Make], list[dict[str, Tensor]]]:
    """What writes a folder's tensors, whole or in shards with their index, and which go where."""
    parts = shards(tensors, most)
    stem, suffix = WHOLE[0].split(".")
    n = len(parts)
    names = [f"{stem}-{i + 1:05}-of-{n:05}.{suffix}" for i in range(n)] if n > 1 else [WHOLE[0]]
    makers = {folder / name: safetensors(part) for name, part in zip(names, parts, strict=True)}
    if n > 1:
        places = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        total = sum(tensor.nbytes for tensor in tensors.values())
        data = {"metadata": {"total_size": total}, "weight_map": places}
        text = json.dumps(data, indent=2, sort_keys=True) + "\n"
        makers[folder / INDEX[0]] = lambda file: file.write(text.encode())
    return makers, parts


def earlier_weights(folder: Path) -> list[Path]:
    """Files of weights that a folder holds: whole ones, shards, and their indices."""
    shard = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)")
    if not folder.is_dir():
        return []
    names = sorted(path.name for path in folder.iterdir())
    return [folder / n for n in names if n in (*WHOLE, *INDEX) or shard.fullmatch(n)]
