"""Files of text: which of a folder are read, which are left out, and why."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import os
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

from kizzasi.errors import DataError

# Tests and installed packages; and two folders of tables and prose that mostly repeat themselves.
NOT_STANDARD_LIBRARY_CODE = frozenset(
    ["site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"]
)
LOOKED_AT = 8192  # bytes of a file in which a zero byte says that it is no text


def language_reference() -> bytes:
    """The documentation that ships with CPython, each paragraph once."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise DataError(
            "this Python came without pydoc_data.topics, the default text; "
            "pass --data FILE_OR_FOLDER"
        ) from error
    joined = "\n\n".join(topics[key] for key in sorted(topics))
    # Topics quote each other at length; dict keeps the first of equal paragraphs, in order.
    return "\n\n".join(dict.fromkeys(joined.split("\n\n"))).encode()


def standard_library() -> Iterator[Path]:
    """The standard library's own .py files."""
    files = files_of(Path(sysconfig.get_path("stdlib")), NOT_STANDARD_LIBRARY_CODE)
    return (path for path in files if path.suffix == ".py")


def files_of(
    root: Path, skipped: frozenset[str] = frozenset(), left_out: list[str] | None = None
) -> Iterator[Path]:
    """The file itself, or every file of a folder that may be text: its own, then its folders'.

    Args:
        root: a file, which is taken as it is, or a folder.
        skipped: names of folders to pass by.
        left_out: is told of hidden files and folders and of links, which are never read.

    Raises:
        DataError: nothing there, or a folder that cannot be read.
    """
    told = left_out if left_out is not None else []
    if os.path.isfile(root):
        yield root
        return
    if not os.path.isdir(root):
        found = os.path.exists(root)
        rule = "is neither a file nor a folder" if found else "is not there, or out of reach"
        raise DataError(f"{root}: {rule}; pass --data FILE_OR_FOLDER")

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: {error.strerror}; make the folder readable or move it")

    for folder, folders, files in os.walk(root, onerror=refuse):
        hidden = sorted(name for name in (*folders, *files) if name.startswith("."))
        told += [f"{Path(folder, name).relative_to(root)}: hidden" for name in hidden]
        folders[:] = sorted(set(folders) - skipped - set(hidden))
        for path in (Path(folder, file) for file in sorted(set(files) - set(hidden))):
            if path.is_file() and not path.is_symlink():
                yield path


def read_files(
    paths: Iterator[Path], max_bytes: int | None, left_out: list[str] | None = None
) -> bytes:
    """Join the files, each once, and stop when there are enough bytes.

    Args:
        paths: in order; .gz files are unpacked.
        max_bytes: to stop at; None reads all.
        left_out: is told of files that are no text, which a folder may hold; None takes them too.

    Raises:
        DataError: a file cannot be read or unpacked.
    """
    text, seen = bytearray(), set[bytes]()
    for path in paths:
        try:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                piece = file.read(-1 if max_bytes is None else max_bytes - len(text))
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise DataError(
                f"{path}: {reason}; make the file readable or move it out of the data"
            ) from error
        if left_out is not None and b"\0" in piece[:LOOKED_AT]:
            left_out.append(f"{path}: binary")
            continue
        key = hashlib.sha256(piece).digest()
        if key not in seen:
            seen.add(key)
            text += piece
        if len(text) == max_bytes:
            break
    return bytes(text)
