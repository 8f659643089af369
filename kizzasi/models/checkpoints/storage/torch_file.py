"""Files of torch.save: a zip file of raw bytes, and a pickle that says which tensor they are.

The pickle is read by an unpickler that knows eleven names and makes nothing but dictionaries,
lists and descriptions of tensors, so that nothing in the file can run, and nothing is allocated
beyond a few times the pickle's own size. The values stay in the file until they are asked for.
"""

from __future__ import annotations

import io
import math
import pickle
import reprlib
import struct
import zipfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kizzasi.errors import CheckpointError
from kizzasi.models.checkpoints.storage.stored import DTYPES, Place, Storage, Stored, stamp

STORAGES = {
    f"{name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        # integers: buffers that are no weights, such as GPT-2's causal mask
        "Bool": torch.bool,
        "Byte": torch.uint8,
        "Int": torch.int32,
        "Long": torch.int64,
    }.items()
}
# What torch.save writes. Others could allocate what they like (BYTEARRAY8), or have no use here.
OPCODES = """
    PROTO STOP MARK POP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
    BINUNICODE SHORT_BINUNICODE SHORT_BINSTRING BINPUT LONG_BINPUT BINGET LONG_BINGET MEMOIZE FRAME
    TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_TUPLE EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS
    GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID
""".split()  # noqa: SIM905
# what pickle and zipfile raise on damaged files
MALFORMED = (
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError),
    *(OSError, EOFError, struct.error, zipfile.BadZipFile, pickle.UnpicklingError),
    *(MemoryError, AssertionError),
)


class Described(NamedTuple):
    """A tensor in the words of the pickle: a storage (dtype, its file in the zip), and a view."""

    storage: tuple[torch.dtype, str]
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Names(dict[Any, Any]):
    """What stands for an OrderedDict; torch.save fills it afterwards, key by key."""

    def __init__(self) -> None:
        super().__init__()


def _require_names(keys: Iterable[Any]) -> None:
    """A tuple of tuples of tuples, each twice the same, takes a few bytes and 2^n steps to hash."""
    for key in keys:
        if not isinstance(key, (str, int)):
            raise ValueError(f"a {type(key).__name__} as the name of a tensor")


_InPython: Any = pickle._Unpickler  # pyright: ignore[reportAttributeAccessIssue]


class _Unpickler(_InPython):
    """The one in Python: the one in C allocates what a file says before it has read it."""

    stack: list[Any]

    def load_setitem(self) -> None:
        _require_names(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        _require_names(self.stack[::2])  # since the mark
        super().load_setitems()

    dispatch = {  # noqa: RUF012
        code: fn
        for code, fn in _InPython.dispatch.items()
        if code in {getattr(pickle, name)[0] for name in OPCODES}
    }
    dispatch |= {pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems}

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("collections", "OrderedDict"): _Names,
            ("torch._utils", "_rebuild_tensor_v2"): lambda *args: _describe(*args),
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
        }
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) not in known:
            raise CheckpointError(
                f"its pickle asks for {module}.{name}; a dict of tensors needs no such thing"
            )
        return known[module, name]

    def persistent_load(self, pid: Any) -> Any:
        word, dtype, key, *_ = pid
        if word != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise ValueError(f"a storage called {reprlib.repr(word)}, {reprlib.repr(key)}")
        return dtype, key


def _describe(storage: Any, offset: int, shape: Any, stride: Any, *_: Any) -> Described:
    dtype, key = storage
    numbers = (offset, *shape, *stride)
    if not all(type(n) is int and 0 <= n < 2**62 for n in numbers) or len(shape) != len(stride):
        raise ValueError(f"a tensor of shape {reprlib.repr(shape)}")
    return Described((dtype, key), offset, tuple(shape), tuple(stride))


def open_torch(path: Path) -> Storage:
    """The tensors of a file. Raises CheckpointError: damaged, hostile, or no dict of tensors."""
    try:
        seen = stamp(path)
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            pickled, place = _members(archive, file, path, seen)
        data = _Unpickler(io.BytesIO(pickled)).load()
        if not isinstance(data, dict):
            raise CheckpointError(f"expected a dict of tensors, got {type(data).__name__}")
        return {name: _stored(name, tensor, place) for name, tensor in data.items()}
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except MALFORMED as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error


def _members(
    archive: zipfile.ZipFile, file: Any, path: Path, seen: tuple[int, int, int]
) -> tuple[bytes, Callable[[str], Place]]:
    """The pickle, and where the bytes of a storage lie."""
    members = {member.filename: member for member in archive.infolist()}
    if any(member.compress_type != zipfile.ZIP_STORED for member in members.values()):
        raise CheckpointError("compressed, and torch.save never compresses; save it again")
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError("a zip file, but not one of torch.save")
    root = pickles[0].removesuffix("data.pkl")
    order = f"{root}byteorder"
    if order in members and archive.read(order) != b"little":
        raise CheckpointError("big-endian; save it again on a little-endian machine")
    starts: dict[str, tuple[int, int]] = {}
    for name, member in members.items():
        if name.startswith(f"{root}data/"):
            file.seek(member.header_offset + 26)
            lengths = struct.unpack("<HH", file.read(4))
            starts[name.removeprefix(f"{root}data/")] = (
                member.header_offset + 30 + sum(lengths),
                member.file_size,
            )

    def place(key: str) -> Place:
        start, size = starts[key]
        if start + size > seen[1]:
            raise ValueError(f"storage {key:.40} ends after the file")
        return Place(path, start, size, seen)

    return archive.read(pickles[0]), place


def _stored(name: Any, tensor: Any, place: Callable[[str], Place]) -> Stored:
    if not isinstance(name, str) or not isinstance(tensor, Described):
        raise CheckpointError(f"{name!r:.80} does not name a tensor")
    dtype, key = tensor.storage
    whole, width = place(key), dtype.itemsize
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride, strict=True)) + 1
    reach = reach if math.prod(tensor.shape) else 0
    first, last = tensor.offset * width, (tensor.offset + reach) * width
    if last > whole.size or math.prod(tensor.shape) * width > whole.size:
        raise CheckpointError(f"{name} has more values than the file stores for it")
    part = whole._replace(start=whole.start + first, size=last - first)
    known = dtype if dtype in DTYPES.values() else None
    return Stored(tensor.shape, known, partial(_read, part, dtype, tensor))


def _read(part: Place, dtype: torch.dtype, tensor: Described) -> Tensor:
    flat = part.read().view(dtype)
    return flat.as_strided(tensor.shape, tensor.stride).contiguous()
